"""What runs, in which order, and for how long: the sections and the jobs of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Job = dict[str, Any]

MODEL, QUICK_MODEL = "random:qwen3-0.6b", "random:tiny-qwen3"
FIRST_PART = 3  # the first with our own model and kernels
FIRST_ASYNC_PART = 5
LADDER_PARTS = 4  # so many of them, the newest first


@dataclass(frozen=True)
class Plan:
    """What was asked for, and on what."""

    device: str  # cpu or cuda
    quick: bool
    parts: list[int]  # newest first
    model: str

    @property
    def at_once(self) -> int:
        """Processes that compile kernels side by side."""
        return min(8, len(os.sched_getaffinity(0)) // 2) if self.device == "cuda" else 1

    def job(self, kind: str, name: str, **more: Any) -> Job:
        return {"kind": kind, "name": name, "device": self.device, "quick": self.quick, **more}

    def job_of(self, kind: str, part: int, **more: Any) -> Job:
        """A job that runs an engine."""
        name = f"part {part:02d}, {self.model}"
        return self.job(kind, name, part=part, model=self.model, **more)


@dataclass(frozen=True)
class Section:
    """Some jobs, and the seconds that they may take together.

    before: jobs that only compile what the others measure, side by side.
    """

    seconds: int
    jobs: Callable[[Plan], list[Job]]
    is_timed: bool = True  # so its jobs run one after the other
    needs_limits: bool = False
    before: Callable[[Plan], list[Job]] = lambda plan: []


def limits(plan: Plan) -> list[Job]:
    return [plan.job("limits", "limits")]


def kernels(plan: Plan) -> list[Job]:
    return correctness(plan, "bfloat16" if plan.device == "cuda" else "float32")


def formats(plan: Plan) -> list[Job]:
    names = ("float32", "float16") if plan.device == "cuda" else ()
    return [job for name in names for job in correctness(plan, name)]


def correctness(plan: Plan, dtype: str) -> list[Job]:
    """Every case once, dealt out to the processes that run side by side."""
    shares = [(i, plan.at_once) for i in range(plan.at_once)]
    return [plan.job("kernels", f"kernels, {dtype}", dtype=dtype, share=share) for share in shares]


def oracle(plan: Plan) -> list[Job]:
    parts = dict.fromkeys([plan.parts[0], plan.parts[-1]])
    return [plan.job("oracle", f"part {part:02d}", part=part) for part in parts]


def rooflines(plan: Plan) -> list[Job]:
    return [plan.job("rooflines", group, group=group) for group in ("attention", "tiles", "others")]


def compile_rooflines(plan: Plan) -> list[Job]:
    if plan.device != "cuda":
        return []
    shares = [(i, plan.at_once) for i in range(plan.at_once)]
    return [plan.job("compile", "compile ahead", share=share) for share in shares]


def steps(plan: Plan) -> list[Job]:
    return [plan.job_of("steps", part) for part in plan.parts[:1] if part >= FIRST_ASYNC_PART]


def nano_vllm(plan: Plan) -> list[Job]:
    return [plan.job_of("nano_vllm", plan.parts[0])]


def ladder(plan: Plan) -> list[Job]:
    ours = [plan.job_of("ladder", part) for part in plan.parts[:LADDER_PARTS]]
    theirs = plan.job("transformers", f"transformers, {plan.model}", model=plan.model)
    return [*ours[:1], theirs, *ours[1:]]


SECTIONS = {
    "limits": Section(20, limits),
    "kernels": Section(70, kernels, is_timed=False),
    "oracle": Section(60, oracle),
    "rooflines": Section(70, rooflines, needs_limits=True, before=compile_rooflines),
    "steps": Section(40, steps),
    "nano_vllm": Section(90, nano_vllm),
    "ladder": Section(100, ladder, needs_limits=True),
    "formats": Section(110, formats, is_timed=False),
}
