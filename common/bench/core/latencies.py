"""Latency arithmetic: what TTFT, ITL, TPOT and E2E are, exactly.

For one request sent at t0 whose tokens arrive at t1, t2, … tn:

    TTFT = t1 - t0            time to first token
    ITL  = t2 - t1, t3 - t2…  inter-token latencies, one fewer than arrivals
    TPOT = mean ITL           time per output token, one number a request
    E2E  = TTFT + sum of ITLs

A server may send several tokens in one chunk. They arrive together, so the latencies between them
are zero: TPOT divides by the tokens that the server's usage counts, the list of ITLs keeps the gaps
that a reader sees. A response that is not streamed arrives at once: TTFT = E2E, no ITL, no TPOT.
Percentiles over all ITLs weigh long requests more; over TPOT every request counts once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclass
class RequestRecord:
    """One request as the client saw it. Times are seconds on one clock."""

    index: int
    start: float = 0.0  # the moment before the request was handed to the HTTP client
    lag: float = 0.0  # how much later than scheduled that was (open loop)
    first_byte: float | None = None  # of the response's body
    arrivals: list[float] = field(default_factory=list)  # of chunks with tokens
    end: float = 0.0  # the stream was closed, or the failure noticed
    prompt_tokens: int | None = None  # as the server counted
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # kind of failure; None is success
    detail: str = ""

    @property
    def ttfb(self) -> float | None:
        return None if self.first_byte is None else self.first_byte - self.start

    @property
    def ttft(self) -> float | None:
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def itls(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float | None:
        itls = self.itls
        if not itls:
            return None
        return sum(itls) / max(len(itls), (self.completion_tokens or 0) - 1)

    @property
    def e2e(self) -> float | None:
        return self.ttft + sum(self.itls) if self.arrivals else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and the derived latencies in seconds."""
        derived = {"ttft": self.ttft, "itls": self.itls, "tpot": self.tpot, "e2e": self.e2e}
        return {**asdict(self), **derived}


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile, linear between the two nearest values.

    Raises ValueError on an empty sequence or a percentage outside 0 to 100.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, not {percent!r}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarize(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """count, mean and percentiles of the values that are there; None each where none is."""
    present = [value for value in values if value is not None]
    names = [f"p{percent}" for percent in PERCENTILES]
    if not present:
        return {"count": 0, "mean": None} | dict.fromkeys(names)
    summary: dict[str, float | int | None] = {
        "count": len(present),
        "mean": sum(present) / len(present),
    }
    return summary | {f"p{percent}": percentile(present, percent) for percent in PERCENTILES}


def spread_percent(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median in percent: how far single runs scatter."""
    if len(values) < 2:
        return None
    return 100 * (max(values) - min(values)) / percentile(values, 50)
