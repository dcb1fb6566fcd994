"""What an engine did, step by step: a ring of records that can be watched, saved and drawn.

One `StepRecord` a step: which sequences were scheduled with how many tokens, when each phase
(schedule, prepare, forward, sample, postprocess) began and ended, and what changed: who came, who
took which blocks, who ended. `EngineState` is the sum of such changes, so a step costs what happens
in it and not what the engine holds. Times are seconds of `time.perf_counter`. The engine's thread
writes; any thread may read or follow. Memory is bounded: the ring keeps the last `capacity` steps,
and a follower that falls behind is told so.
"""

import contextlib
import functools
import itertools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

CAPACITY = 4096  # steps kept
# Fields of a record that are empty where nothing has happened.
HAPPENINGS = (
    "scheduled", "finished", "arrived", "allocated", "freed", "preempted", "device", "cached",
    "rejected", "loaded",
)  # fmt: skip
FEW = 4  # steps: some 0.1 ms with 256 requests in each


@dataclass
class StepRecord:
    """One step of an engine, with what happened since the step before.

    arrived: request id -> number of prompt tokens.
    cached: request id -> tokens of it that were found in a prefix cache when it joined, or came back.
    allocated, freed: request id -> blocks that it took and gave up.
    preempted: requests that went back to waiting.
    scheduled: request id -> number of tokens run for it in this step.
    rejected: request id -> drafts among those that have turned out not to belong to it.
    loaded: request id -> tokens whose keys and values came from beyond the device.
    phases: (name, begin, end), in order, in seconds.
    finished: request id -> finish reason.
    device: (step, begin, end): when a device that the host does not wait for worked on a step that
    was launched earlier. Known when its tokens are read.
    """

    step: int
    begin: float
    end: float = 0.0
    scheduled: dict[str, int] = field(default_factory=dict)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    finished: dict[str, str] = field(default_factory=dict)
    arrived: dict[str, int] = field(default_factory=dict)
    allocated: dict[str, list[int]] = field(default_factory=dict)
    freed: dict[str, list[int]] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    device: list[tuple[int, float, float]] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)

    @property
    def has_news(self) -> bool:
        """Whether anything came of the step, beyond a look at what there is to schedule."""
        happened = (getattr(self, name) for name in HAPPENINGS)
        return any(happened) or any(name != "schedule" for name, _, _ in self.phases)

    def phase_seconds(self) -> dict[str, float]:
        """Name of each phase -> how long it took."""
        return {name: end - begin for name, begin, end in self.phases}


@dataclass
class EngineState:
    """Who waits, who runs and who owns which blocks, after some step.

    A batch may still compute a sequence that has ended: it is scheduled, but does not run.

    waiting, running: request id -> number of tokens so far that were found or run for it; in order.
    blocks: request id -> the blocks it holds, also while others of its batch still run.
    cached: request id -> how many of its tokens were found, of those that run and were looked for.
    """

    num_blocks: int = 0
    block_size: int = 0
    step: int = -1
    waiting: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)

    def apply(self, record: StepRecord) -> None:
        """Go on by one step."""
        self.step = record.step
        self.waiting |= dict.fromkeys(record.arrived, 0)
        for request_id in record.preempted:
            self.running.pop(request_id, None)
            self.cached.pop(request_id, None)
            self.waiting = {request_id: 0} | self.waiting
        for request_id, count in record.cached.items():
            if request_id in self.waiting:
                del self.waiting[request_id]
                self.running[request_id] = self.cached[request_id] = count
        for request_id, count in record.scheduled.items():
            if request_id in self.running:
                self.running[request_id] += count
            elif request_id in self.waiting:
                del self.waiting[request_id]
                self.running[request_id] = count
        for request_id, count in record.rejected.items():
            if request_id in self.running:
                self.running[request_id] -= count
        for request_id in record.finished:
            self.waiting.pop(request_id, None)
            self.running.pop(request_id, None)
            self.cached.pop(request_id, None)
        for request_id, blocks in record.allocated.items():
            self.blocks.setdefault(request_id, []).extend(blocks)
        for request_id, blocks in record.freed.items():
            # One step may take a block and give it up, or the other way round: so they are counted.
            gone, kept = Counter(blocks), []
            for block in self.blocks.pop(request_id, []):
                if gone[block]:
                    gone[block] -= 1
                else:
                    kept.append(block)
            if kept:
                self.blocks[request_id] = kept

    def copy(self) -> "EngineState":
        """Another one, which changes by itself."""
        blocks = {request_id: list(owned) for request_id, owned in self.blocks.items()}
        numbers = {name: getattr(self, name) | {} for name in ("waiting", "running", "cached")}
        return replace(self, blocks=blocks, **numbers)


