"""What runs, in which order, and for how long: the sections and the jobs of each.

The most valuable first, since the command may be cut short at any moment: whether the kernels are
right, whether the engines are, and then what is fast and what is not.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Job = dict[str, Any]  # "kind", "name", "device", "quick", "limit", and more of its kind

MODEL, LARGE_MODEL, QUICK_MODEL = "random:qwen3-0.6b", "random:qwen3-8b", "random:tiny-qwen3"
FIRST_PART = 3  # the first with our own model and kernels
FIRST_ASYNC_PART = 5
FIRST_SPECULATIVE_PART = 8
LADDER_PARTS = (3, 4, 5)  # beside the newest: what decoding gained from
SPECULATIVE: dict[str, dict[str, Any]] = {  # what drafts, and with which options
    "ngram": {},
    "self": {"draft_layers": 2},
    "draft": {"draft_model": QUICK_MODEL},
}
ORACLE_MODELS = ("random:tiny-qwen3", "random:tiny-llama")
FIRST_MOE_PART, MOE_MODEL = 11, "random:tiny-qwen3-moe"
FIRST_OFFLOAD_PART = 12
ENGINE_START = 90  # seconds, when all its kernels have to be compiled first
CPU_PATIENCE = 5  # times the limits: there kernels are compiled by others, on fewer cores


@dataclass(frozen=True)
class Plan:
    """What was asked for, and on what."""

    device: str  # cpu, cuda or cuda:N
    dtype: str  # of what is fast; the formats that it is compared with are others
    quick: bool
    parts: list[int]  # newest first
    model: str

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def at_once(self) -> int:
        """Processes side by side, where nothing is timed and all compile kernels."""
        return max(1, min(14, len(os.sched_getaffinity(0)) - 2)) if self.is_cuda else 1

    @property
    def patience(self) -> int:
        return 1 if self.is_cuda else CPU_PATIENCE

    def job(self, kind: str, name: str, limit: float, needs: float = 8, **more: Any) -> Job:
        """limit: seconds for each of its checks; needs: seconds without which it is not begun."""
        limit *= self.patience
        common = {"device": self.device, "dtype": self.dtype, "quick": self.quick}
        limits = {"limit": limit, "first_limit": limit, "needs": needs}
        return {"kind": kind, "name": name, **common, **limits, **more}

    def job_of(self, kind: str, part: int, limit: float, needs: float = 15, model: str = "") -> Job:
        """A job that runs an engine, which starts with the first check."""
        model = model or self.model
        first = {"first_limit": max(limit, ENGINE_START) * self.patience}
        return self.job(
            kind, f"part {part:02d}, {model}", limit, needs, part=part, model=model, **first
        )

    def shares(self, kind: str, name: str, limit: float, count: int, **more: Any) -> list[Job]:
        """One job's checks, dealt out to several processes."""
        return [self.job(kind, name, limit, share=(i, count), **more) for i in range(count)]


@dataclass(frozen=True)
class Section:
    """Some jobs, and the seconds that they may take together; the last one of a run may go on until
    the deadline."""

    seconds: int
    jobs: Callable[[Plan], list[Job]]
    is_timed: bool = True  # so its jobs run one after the other
    needs_limits: bool = False


def limits(plan: Plan) -> list[Job]:
    return [plan.job("limits", "limits", 20)]


