"""Jobs in processes of their own, under a time limit, and what becomes of each."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from common.bench.core.processes import child_environment
from common.gpu_check.items import Item, failed, not_reached

ERROR_CHARACTERS = 4000  # of what a dead process had said, from its end


def run_jobs(
    jobs: list[dict[str, Any]], deadline: float, why: str, at_once: int = 1
) -> Iterator[Item]:
    """The items of jobs, as they come, until the deadline, in seconds of `time.monotonic`.

    why: what is said of the jobs that the deadline keeps from starting.
    at_once: processes side by side. One where anything is timed.
    """
    items: queue.Queue[Item | None] = queue.Queue()
    children: set[subprocess.Popen[str]] = set()

    def work(own: list[dict[str, Any]]) -> None:
        for job in own:
            if time.monotonic() >= deadline:
                items.put(not_reached(job["name"], why))
                continue
            for item in run_job(job, deadline, children):
                items.put(item)
        items.put(None)

    shares = [jobs[i::at_once] for i in range(min(at_once, len(jobs)))]
    for share in shares:
        threading.Thread(target=work, args=(share,), daemon=True).start()
    try:
        num_at_work = len(shares)
        while num_at_work:
            item = items.get()
            if item is None:
                num_at_work -= 1
            else:
                yield item
    finally:
        for child in list(children):
            kill(child)


def run_job(
    job: dict[str, Any], deadline: float, children: set[subprocess.Popen[str]]
) -> Iterator[Item]:
    """The items of one job, as they come; one more where its process died or was stopped."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "common.gpu_check.jobs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=child_environment(),
            text=True,
            start_new_session=True,
        )
        children.add(child)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            kill(child)

        timer = threading.Timer(max(0.0, deadline - start), stop)
        timer.start()
        try:
            assert child.stdin is not None and child.stdout is not None
            with child.stdin:
                json.dump(job, child.stdin)
            for line in child.stdout:
                yield json.loads(line)
            child.wait()
        finally:
            timer.cancel()
            kill(child)
            children.discard(child)
        spent = time.monotonic() - start
        if stopped.is_set():
            yield failed(job["name"], f"stopped by the time limit after {spent:.0f} s", spent)
        elif child.returncode != 0:
            said.seek(0)
            text = said.read()[-ERROR_CHARACTERS:]
            yield failed(job["name"], f"exit status {child.returncode}\n{text}", spent)


def kill(child: subprocess.Popen[str]) -> None:
    """End a process and its own, if it has not ended."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
