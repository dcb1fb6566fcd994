"""`python -m common.bench prefix`: what a prefix cache finds, and what that saves.

Start at `run`. `workloads` draws requests, `worker` drives engines through them in a process of
its own, `rows` and `plot` show the outcome; `costs` measures the caches without a model.
"""
