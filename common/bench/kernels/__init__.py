"""`python -m common.bench kernels`: each operation's implementations, against the machine's limits.

Start at `run`; `cases` has the shapes, the inputs and the work that is unavoidable.
"""
