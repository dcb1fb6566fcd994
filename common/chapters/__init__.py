"""The tool that keeps the chain of parts in order: `python -m common.chapters --help`.

Start at `chain`, which says what a part is; `check` says what must hold along the chain, and
`propagate` carries an edit through it.
"""
