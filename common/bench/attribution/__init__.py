"""`python -m common.bench attribution`: what each technique is worth beside all others.

Start at `run`. `techniques` says what can be switched off, `mixes` draws the workloads that `prefix`
does not have, `plot` draws the outcome; engines are driven by `common.bench.prefix.worker`.
"""
