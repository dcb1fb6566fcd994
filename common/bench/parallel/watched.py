"""What a rank's group does, written down: each collective's name, times and bytes."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

COLLECTIVES = ("all_reduce", "broadcast", "gather", "all_gather", "reduce_scatter", "all_to_all")


class Call(NamedTuple):
    """One collective on this rank. Seconds of the clock; num_bytes: given to other ranks."""

    name: str
    begin: float
    end: float
    num_bytes: int


@dataclass(frozen=True)
class Totals:
    """Of calls with one name."""

    count: int
    seconds: float
    num_bytes: int


class Watch:
    """Puts itself before a group's collectives, from its creation until `stop`."""

    def __init__(self, group: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.group, self.clock = group, clock
        self.calls: list[Call] = []
        for name in COLLECTIVES:
            setattr(group, name, self._watched(name, getattr(group, name)))

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            before, begin = self.group.num_bytes_sent, self.clock()
            result = operation(*args, **options)
            end = self.clock()
            self.calls.append(Call(name, begin, end, self.group.num_bytes_sent - before))
            return result

        return run

    def stop(self) -> None:
        """The group is again as it was."""
        for name in COLLECTIVES:
            delattr(self.group, name)

    def totals(self) -> dict[str, Totals]:
        """By name, of the calls until now."""
        counts: Counter[str] = Counter(call.name for call in self.calls)
        return {
            name: Totals(
                count,
                sum(call.end - call.begin for call in self.calls if call.name == name),
                sum(call.num_bytes for call in self.calls if call.name == name),
            )
            for name, count in counts.items()
        }
