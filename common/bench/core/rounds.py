"""Engines that take turns: each measurement in a fresh process, the order reversed every round.

So neighbours in the order are measured next to each other in time, half of the time in either
order, and their rates of one round make a pair.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import progress
from common.bench.core.latencies import spread_percent
from common.bench.core.pairs import Ratio, paired_ratio
from common.bench.core.rates import Point, planned_runs, rate, same_tokens, shares
from common.bench.core.results import column

COLUMNS = [
    column("engine", "engine"),
    column("point", "workload"),
    column("rate", "speed", "tok/s", 0),
    column("spread", "spread", "%", 0),
    column("mbu", "MBU", "%", 0),
    column("mfu", "MFU", "%", 0),
    column("ratio", "ratio", digits=2),
    column("ratio_low", "95% from", digits=2),
    column("ratio_high", "to", digits=2),
    column("pairs", "pairs", digits=0),
    column("same", "same tokens", "%", 0),
]


@dataclass
class Entrant:
    """One engine, and what has been measured of it.

    run: hands runs to a fresh process and returns its answer.
    serial: it runs one sequence at a time, so that decoding is measured at batch 1 for all.
    """

    name: str
    run: Callable[[list[dict[str, Any]]], dict[str, Any]]
    rounds: int
    serial: bool = False
    facts: dict[str, Any] = field(default_factory=dict)  # dtype, device, shape, max_num_seqs
    rates: dict[str, dict[int, float]] = field(default_factory=dict)  # by point and round
    outputs: dict[str, list[list[int]]] = field(default_factory=dict)  # by point; of round 0
    other_cores: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds that were measured."""
        return max(map(len, self.rates.values()), default=0)

    def points(self, points: list[Point]) -> list[Point]:
        """Those to measure."""
        return [point for point in points if not self.serial or stand_in(point, points) is point]

    def rates_at(self, point: Point, points: list[Point]) -> dict[int, float]:
        return self.rates.get((stand_in(point, points) if self.serial else point).label, {})


def stand_in(point: Point, points: list[Point]) -> Point:
    """The point whose rate a serial engine has at `point` too: the smallest batch for decoding."""
    same = [other for other in points if other.kind == point.kind == "decode"]
    return min(same, key=lambda other: other.batch_size, default=point)


def measure_rounds(
    entrants: list[Entrant], points: list[Point], vocab_size: int, seed: int, repeats: int
) -> None:
    """Measure all, round by round. An entrant that fails is told and takes no further part.

    Ctrl-C ends it early, with what there is by then, once each entrant has been measured.
    """
    turns = [
        (number, entrant)
        for number in range(max(entrant.rounds for entrant in entrants))
        for entrant in entrants[:: -1 if number % 2 else 1]
        if number < entrant.rounds
    ]
    try:
        for number, entrant in progress(turns, "measurements"):
            if entrant.failure is None:
                take_turn(entrant, points, number, vocab_size, f"{seed} {number}", repeats)
    except KeyboardInterrupt:
        if not all(entrant.rates or entrant.failure for entrant in entrants):
            raise
        print("stopped early: the result is of the rounds until here", file=sys.stderr)


def take_turn(entrant: Entrant, *arguments: Any) -> None:
    try:
        measure(entrant, *arguments)
    except BenchError as error:
        entrant.failure = str(error)
        print(f"{entrant.name}: {error}", file=sys.stderr)


def measure(
    entrant: Entrant, points: list[Point], number: int, vocab_size: int, seed: str, repeats: int
) -> None:
    """One fresh process; every other round begins with the largest batch."""
    order = entrant.points(points)[:: -1 if number % 2 else 1]
    plans = [planned_runs(point, vocab_size, seed, repeats) for point in order]
    answer = entrant.run([run for plan in plans for run in plan])
    entrant.facts = {key: value for key, value in answer.items() if key != "runs"}
    runs = iter(answer["runs"])
    for point, plan in zip(order, plans, strict=True):
        own = [next(runs) for _ in plan]
        entrant.rates.setdefault(point.label, {})[number] = rate(point, own)
        if number == 0:
            entrant.outputs[point.label] = own[-1]["outputs"]
    if answer["wall_other_cores"] is not None:
        entrant.other_cores.append(answer["wall_other_cores"])


def rows(
    entrants: list[Entrant],
    points: list[Point],
    limits: dict[str, Any],
    pairs: Callable[[Entrant], tuple[Entrant, Entrant] | None],
) -> Iterator[dict[str, Any]]:
    """A row for each point and entrant; `pairs` says of which two the row's ratio is, if any."""
    for point in points:
        for entrant in entrants:
            rates = entrant.rates_at(point, points)
            if not rates:
                continue
            median = statistics.median(rates.values())
            batch_size = 1 if entrant.serial else entrant.facts.get("max_num_seqs") or sys.maxsize
            two = pairs(entrant)
            yield {
                "engine": entrant.name,
                "dtype": entrant.facts["dtype"],
                "point": point.label,
                "kind": point.kind,
                "batch_size": point.batch_size,
                "rate": median,
                "spread": spread_percent(list(rates.values())),
                **shares(point, median, batch_size, entrant.facts, limits),
                **compared(two, point, points),
                "same": agreement(two, point),
                "rates": [rates[number] for number in sorted(rates)],
            }


def compared(
    two: tuple[Entrant, Entrant] | None, point: Point, points: list[Point]
) -> dict[str, Any]:
    ratio = Ratio(0, None, None, None)
    if two is not None:
        ratio = paired_ratio(*(entrant.rates_at(point, points) for entrant in two))
    return {
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "pairs": ratio.pairs or None,
        "no_slower": ratio.no_slower,
    }


def agreement(two: tuple[Entrant, Entrant] | None, point: Point) -> float | None:
    """Percent of tokens that two entrants have in common; None where one was not measured there."""
    outputs = [entrant.outputs.get(point.label) for entrant in two or ()]
    if len(outputs) != 2 or None in outputs:
        return None
    return same_tokens(*outputs)