def to_json(item: StepRecord | EngineState) -> str:
    """One line. (`dataclasses.asdict` would copy all of it first: six times the work.)"""
    return json.dumps(vars(item), allow_nan=False)


class Trace:
    """The last steps of one engine, and its state before the first and after the last of them.

    A step that leaves the ring is added to the first state. The last state is added up when a reader
    asks for it: without readers a step costs its record, and later that of the step which leaves.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        num_blocks: int = 0,
        block_size: int = 0,
        state: EngineState | None = None,
    ) -> None:
        """state: of an engine elsewhere, whose later records are given to `keep`."""
        self.capacity = capacity
        self._records: deque[StepRecord] = deque()
        self._next = StepRecord(0, 0.0)
        self._in_step = False
        self._lock = threading.Lock()  # the engine waits for it
        self._looking = threading.Lock()  # taken first where both are; readers wait for it
        self._followers: list[deque[StepRecord]] = []
        state = state or EngineState(num_blocks, block_size)
        self._first = state  # before the oldest record
        self._last = state.copy()  # as it was when a reader last asked

    def restart(self, state: EngineState) -> None:
        """Go on from another state, without the steps until now: some after them are not known."""
        with self._looking, self._lock:
            self._records.clear()
            self._first, self._last = state, state.copy()

    @contextlib.contextmanager
    def step(self) -> Iterator[StepRecord]:
        """Record one step; the record is kept even when the step raises."""
        record, self._in_step, self._may_skip = self._next, True, False
        record.begin = time.perf_counter()
        try:
            yield record
        finally:
            record.end = time.perf_counter()
            self._in_step = False
            if self._may_skip and not record.has_news:
                record.phases.clear()  # the next step is recorded in its place
            else:
                self._next = StepRecord(record.step + 1, 0.0)
                self.keep(record)

    def skip(self) -> None:
        """Do not keep the record of the step under way if nothing has happened in it: an engine that
        waits for a copy looks again and again."""
        self._may_skip = True

    def keep(self, record: StepRecord) -> None:
        """Put a step into the ring."""
        with self._lock:
            self._records.append(record)
            while len(self._records) > self.capacity:
                self._first.apply(self._records.popleft())
            for follower in self._followers:
                follower.append(record)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of the current step; outside of a step nothing is recorded."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._in_step:
                self._next.phases.append((name, begin, time.perf_counter()))

    # What happens between two steps is noted in the second.

    def arrived(self, request_id: str, num_tokens: int) -> None:
        """Note that a request with a prompt of `num_tokens` waits."""
        self._next.arrived[request_id] = num_tokens

    def scheduled(self, request_id: str, num_tokens: int) -> None:
        """Note that the step runs `num_tokens` tokens of a request."""
        self._next.scheduled[request_id] = num_tokens

    def scheduled_all(self, counts: dict[str, int]) -> None:
        """Note how many tokens the step runs of each request: all of them at once."""
        self._next.scheduled = counts

    def rejected(self, request_id: str, num_tokens: int) -> None:
        """Note that `num_tokens` of the drafts that were run for a request did not stay."""
        self._next.rejected[request_id] = num_tokens

    def cached(self, request_id: str, num_tokens: int) -> None:
        """Note that a request joins, or comes back, with `num_tokens` tokens that were found."""
        self._next.cached[request_id] = num_tokens

    def loaded(self, request_id: str, num_tokens: int) -> None:
        """Note that `num_tokens` of a request have come from beyond the device."""
        self._next.loaded[request_id] = num_tokens

    def allocated(self, request_id: str, blocks: list[int]) -> None:
        """Note that a request took blocks."""
        self._next.allocated.setdefault(request_id, []).extend(blocks)

    def freed(self, request_id: str, blocks: list[int]) -> None:
        """Note that a request gave up blocks."""
        self._next.freed.setdefault(request_id, []).extend(blocks)

    def preempted(self, request_id: str) -> None:
        """Note that a running request went back to waiting."""
        self._next.preempted.append(request_id)

    def finished(self, request_id: str, reason: str) -> None:
        """Note that a request ended."""
        self._next.finished[request_id] = reason

    def outputs(self, outputs: Iterable[Any]) -> None:
        """Note the requests that end with these `RequestOutput`s."""
        for output in outputs:
            if output.finish_reason is not None:
                self.finished(output.request_id, output.finish_reason)

    def device(self, step: int, begin: float, end: float) -> None:
        """Note when the device worked on a step that was launched before, in seconds."""
        self._next.device.append((step, begin, end))

    @property
    def last_record(self) -> StepRecord | None:
        """The latest step, None before the first."""
        return self._records[-1] if self._records else None

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

    def catch_up(self, follower: deque[StepRecord]) -> EngineState:
        """Empty a follower's queue; returns the state from which its next record goes on.

        The steps since a reader last asked are added up here: at most the whole ring, while the
        engine goes on. It waits only for the last few of them.
        """
        with self._looking:
            while True:
                with self._lock:
                    records = self._unread()
                    if len(records) <= FEW:
                        for record in records:
                            self._last.apply(record)
                        follower.clear()
                        return self._last.copy()
                for record in records:
                    self._last.apply(record)

    def _unread(self) -> list[StepRecord]:
        """The steps that the last state does not know, oldest first. Needs the lock."""
        if self._last.step < self._first.step:
            self._last = self._first.copy()  # some of them are no longer kept
        newest_first = reversed(self._records)
        unread = itertools.takewhile(lambda record: record.step > self._last.step, newest_first)
        return list(unread)[::-1]

    def lines(self) -> Iterator[str]:
        """The steps kept as lines of JSON: the state before them, then one a step.

        All are of the moment of the first; the engine does not wait for the others to be written.
        """
        with self._lock:
            items = [self._first.copy(), *self._records]
        for item in items:
            yield to_json(item) + "\n"

    def save(self, path: Path) -> None:
        """Write `lines` to a file."""
        with path.open("w") as file:
            file.writelines(self.lines())

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read what `save` wrote. Raises ValueError naming the line."""
        first, *lines = path.read_text().split("\n")[:-1] or [""]
        trace = cls(capacity=max(len(lines), 1))
        try:
            trace._first = EngineState(**json.loads(first))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line 1 is not an engine state: {error}") from error
        trace._last = trace._first.copy()
        for number, line in enumerate(lines, start=2):
            try:
                values = json.loads(line)
                for key, spans in (("phases", values["phases"]), ("device", values.get("device"))):
                    values[key] = [(of, begin, end) for of, begin, end in spans or []]
                record = StepRecord(**values)
                trace._last.apply(record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} line {number} is not a step record: {error}") from error
            trace._records.append(record)
        trace._next = StepRecord(trace._last.step + 1, 0.0)
        return trace

    def states(self) -> Iterator[tuple[StepRecord, EngineState]]:
        """Each step kept, with the state after it (one object, which changes)."""
        with self._lock:
            state, records = self._first.copy(), list(self._records)
        for record in records:
            state.apply(record)
            yield record, state

    def to_perfetto(self) -> dict[str, Any]:
        """The steps as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""
        return to_perfetto(self.records())


CLOCK_ERROR = 1e-5  # seconds by which a GPU's clock may be off


def perfetto_events(records: Iterable[StepRecord]) -> Iterator[dict[str, Any]]:
    """Chrome trace events: tracks of steps, of phases, and of a device's work; in microseconds. Steps
    that overlap on the device, as a pipeline's do, have tracks of their own."""
    ends = [0.0]  # of the device's tracks
    for tid, name in ((1, "steps"), (2, "phases"), (3, "device")):
        yield {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
    for record in records:
        arguments = {"scheduled": record.scheduled, "finished": record.finished}
        spans = [(1, f"step {record.step}", record.begin, record.end, arguments)]
        spans += [(2, name, begin, end, {}) for name, begin, end in record.phases]
        for step, begin, end in record.device:
            free = (i for i, last in enumerate(ends) if last <= begin + CLOCK_ERROR)
            if (track := next(free, len(ends))) == len(ends):
                ends.append(end)
                name = {"name": f"device, step in flight {track + 1}"}
                yield {"ph": "M", "pid": 1, "tid": 3 + track, "name": "thread_name", "args": name}
            ends[track] = end
            spans.append((3 + track, f"step {step}", begin, end, {}))
        for tid, name, begin, end, args in spans:
            times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
            yield {"ph": "X", "pid": 1, "tid": tid, "name": name, "args": args, **times}


def to_perfetto(records: Iterable[StepRecord]) -> dict[str, Any]:
    """A whole Chrome trace, as `json.dump` takes it."""
    return {"traceEvents": list(perfetto_events(records)), "displayTimeUnit": "ms"}


def phase(method: Function) -> Function:
    """Decorate a method of an object that has a `trace`: its calls are phases under its name."""

    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.trace.phase(method.__name__):
            return method(self, *args, **kwargs)

    return timed  # type: ignore[return-value]
