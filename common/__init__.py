"""What no part teaches, shared by all fifteen engines.

    models/     from a model's name to weights, tokens and chat templates
    http/       the server around an engine: app, schemas, routes, the page at `/`
    kernels/    the operations of a transformer: in PyTorch, for a CPU, for a GPU
    bench/      measurements of parts, servers and machines
    gpu_check/  everything that needs a GPU, in one call
    testing/    what the tests share: parts, servers, the oracle
    chapters/   the tool that keeps the chain of parts in order
    notebooks/  the tool that runs the notebooks, and their plots

At the root lies what an engine imports first: `requests` and `completions`, which go in and come out;
`sampling` (parameters and the noise), `logprobs` and `prompt_logprobs`; `options` (flags from a
dataclass), `device` and `kv_memory` (what the machine has); `trace` and `metrics`.
"""

import gc

# A start makes half a million objects that stay. At Python's own threshold, 700 new objects, a fifth of
# the start goes into looking for garbage among them.
gc.set_threshold(10_000, 20, 50)
