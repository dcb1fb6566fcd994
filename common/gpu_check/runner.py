"""Jobs in processes of their own, under time limits, and what becomes of each of their checks."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.bench.core.processes import child_environment
from common.gpu_check.items import Item, failed, not_reached
from common.gpu_check.plan import Job

ERROR_CHARACTERS = 4000  # of what a dead process had said, from its end
STARTUP = 30  # seconds more for what comes before a process's first check: imports, the GPU

Emit = Callable[[Item], None]


@dataclass(frozen=True)
class End:
    """Until when jobs may run, in seconds of `time.monotonic`, and what is said of later ones."""

    at: float
    why: str

    @property
    def left(self) -> float:
        return self.at - time.monotonic()


def run_jobs(jobs: list[Job], end: End, at_once: int = 1) -> Iterator[Item]:
    """The items of jobs, as they come. at_once: processes side by side; one where time is taken."""
    items: queue.Queue[Item | None] = queue.Queue()
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    children: set[Child] = set()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = waiting.get_nowait()
                try:
                    run_job(job, end, items.put, children)
                except Exception:  # whatever it is, the others go on
                    items.put(failed(job["name"], traceback.format_exc()))
        items.put(None)

    num_at_work = min(at_once, len(jobs))
    for _ in range(num_at_work):
        threading.Thread(target=work, daemon=True).start()
    try:
        while num_at_work:
            item = items.get()
            if item is None:
                num_at_work -= 1
            else:
                yield item
    finally:
        for child in list(children):
            child.kill()


def run_job(job: Job, end: End, emit: Emit, children: "set[Child]") -> None:
    """Give every item of a job to `emit`.

    A check that its process does not survive, or that takes longer than the job's `limit` (in each
    process the first one: `first_limit`), has failed; a new process goes on with the next one. The
    checks that the end keeps from being done are not reached.
    """
    names: list[str] | None = None
    num_done = 0
    while names is None or num_done < len(names):
        if end.left < (job["needs"] if names is None else 0):
            for name in [job["name"]] if names is None else names[num_done:]:
                emit(not_reached(name, end.why, end.left))
            return
        child = Child(job | {"skip": num_done}, end)
        children.add(child)
        try:
            progress = child.run(emit)
        finally:
            child.kill()
            children.discard(child)
        if child.names == [] and not names:
            if not job.get("only"):
                emit(failed(job["name"], "there is nothing to check"))
            return
        if not progress:  # it died, or was stopped, before it began
            emit(child.failure(job["name"]))
            return
        names = names or child.names
        num_done += progress


@dataclass(eq=False)
class Child:
    """A process of `common.gpu_check.jobs`."""

    job: Job
    end: End
    names: list[str] | None = None  # of the checks before it
    current: str | None = None  # the check that is being done
    since: float = field(default_factory=time.monotonic)
    num_begun: int = 0
    is_overdue: bool = False

    def __post_init__(self) -> None:
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.gpu_check.jobs"],
            stdin=subprocess.PIPE,  # stays open: the child ends with it
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=child_environment(),
            text=True,
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def run(self, emit: Emit) -> int:
        """Until it ends or is stopped. Returns how many of its checks are done with."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(self.job) + "\n")
            self.process.stdin.flush()
        num_done = 0
        for message in self.messages():
            self.since = time.monotonic()
            if "names" in message:
                self.names = message["names"]
            elif "begins" in message:
                self.current = message["begins"]
                self.num_begun += 1
            else:
                emit(message["item"])
                self.current = None
                num_done += 1
        if self.current is not None:
            emit(self.failure(self.current))
            num_done += 1
        return num_done

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends, or is silent for too long and so is stopped."""
        while True:
            limit = self.job["limit" if self.num_begun > 1 else "first_limit"]
            limit += 0 if self.current else STARTUP
            try:
                timeout = min(self.since + limit, self.end.at) - time.monotonic()
                line = self.lines.get(timeout=max(0.0, timeout))
            except queue.Empty:
                self.is_overdue = True
                return
            if line is None:
                self.process.wait()
                return
            yield json.loads(line)

    def failure(self, name: str) -> Item:
        """What is to be said of a check that it was at when it ended."""
        spent = time.monotonic() - self.since
        if self.is_overdue and self.end.left <= 0:
            why = f"{self.end.why}: stopped after {spent:.0f} s"
            return not_reached(name, why, self.end.left, spent)
        if self.is_overdue:
            return failed(name, f"stopped at its own limit, after {spent:.0f} s", spent)
        self.said.seek(0)
        text = self.said.read()[-ERROR_CHARACTERS:]
        return failed(name, f"exit status {self.process.returncode}\n{text}", spent)

    def kill(self) -> None:
        """End it and its own processes, if it has not ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold on to it
                self.process.wait(10)
