"""The notebooks' tools: `python -m common.notebooks` runs them and keeps what they show.

`plots` is what their cells import: one look for pictures, tables and verdicts.
"""
