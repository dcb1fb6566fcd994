"""`python -m common.bench kv`: how many sequences a piece of KV memory holds.

Start at `run`; `usage` counts what the memory holds, from a trace or by arithmetic.
"""
