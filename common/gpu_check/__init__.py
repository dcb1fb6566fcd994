"""`python -m common.gpu_check`: everything that needs a GPU, in one call and one JSON file.

A machine with a GPU is often at hand for minutes only, and has torch, triton and transformers but no
web framework. So one command checks and measures all there is, imports nothing that serves HTTP,
and keeps what it has found when something breaks: every job is a process of its own, which a
failing kernel or a time limit may end while the others go on, and the file is written anew after
each result. What no longer fits before the deadline is left out, and the file says so: name, reason
and the seconds that were left.

    limits     what the machine can read and multiply, by which all else is judged
    kernels    every operation of `common.kernels` against the reference, in the model's format;
               beside them, all that later sections measure is compiled
    oracle     the newest part and part 03 against transformers: equal in fp32, close in bf16
    steps      decode steps of the newest part: both loops, as CUDA graphs, launches, waiting
    nano_vllm  the benchmark that nano-vllm publishes: 256 requests of 100 to 1,024 tokens
    copies     blocks between the device and pinned memory, beside steps: rates, races, a burst
    quantized  products and caches of codes: right for every format, and times the model's own format
    rooflines  attention and other operations alone, against the limits; other tiles; PyTorch's own
    ladder     prefill and decode speed of some parts, newest first, and of transformers
    formats    the kernels in other number formats
    large      the ladder's speeds of the newest part on a model of 8B, in the time that is left
"""