def kernels(plan: Plan) -> list[Job]:
    """The cases; beside them, other processes compile what later sections measure."""
    cases = correctness(plan, plan.dtype)
    if not plan.is_cuda:
        return cases
    newest = plan.parts[0]
    ahead = [plan.job_of("start", newest, 65)]
    if newest >= FIRST_SPECULATIVE_PART:
        ahead += [
            plan.job("speculators", f"speculative {method}", 65, part=newest, methods=[method])
            for method in SPECULATIVE
        ]
    shares = plan.shares("compile", "compile ahead", 60, max(1, plan.at_once // 3))
    quantised = plan.shares("compile_quantized", "compile ahead, quantised", 60, 4)
    return [*ahead, *cases, *quantised, *shares]


def formats(plan: Plan) -> list[Job]:
    others = [name for name in ("float32", "float16") if name != plan.dtype]
    return [job for name in others for job in correctness(plan, name)] if plan.is_cuda else []


def correctness(plan: Plan, dtype: str) -> list[Job]:
    """Every case once; of a CPU's, which the test suite runs, some."""
    name = f"kernels, {dtype}"
    if not plan.is_cuda:
        return [plan.job("kernels", name, 30, dtype=dtype, share=(0, 4))]
    return plan.shares("kernels", name, 30, max(1, plan.at_once // 2), dtype=dtype)


def oracle(plan: Plan) -> list[Job]:
    """On a GPU a process for each model and number format, since each compiles its own kernels."""
    parts = dict.fromkeys([plan.parts[0], plan.parts[-1]])
    formats = (
        ["bfloat16", "float32"] if plan.dtype != "float32" or not plan.is_cuda else ["float32"]
    )
    choices = {
        part: [
            (model, dtype)
            for model in (*ORACLE_MODELS, *([MOE_MODEL] if part >= FIRST_MOE_PART else []))
            for dtype in formats
        ]
        for part in parts
    }
    if not plan.is_cuda:
        most = 2 if plan.quick else None
        return [
            plan.job("oracle", f"part {part:02d}", 60, part=part, choices=choices[part][:most])
            for part in parts
        ]
    return [
        plan.job("oracle", f"part {part:02d}, {model}, {dtype}", 60, part=part, choices=[choice])
        for part in parts
        for choice in choices[part]
        for model, dtype in [choice]
    ]


def steps(plan: Plan) -> list[Job]:
    newest = plan.parts[0]
    return [plan.job_of("steps", newest, 20)] if newest >= FIRST_ASYNC_PART else []


def copies(plan: Plan) -> list[Job]:
    newest = plan.parts[0]
    return [plan.job_of("copies", newest, 25)] if newest >= FIRST_OFFLOAD_PART else []


def nano_vllm(plan: Plan) -> list[Job]:
    return [plan.job_of("nano_vllm", plan.parts[0], 70, 30)]


def rooflines(plan: Plan) -> list[Job]:
    groups = ("attention", "tiles", "others")
    if not plan.is_cuda:
        return [plan.job("rooflines", "all", 12, groups=groups)]
    return [plan.job("rooflines", group, 12, groups=[group]) for group in groups]


def quantized(plan: Plan) -> list[Job]:
    return [plan.job("quantized", "quantised", 25)]


def ladder(plan: Plan) -> list[Job]:
    """The newest part, transformers, and other parts, the newer first."""
    newest, *older = plan.parts
    others = [part for part in older if part in LADDER_PARTS] or older[:1]
    theirs = plan.job("transformers", f"transformers, {plan.model}", 45, 15, model=plan.model)
    ours = [plan.job_of("ladder", part, 45) for part in (newest, *others)]
    return [ours[0], theirs, *ours[1:]]


def large(plan: Plan) -> list[Job]:
    """The newest part on a model whose weights are what a step reads most."""
    if not plan.is_cuda or plan.quick:
        return []
    return [plan.job_of("ladder", plan.parts[0], 45, model=LARGE_MODEL)]


SECTIONS = {
    "limits": Section(20, limits),
    "kernels": Section(70, kernels, is_timed=False),
    "oracle": Section(60, oracle, is_timed=False),
    "steps": Section(45, steps),
    "nano_vllm": Section(70, nano_vllm),
    "copies": Section(30, copies),
    "quantized": Section(35, quantized, needs_limits=True),
    "rooflines": Section(50, rooflines, needs_limits=True),
    "ladder": Section(65, ladder, needs_limits=True),
    "formats": Section(15, formats, is_timed=False),
    "large": Section(10, large, needs_limits=True),
}
