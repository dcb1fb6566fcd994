"""Where replicas come from: URLs that are given, or processes on this machine. (Ray's actors are in
`ray_actors.py`.)

A process of ours is told what to run in one line of JSON on its standard input, and lives while that
stays open. So it drains and ends when the router closes the pipe, and also when the router is killed.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from typing import Any, Protocol

READY = re.compile(r"Ready after .*: (http://\S+)$")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ReplicaDied(Exception):
    """A replica has ended by itself."""


class Handle(Protocol):
    """One replica, as its launcher holds it."""

    async def url(self) -> str | None:
        """Where it listens; None while it starts. Raises ReplicaDied."""

    def stop(self) -> None:
        """Let it finish what it runs, and end."""

    async def ended(self) -> None:
        """Return when it has ended."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts replicas. api_key: what they ask for."""

    api_key: str | None

    def launch(self, index: int) -> Handle: ...

    def close(self) -> None:
        """When all replicas have ended."""

    def kill(self) -> None:
        """End all replicas at once, and close."""


class Given:
    """A server that runs already, and is not ours to end."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def url(self) -> str | None:
        return self._url

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    async def ended(self) -> None: ...


class GivenLauncher:
    def __init__(self, urls: tuple[str, ...], api_key: str | None) -> None:
        self.urls, self.api_key = urls, api_key
        self.kv_secret: str | None = None  # that servers share which fetch keys and values

    def launch(self, index: int) -> Given:
        return Given(self.urls[index].rstrip("/"))

    def close(self) -> None: ...

    def kill(self) -> None: ...


class ChildServer:
    """A server in a process of its own: `python -m module`, with a job on its standard input."""

    def __init__(self, module: str, job: dict[str, Any], name: str, env: dict[str, str]) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "ENGINE_API_KEY"}
        self.name, self.address, self.last_error = name, None, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=inherited | env,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl+C is the router's to handle
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):  # it is gone already: `problem` will say so
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        """Its output, line by line: where it listens, what went wrong, and the rest for the user."""
        for line in self.process.stdout:
            line = ANSI.sub("", line).strip()
            if match := READY.match(line):
                self.address = match[1]
            elif line.startswith("error: "):
                self.last_error = line.removeprefix("error: ")
            elif line:
                print(f"[{self.name}] {line}", file=sys.stderr, flush=True)

    def problem(self) -> str | None:
        """How it has ended; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        self._reader.join(1.0)
        if status < 0:
            return f"{self.name} was ended by {signal.Signals(-status).name}"
        return f"{self.name} ended: {self.last_error or f'status {status}'}"

    async def url(self) -> str | None:
        if (problem := self.problem()) is not None:
            raise ReplicaDied(problem)
        return self.address

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    async def ended(self) -> None:
        while self.process.poll() is None:
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End it and what it has started, and take it out of the process table."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stop()


async def cancel(task: "asyncio.Task[None]") -> None:
    """End a task, and wait until it has."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
