"""Settings for four deployments, as in `--preset chat`; flags on the command line win over them.

Each preset is written for GPUs and a model of the named size. On a machine without a GPU it has other
values: the same idea at a size that a CPU can run, so that it can be tried.
"""

from dataclasses import dataclass
from typing import Any

from common.device import resolve_device


@dataclass(frozen=True)
class Preset:
    """Values for flags that are not on the command line."""

    about: str
    on_gpu: dict[str, Any]
    on_cpu: dict[str, Any]

    def values(self, device: str) -> dict[str, Any]:
        """The values for a device, by its name. Raises ValueError for a device that is not here."""
        kind, _ = resolve_device(device)
        return self.on_gpu if kind.type == "cuda" else self.on_cpu


PRESETS = {
    "chat": Preset(
        "chats with an 8B model: each turn brings all earlier ones, and tokens must come evenly",
        # A small budget keeps the steps with a prompt short for the streams beside it.
        on_gpu={
            "model": "Qwen/Qwen3-8B",
            "max_model_len": 32768,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 2048,
            "prefix_cache": "radix",
            "offload": "prefix",
        },
        on_cpu={"max_num_seqs": 8, "prefix_cache": "radix", "quantization": "int8-g32"},
    ),
    "api-70b": Preset(
        "a 70B model on four GPUs for many short requests, at the lowest cost per token",
        on_gpu={
            "model": "Qwen/Qwen2.5-72B-Instruct",
            "tensor_parallel_size": 4,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "kv_cache_dtype": "fp8",
            "offload": "swap",
            "max_waiting": 1024,
        },
        on_cpu={"tensor_parallel_size": 2, "kv_cache_dtype": "int8"},
    ),
    "long-documents": Preset(
        "documents of up to 128K tokens and answers that quote them: KV memory is the limit",
        # A document takes at most half of a step, and stays on the host for the next question.
        on_gpu={
            "model": "Qwen/Qwen3-4B-Instruct-2507",
            "max_model_len": 131072,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 8192,
            "long_prefill_threshold": 4096,
            "kv_cache_dtype": "fp8",
            "offload": "both",
            "speculative": "ngram",
        },
        on_cpu={
            "max_num_seqs": 4,
            "max_num_batched_tokens": 512,
            "long_prefill_threshold": 256,
            "kv_cache_dtype": "int8",
            "speculative": "ngram",
        },
    ),
    "moe": Preset(
        "a mixture of experts on two GPUs, each with half of the experts, placed by their use",
        on_gpu={
            "model": "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "max_model_len": 32768,
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "eplb": True,
            "max_num_seqs": 256,
        },
        # The embedded model has no experts: part 11's README says how to make a mixture of it.
        on_cpu={
            "model": "random:tiny-qwen3-moe",
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "eplb": True,
        },
    ),
}
