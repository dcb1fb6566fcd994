"""`python -m common.gpu_check`: everything that needs a GPU, in one call and one JSON file.

A machine with a GPU is often borrowed for minutes, and has torch, triton and transformers but no
web framework. So one command checks and measures all there is, imports nothing that serves HTTP,
and keeps what it has found when something breaks: every job is a process of its own, which a
failing kernel or the time limit may end while the others go on.

    limits   what the machine can read and multiply, by which all else is judged
    kernels  every operation of `common.kernels` against the reference
    oracle   parts 03 and later against transformers: greedy equality in fp32, closeness in bf16
    speed    single operations at Qwen3's shapes, against the limits
    overlap  what the device waits for the host, with the loop in turns and with two steps in flight
    ladder   the parts' prefill and decode speed on Qwen3's shapes, newest part first
"""
