"""What each of several engines on one machine gets: cores, GPUs, memory for keys and values."""

from dataclasses import replace
from typing import Any

from common.device import usable_cores
from common.kv_memory import CPU_LIMIT, CPU_SHARE, free_memory


def num_gpus(config: Any) -> int:
    """GPUs of one engine; 0 where it runs on a CPU."""
    import torch

    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return 0
    stages = getattr(config, "pipeline_parallel_size", 1)
    return stages * getattr(config, "tensor_parallel_size", 1)


def share(config: Any, count: int) -> Any:
    """An engine's config with its share of the machine's cores and memory, one of `count`.

    What is given is left as it is. Each engine on a GPU has its memory to itself.
    """
    given: dict[str, Any] = {}
    if config.threads is None:
        given["threads"] = max(1, usable_cores() // count)
    if config.num_blocks is None and config.kv_cache_memory is None and not num_gpus(config):
        given["kv_cache_memory"] = min(CPU_LIMIT, int(CPU_SHARE * free_memory() / count))
    return replace(config, **given)


def gpu_environment(config: Any, index: int, count: int) -> dict[str, str]:
    """What lets engine `index` of `count` see its own GPUs only. Raises ValueError."""
    import os

    import torch

    each = num_gpus(config)
    if not each:
        return {}
    available = torch.cuda.device_count()
    if count * each > available:
        raise ValueError(
            f"data_parallel_size is {count}: {count * each} GPUs, and {available} here"
        )
    if config.device not in ("auto", "cuda") and count > 1:
        raise ValueError(f"device is {config.device!r}: each of {count} engines needs another GPU")
    if config.device not in ("auto", "cuda"):
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(available))))
    own = visible.split(",")[index * each : (index + 1) * each]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
