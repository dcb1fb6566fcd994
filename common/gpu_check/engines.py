"""The engines that are measured."""

from typing import Any

from common.bench.core.worker import start_engine


def threads_of(job: dict[str, Any]) -> int | None:
    """One where the CPU stands in for a GPU: tiny shapes need no more, and others may be at work."""
    return 1 if job["device"] == "cpu" and job["quick"] else None


def engine_of(job: dict[str, Any], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """(the engine of {"part", "model", "device", "dtype", "quick"}, seconds of its start)."""
    common = {"device": job["device"], "dtype": job["dtype"], "threads": threads_of(job)}
    start = {"part": job["part"], "model": job["model"], "settings": common | settings}
    engine, _, answer = start_engine(start)
    return engine, answer
