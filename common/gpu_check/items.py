"""One check or measurement: its name, whether it went well, and what it found."""

import math
import time
import traceback
from collections.abc import Callable
from typing import Any

Item = dict[str, Any]  # "name", "status", "seconds", "error", and what it found

OK, FAILED, NOT_REACHED = "ok", "failed", "not reached"


def attempt(name: str, check: Callable[[], dict[str, Any]]) -> Item:
    """Run a check, which returns what it found; whatever it raises is a failure to be told."""
    start = time.perf_counter()
    try:
        found, status, error = check(), OK, None
    except Exception:
        found, status, error = {}, FAILED, traceback.format_exc()
    seconds = round(time.perf_counter() - start, 3)
    return {"name": name, "status": status, "seconds": seconds, "error": error, **finite(found)}


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failed(name: str, error: str, seconds: float = 0.0) -> Item:
    return {"name": name, "status": FAILED, "seconds": round(seconds, 3), "error": error}


def not_reached(name: str, why: str) -> Item:
    return {"name": name, "status": NOT_REACHED, "seconds": 0.0, "error": why}
