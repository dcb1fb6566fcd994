"""Jobs in processes of their own, under a time limit, and what becomes of each."""

import json
import os
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


def run_jobs(jobs: list[dict[str, Any]], seconds: float) -> Iterator[Item]:
    """The items of a section's jobs, one job after the other, within so many seconds."""
    deadline = time.monotonic() + seconds
    for job in jobs:
        if time.monotonic() >= deadline:
            yield not_reached(job["name"])
        else:
            yield from run_job(job, deadline)


def run_job(job: dict[str, Any], deadline: float) -> Iterator[Item]:
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
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            os.killpg(child.pid, signal.SIGKILL)

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
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        spent = time.monotonic() - start
        if stopped.is_set():
            yield failed(job["name"], f"stopped by the time limit after {spent:.0f} s", spent)
        elif child.returncode != 0:
            said.seek(0)
            text = said.read()[-ERROR_CHARACTERS:]
            yield failed(job["name"], f"exit status {child.returncode}\n{text}", spent)
