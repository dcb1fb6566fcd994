"""Servers that say "Ready after … s: URL", in processes of their own, for as long as a context lasts."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

from common.bench import BenchError
from common.bench.core.processes import child_environment

READY = re.compile(r"Ready after .*: (http://\S+)$")
STOP_SECONDS = 60.0


@contextlib.contextmanager
def router_process(module: str, *flags: str, verbose: bool = False) -> Iterator[tuple[str, int]]:
    """(base URL, process id) of `python -m module`. Raises BenchError where it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", "0", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        env=child_environment(),
        text=True,
    )
    last = ""
    try:
        for line in process.stdout or ():
            last = line.strip() or last
            if match := READY.match(last):
                yield match[1], process.pid
                break
        else:
            raise BenchError(f"{module} did not start: {last}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
