"""`python -m common.bench speculative`: decode speed with and without speculation.

Start at `run`. `prompts` has the texts, `variants` the engines and their turns, `worker` decodes in
a process of its own, `rows` and `plot` show the outcome.
"""
