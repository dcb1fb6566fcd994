"""Is one engine faster than another? Ratios of measurements that were made side by side.

A shared machine slows down and recovers over minutes, so speeds of two engines are compared within
pairs that were measured one after the other. What is reported is the median of the pairs' ratios,
with a 95% interval from a bootstrap over the pairs: pairs are drawn with replacement as often as
there are any, ten thousand times, and the interval holds the middle 95% of the medians.
"""

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from common.bench.core.latencies import percentile

RESAMPLES = 10_000
MIN_INTERVAL = 5  # pairs below which an interval would only repeat their extremes
MIN_CLAIM = 15  # pairs that a claim of "no slower" needs
NO_SLOWER = 0.97  # the least lower bound of the ratio for that claim


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios; `low` and `high` are None where pairs are too few."""

    pairs: int
    median: float | None
    low: float | None
    high: float | None

    @property
    def no_slower(self) -> bool | None:
        """Whether the numerator is no slower; None where the pairs are too few to say."""
        return None if self.low is None or self.pairs < MIN_CLAIM else self.low >= NO_SLOWER


def paired_ratio(numerator: Mapping[int, float], denominator: Mapping[int, float]) -> Ratio:
    """Compare two sets of measurements by round; rounds that only one of them has are left out."""
    rounds = sorted(numerator.keys() & denominator.keys())
    ratios = [numerator[number] / denominator[number] for number in rounds]
    if not ratios:
        return Ratio(0, None, None, None)
    low, high = interval(ratios) if len(ratios) >= MIN_INTERVAL else (None, None)
    return Ratio(len(ratios), statistics.median(ratios), low, high)


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of the median; the same for the same values, in any order."""
    draw, ordered = random.Random(0), sorted(values)
    medians = [statistics.median(draw.choices(ordered, k=len(ordered))) for _ in range(RESAMPLES)]
    return percentile(medians, 2.5), percentile(medians, 97.5)
