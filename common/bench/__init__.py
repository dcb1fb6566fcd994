"""Measuring the engines: `python -m common.bench SUBCOMMAND`.

`limits` measures the machine, `offline` an engine in a fresh process, `serve` any
OpenAI-compatible server under load, `startup` and `streaming` the parts' own servers, and `report`
turns the JSON of all of them into the tables of the READMEs. Every result carries the machine's
measured limits and the versions of what ran, so that a number can be judged without asking.

Whatever several of them share is in `core`; one folder each for `serving` (load on servers), `prefix`,
`speculative`, `kv` and `kernels`; `peers` holds the adapters of `compare`. Start at `offline`.

Nothing here imports torch, httpx or numba before it needs them: `limits` and `offline` run where
no web framework is installed.
"""


class BenchError(Exception):
    """A measurement that could not be made; the message is one line for the user."""
