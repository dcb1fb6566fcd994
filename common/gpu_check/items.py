"""One check or measurement: its name, whether it went well, and what it found."""

import math
import time
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Check = tuple[str, Callable[[], dict[str, Any]]]  # a name, and what returns what it found
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


def not_reached(name: str, why: str, seconds_left: float, seconds: float = 0.0) -> Item:
    """A check that was not done. seconds_left: until the limit that kept it from being done."""
    return {
        "name": name,
        "status": NOT_REACHED,
        "seconds": round(seconds, 3),
        "error": why,
        "seconds_left": round(max(0.0, seconds_left), 1),
    }


class Once(Generic[T]):
    """What several checks share, made when it is first needed.

    Where making it fails, every check that needs it fails, at once and with the same error.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.made: T | None = None
        self.error: Exception | None = None

    def __call__(self) -> T:
        if self.error is not None:
            raise RuntimeError("this had failed before") from self.error
        if self.made is None:
            try:
                self.made = self.make()
            except Exception as error:
                self.error = error
                raise
        return self.made
