"""Cases that every implementation of the operations must pass: start at `all_cases.check_all`.

`case` says what a case is made of. `triton_interpreted` runs the GPU's kernels on a CPU, and
`triton_compile` compiles them for GPUs that are not there (`fake_gpu`). `launches` records what would be
launched, `triton_variants` tells what is compiled for a model, `host_time` what launches cost the host.
"""
