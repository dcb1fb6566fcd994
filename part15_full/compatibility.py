"""Which settings do not compose, and why: checked before anything is loaded.

Techniques that no rule names run together: `tests/test_part15_matrix.py` runs every pair of them.
Refusals that depend on the model or on the kernels are elsewhere, where these are known: experts that
cannot be divided over the ranks in `ranks.py`, cache formats that kernels cannot read in
`common/kernels`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from common.device import resolve_device
from common.distributed.torchrun import by_torchrun
from common.kv_transfer.options import check_role

if TYPE_CHECKING:
    from .config import EngineConfig

Rule = tuple[Callable[["EngineConfig"], bool], str]

# (whether a configuration is refused, why); {setting} stands for that setting's value.
RULES: tuple[Rule, ...] = (
    (
        lambda c: bool(c.async_scheduling) and c.speculative != "off",
        "async_scheduling is on: speculative {speculative} drafts from the last step's tokens, so one"
        " step is in flight",
    ),
    (
        lambda c: c.offload in ("prefix", "both") and c.prefix_cache == "off",
        "offload is {offload}: prefix_cache must not be off",
    ),
    (
        lambda c: c.disk_kv is not None and c.tensor_parallel_size > 1,
        "tensor_parallel_size is {tensor_parallel_size}: disk_kv is for one rank",
    ),
    (
        lambda c: c.disk_kv is not None and c.pipeline_parallel_size > 1,
        "pipeline_parallel_size is {pipeline_parallel_size}: disk_kv is for one rank",
    ),
    (
        lambda c: c.speculative in ("draft", "self") and c.pipeline_parallel_size > 1,
        "pipeline_parallel_size is {pipeline_parallel_size}: speculative {speculative} runs all layers"
        " on each rank",
    ),
    (
        lambda c: (
            c.async_scheduling is False and c.speculative == "off" and c.pipeline_parallel_size > 1
        ),
        "async_scheduling is off: with pipeline_parallel_size {pipeline_parallel_size} as many steps are"
        " in flight",
    ),
    (
        lambda c: c.compile == "layers" and c.pipeline_parallel_size > 1,
        "pipeline_parallel_size is {pipeline_parallel_size}: compile layers is for one rank",
    ),
)


def check_composition(config: "EngineConfig") -> None:
    """Raises ValueError with the reason where two settings do not compose."""
    for is_refused, reason in RULES:
        if is_refused(config):
            raise ValueError(reason.format(**vars(config)))
    check_role(config)


def check_machine(config: "EngineConfig") -> None:
    """Raises ValueError where there are fewer GPUs than ranks, before a model is downloaded."""
    device, _ = resolve_device(config.device, config.dtype)
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    first = device.index or 0
    number = torch.cuda.device_count() - first
    if device.type == "cuda" and tp * pp > number and not by_torchrun():
        sizes = f"tensor_parallel_size is {tp}" + f", pipeline_parallel_size {pp}" * (pp > 1)
        raise ValueError(f"{sizes}: torch sees {number} GPUs from cuda:{first} on")
