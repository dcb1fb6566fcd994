"""Engines in step: those that share their experts run every forward at the same time.

Each engine has requests and a scheduler of its own, and its attention needs no other engine. But in
every layer tokens go to experts wherever they are, so all ranks of all engines must be there. Before
a forward the engines' first ranks tell each other how many tokens they have. Where one has some,
all run; an engine without tokens runs an idle forward, in which its experts serve the others'.

The queue of the device is where forwards are in order, so this is a queue around it, with a thread
that takes part in the exchange while its engine has nothing to do. The scheduler does not know.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from common.distributed.group import Group, RankError
from common.distributed.health import Health

Run = Callable[[], Any]  # what the device does in a forward
Counts = list[int]  # tokens of each engine in a forward
CLOSES = -1  # said in the place of a kind
CLOSE_SECONDS = 2.0
PAUSE = 0.002  # seconds from one exchange to the next while no engine has anything to run
SHORTEST, LONGEST = 0.01, 0.05  # seconds that an engine is waited for which may have more to run


class Queue(Protocol):
    """What gives a device its work, in order."""

    def submit(self, run: Run) -> Any:
        """Returns what `wait()` and `result()` can be asked of."""


@dataclass(frozen=True)
class Job:
    """A forward that waits for its turn. kind: 0, or a higher number for what drafts."""

    run: Run
    num_tokens: int
    kind: int
    launched: Future[Any] = field(default_factory=Future)


class Lockstep:
    """A device queue that runs a forward when all engines run one."""

    def __init__(
        self,
        queue: Queue,
        leaders: Group,
        num_engines: int,
        run_idle: Callable[[int], Any],
        health: Health,
    ) -> None:
        """leaders: the engines' first ranks; another rank follows its own first one, and is alone.
        run_idle: serve the others in a forward of a kind. health: is told what ends the lockstep."""
        self.queue, self.leaders, self.num_engines = queue, leaders, num_engines
        self.run_idle, self.health = run_idle, health
        self.counts: Counts = [0] * num_engines  # in the forward that the device is at
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to exchange. Until then all engines run the same forwards, and need no word."""
        if self.leaders.size > 1:
            self.thread = threading.Thread(target=self._run, name="lockstep", daemon=True)
            self.thread.start()

    def submit(
        self,
        run: Run,
        num_tokens: int,
        kind: int = 0,
        counts: Counts | None = None,
    ) -> Any:
        """Give the device what `run` does, after all before it, as soon as all engines are there.

        counts: where this rank follows, and has been told. Raises RankError when one is lost.
        """
        if self.thread is None:
            return self._launch(run, counts or [num_tokens] * self.num_engines)
        job = Job(run, num_tokens, kind)
        self.jobs.put(job)
        return job.launched.result()

    def aside(self, run: Run) -> Any:
        """Give the device what no other engine takes part in, after all before it."""
        return self.queue.submit(run)

    def _launch(self, run: Run, counts: Counts) -> Any:
        def counted() -> Any:
            self.counts = counts
            return run()

        return self.queue.submit(counted)

    def close(self) -> None:
        """End the thread; the other engines are told."""
        self.jobs.put(None)
        if self.thread is not None:
            self.thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._keep_step()
        except Exception as error:
            lost = self.health.report(str(error))
            for job in iter(self.jobs.get, None):
                job.launched.set_exception(lost)

    def _keep_step(self) -> None:
        job, idle, num_idle = None, None, 0
        gap, launched, patience = 0.0, time.monotonic(), PAUSE
        while True:
            if job is None:
                with contextlib.suppress(Empty):
                    job = self.jobs.get(patience > 0, patience)
                    if job is None:
                        with contextlib.suppress(RankError):  # another may do the same
                            self._exchange(Job(lambda: None, 0, CLOSES))
                        return
            try:
                kind, counts = self._exchange(job)
            except Exception:
                if job is not None:
                    self.jobs.put(job)  # to fail with those that come
                raise
            if job is not None and job.kind == kind:
                self._answer(job, counts)
                now = time.monotonic()
                # Its engine will soon have another. That is waited for, some times as long as from
                # one to the next lately, so that engines run together and not in turns.
                gap, launched = max(now - launched, gap / 2), now
                patience = min(max(2 * gap, SHORTEST), LONGEST)
                job, num_idle = None, 0
                continue
            num_idle += 1
            if not any(counts):
                patience = PAUSE
                continue
            if num_idle > 1:
                patience = 0.0  # it only serves the others: it is there before them
            if idle is not None:
                idle.result()  # raises what went wrong in it
            idle = self._launch(partial(self.run_idle, kind), counts)

    def _exchange(self, job: Job | None) -> tuple[int, Counts]:
        """What kind of forward comes, and each engine's tokens in it; 0 where it has another kind
        or nothing. Drafts go first, since they are few between two forwards of the model."""
        ours = torch.tensor([[job.kind, job.num_tokens] if job else [0, 0]])
        said = self.leaders.all_gather(ours, [1] * self.leaders.size).tolist()
        for engine, (kind, _) in enumerate(said):
            if kind == CLOSES and engine != self.leaders.rank:
                raise RankError(f"engine {engine} of {self.num_engines} has shut down")
        kind = max(kind for kind, _ in said)
        return kind, [num_tokens if of == kind else 0 for of, num_tokens in said]

    def _answer(self, job: Job, counts: Counts) -> None:
        try:
            job.launched.set_result(self._launch(job.run, counts))
        except Exception as error:  # a GPU's launch may fail; the others miss this engine's part
            job.launched.set_exception(error)
