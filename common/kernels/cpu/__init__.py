"""The operations on a CPU, compiled by numba: start at `ops.CpuOps`.

`attention`, `linear`, `elementwise` and `sampler` hold the kernels, `vector` and `softmax` their
inner loops; `jit`, `cache` and `compile` say how they become machine code, once for a user.
"""
