"""The operations on a GPU, in Triton: start at `ops.TritonOps`.

`attention` and `sampler` choose and launch what `attention_kernel`, `sampler_kernels` and
`sampler_search` compute; `elementwise` has both in one file.
"""
