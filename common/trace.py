"""What an engine did, step by step: a ring of records that can be watched, saved and drawn.

One `StepRecord` a step: which sequences were scheduled with how many tokens, and when each phase
(schedule, prepare, forward, sample, postprocess) began and ended. Times are seconds of
`time.perf_counter`. The engine's thread writes; any thread may read or follow. Memory is bounded:
the ring keeps the last `capacity` steps, and a follower that falls behind loses the oldest.
"""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

CAPACITY = 4096  # steps kept


@dataclass
class StepRecord:
    """One step of an engine.

    scheduled: request id -> number of tokens run for it in this step.
    phases: (name, begin, end), in order, in seconds.
    finished: request id -> finish reason.
    """

    step: int
    begin: float
    end: float = 0.0
    scheduled: dict[str, int] = field(default_factory=dict)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    finished: dict[str, str] = field(default_factory=dict)

    def phase_seconds(self) -> dict[str, float]:
        """Name of each phase -> how long it took."""
        return {name: end - begin for name, begin, end in self.phases}


class Trace:
    """The last steps of one engine."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[StepRecord] = deque(maxlen=capacity)
        self._current: StepRecord | None = None
        self._count = 0
        self._lock = threading.Lock()
        self._followers: list[deque[StepRecord]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[StepRecord]:
        """Record one step; the record is kept even when the step raises."""
        record = self._current = StepRecord(self._count, time.perf_counter())
        try:
            yield record
        finally:
            record.end = time.perf_counter()
            self._current = None
            with self._lock:
                self._count += 1
                self._records.append(record)
                for follower in self._followers:
                    follower.append(record)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of the current step; outside of a step nothing is recorded."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._current is not None:
                self._current.phases.append((name, begin, time.perf_counter()))

    def scheduled(self, request_id: str, num_tokens: int) -> None:
        """Note that the current step runs `num_tokens` tokens of a request."""
        if self._current is not None:
            self._current.scheduled[request_id] = num_tokens

    def finished(self, request_id: str, reason: str) -> None:
        """Note that a request ended in the current step."""
        if self._current is not None:
            self._current.finished[request_id] = reason

    def records(self) -> list[StepRecord]:
        """The steps kept, oldest first."""
        with self._lock:
            return list(self._records)

    @contextlib.contextmanager
    def follow(self, backlog: int = 256) -> Iterator[deque[StepRecord]]:
        """A queue that new records are put into; at most `backlog` wait in it."""
        follower: deque[StepRecord] = deque(maxlen=backlog)
        with self._lock:
            self._followers.append(follower)
        try:
            yield follower
        finally:
            with self._lock:
                # By identity: two queues with the same records, or none, are equal.
                self._followers = [other for other in self._followers if other is not follower]

    def save(self, path: Path) -> None:
        """Write the steps kept as JSON, one record a line."""
        lines = [json.dumps(dataclasses.asdict(record)) for record in self.records()]
        path.write_text("\n".join(lines) + "\n" if lines else "")

    def to_perfetto(self) -> dict[str, Any]:
        """The steps as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""
        return to_perfetto(self.records())


def load(path: Path) -> list[StepRecord]:
    """Read what `Trace.save` wrote. Raises ValueError naming the line."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = json.loads(line)
            values["phases"] = [(name, begin, end) for name, begin, end in values["phases"]]
            records.append(StepRecord(**values))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} line {number} is not a step record: {error}") from error
    return records


def to_perfetto(records: list[StepRecord]) -> dict[str, Any]:
    """Chrome trace events: one track of steps, one of phases; times in microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "steps"), (2, "phases"))
    ]
    for record in records:
        arguments = {"scheduled": record.scheduled, "finished": record.finished}
        spans = [(1, f"step {record.step}", record.begin, record.end, arguments)]
        spans += [(2, name, begin, end, {}) for name, begin, end in record.phases]
        for tid, name, begin, end, args in spans:
            times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
            events.append({"ph": "X", "pid": 1, "tid": tid, "name": name, "args": args, **times})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def phase(method: Function) -> Function:
    """Decorate a method of an object that has a `trace`: its calls are phases under its name."""

    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.trace.phase(method.__name__):
            return method(self, *args, **kwargs)

    return timed  # type: ignore[return-value]
