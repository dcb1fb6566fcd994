"""A process that this one starts and watches: `python -m module`, with lines of JSON in both directions.

A child's standard input brings its job, later orders, and ends when this process does, however it ends. On
its standard output it says how it fares. What it prints goes to standard error, as this process's does.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

PR_SET_PDEATHSIG = 1
Line = dict[str, Any]


class Child:
    """One such process. on_line and on_end are called in a thread of its own.

    The system kills it when the thread that has started it ends: start it in one that stays.
    """

    def __init__(
        self,
        module: str,
        job: Line,
        name: str,
        on_line: Callable[[Line], None],
        on_end: Callable[[str], None],
        descriptors: Sequence[int] = (),
    ) -> None:
        """name: in `on_end`'s text. descriptors: files that it inherits. Raises OSError."""
        self.name, self.on_line, self.on_end = name, on_line, on_end
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(descriptors),
            start_new_session=True,  # a Ctrl+C in the terminal is for its parent alone
        )
        self.tell(**job, parent=os.getpid())
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()

    def tell(self, **order: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended: `on_end` says so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def end(self, seconds: float) -> None:
        """Let it end by itself, for so long; then kill it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def kill(self) -> None:
        self.process.kill()

    def _read(self) -> None:
        error = ""
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                error = said.get("error", error)
                self.on_line(said)
        self.process.stdout.close()
        status = self.process.wait()
        if status < 0:
            error = f"{self.name} was killed by {signal.Signals(-status).name}"
        self.on_end(error or f"{self.name} ended with status {status}")


class Parent:
    """The process that has started this one, which ends with it."""

    descriptor = 0  # standard input, where orders come

    def __init__(self) -> None:
        """Reads the job. Ends this process where nobody gives it one."""
        sys.stdout.flush()
        self._out = os.dup(1)
        os.set_inheritable(self._out, False)
        os.dup2(2, 1)  # what anything prints
        self._rest = b""
        try:
            lines: list[Line] = []
            while not lines:
                lines = self.orders()
        except (EOFError, ValueError):
            sys.exit("error: a job in JSON is needed on standard input")
        self.job, *self._early = lines
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.job["parent"]:
            os._exit(1)

    def orders(self) -> list[Line]:
        """Wait for what is on standard input: what came of it, at times nothing. Raises EOFError."""
        received = os.read(self.descriptor, 1 << 16)
        if not received:
            raise EOFError
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def early_orders(self) -> list[Line]:
        """What came together with the job."""
        early, self._early = self._early, []
        return early

    def say(self, **line: Any) -> None:
        with contextlib.suppress(OSError):  # it is about to end
            os.write(self._out, json.dumps(line).encode() + b"\n")
