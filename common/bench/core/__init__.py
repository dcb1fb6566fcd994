"""What the benchmarks share: results and reports, limits of the machine, processes, statistics.

Start at `results`, the format of every measurement, and `processes`, which runs an engine (through
`worker`) or a server on its own. `rounds` and `pairs` say whether one engine is faster.
"""
