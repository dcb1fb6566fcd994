"""Engines and servers in processes of their own.

A fresh process a measurement: nothing that ran before warms a cache, holds memory or has changed a
thread count. Commands are `python -m ...` with JSON on standard input; what a child prints is kept
and shown only when it fails, or with `verbose`.
"""

import collections
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from common.bench import BenchError
from common.bench.core.noise import OtherWork

ROOT = Path(__file__).resolve().parents[3]
ADDRESS = re.compile(r"https?://[\w.\-]+:(?!0\b)\d+")


def part_package(part: int) -> str:
    """The package to import for a part: `part03` where installed, else its folder's name.

    Raises ValueError where there is no such part.
    """
    if importlib.util.find_spec(f"part{part:02d}") is not None:
        return f"part{part:02d}"
    folders = sorted(path.parent.name for path in ROOT.glob(f"part{part:02d}_*/engine.py"))
    if not folders:
        raise ValueError(f"there is no part {part:02d} here")
    return folders[0]


def child_environment() -> dict[str, str]:
    """This environment, with the repository importable and the child's output unbuffered, and
    without a server's key, which the requests sent here would lack."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.pop("ENGINE_API_KEY", None)
    return environment


def run_worker(job: dict[str, Any], timeout: float = 3600, verbose: bool = False) -> dict[str, Any]:
    """Run one job of `common.bench.core.worker` in a fresh process and return its answer.

    Raises BenchError with the child's last line where it fails.
    """
    command = [sys.executable, "-m", "common.bench.core.worker"]
    return run_json(command, job, child_environment(), job["job"], timeout, verbose)


def run_json(
    command: list[str],
    job: dict[str, Any],
    environment: dict[str, str],
    name: str,
    timeout: float = 3600,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run a command that reads a JSON job and writes a JSON answer, and add to that `wall_s`, and
    as `wall_other_cores` who else kept the machine busy meanwhile.

    Raises BenchError with the child's last line where it fails.
    """
    start, others = time.perf_counter(), OtherWork()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        output, errors = child.communicate(json.dumps(job), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} took longer than {timeout:g} s") from None
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode != 0:
        reason = last_line(errors or "") or f"exit status {child.returncode}"
        raise BenchError(f"{name} failed: {reason}")
    wall = time.perf_counter() - start
    return {**json.loads(output), "wall_s": wall, "wall_other_cores": others.cores()}


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Server:
    """A server's process as a context manager.

    `url`, `pid` and `ready_s`, the seconds from the start of the process to the first 200 of
    /health. On leaving, SIGTERM, and SIGKILL to its process group if that takes too long.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str] | None = None,
        timeout: float = 300,
        verbose: bool = False,
    ) -> None:
        """command: prints the server's address once it is known. environment: by default that of a
        child of this process."""
        self.name, self.command = name, command
        self.environment = child_environment() if environment is None else environment
        self.timeout = timeout
        self.verbose = verbose
        self.url = ""
        self.ready_s = 0.0
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self._address = threading.Event()

    @property
    def pid(self) -> int:
        return self._child.pid

    def __enter__(self) -> Self:
        start = time.perf_counter()
        self._child = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
        self._reader.start()
        try:
            self._wait(start + self.timeout)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append(line)
            if self.verbose:
                sys.stderr.write(line)
            if not self._address.is_set() and (match := ADDRESS.search(line)):
                self.url = match.group()
                self._address.set()

    def _wait(self, deadline: float) -> None:
        """Until it has printed its address and /health answers 200."""
        while not (self._address.wait(0.01) and get_status(self.url + "/health") == 200):
            if self._child.poll() is not None:
                self._reader.join(5)
                reason = last_line("".join(self._lines))
                raise BenchError(f"{self.name} ended with {self._child.returncode}: {reason}")
            if time.perf_counter() > deadline:
                missing = "answer /health" if self.url else "print its address"
                raise BenchError(f"{self.name} did not {missing} in {self.timeout:g} s")
            time.sleep(0.005)

    def stop(self) -> None:
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()
        self._reader.join(5)


class PartServer(Server):
    """`python -m partNN.server --port 0`."""

    def __init__(
        self,
        part: int,
        model: str,
        settings: dict[str, Any] | None = None,
        timeout: float = 300,
        verbose: bool = False,
    ) -> None:
        name = f"{part_package(part)}.server"
        flags = ["--model", model, "--port", "0", *as_flags(settings or {})]
        command = [sys.executable, "-m", name, *flags]
        super().__init__(name, command, timeout=timeout, verbose=verbose)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """{"max_model_len": 512, "kv_cache": False} -> --max-model-len 512 --no-kv-cache."""
    flags = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def get_status(url: str, timeout: float = 10) -> int | None:
    """The HTTP status of a GET, or None where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def post_json(url: str, payload: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
    """POST a JSON object and return the JSON answered. Raises BenchError on any failure."""
    body = json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise BenchError(
            f"{url}: {error.code} {error.read(300).decode(errors='replace')}"
        ) from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{url}: {error}") from None
