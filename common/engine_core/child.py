"""A process that this one starts and watches: `python -m module`, with lines of JSON in both directions.

The parent writes the child's job and later orders to its standard input, which closes when the parent
ends, in whatever way. The child reports on its standard output. What its code prints goes to standard
error instead.
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
    """A child process. on_line and on_end are called in a thread that reads its output.

    The system kills the child when the thread that has started it ends, so start it in a thread that
    stays.
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
        """name: what `on_end`'s text calls the child. descriptors: files that it inherits. Raises
        OSError."""
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
        with contextlib.suppress(OSError, ValueError):  # the child has ended: `on_end` says so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def end(self, seconds: float) -> None:
        """Close its input, so that it ends by itself; kill it after these seconds."""
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
    """The parent, as the child sees it. When the parent ends, so does this process."""

    descriptor = 0  # standard input, where orders come

    def __init__(self) -> None:
        """Reads the job. Ends this process where standard input brings none."""
        sys.stdout.flush()
        self._out = os.dup(1)
        os.set_inheritable(self._out, False)
        os.dup2(2, 1)  # whatever is printed goes to standard error
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
        """Wait for input, and return its whole lines, at times none. Raises EOFError at its end."""
        received = os.read(self.descriptor, 1 << 16)
        if not received:
            raise EOFError
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def early_orders(self) -> list[Line]:
        """The orders that came in the same read as the job."""
        early, self._early = self._early, []
        return early

    def say(self, **line: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has ended, and this process is about to
            os.write(self._out, json.dumps(line).encode() + b"\n")
