"""Servers for tests: a part's real one in a process of its own, or an app in a thread of this one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from common.http.run import ServerConfig, bind, make_server

START_SECONDS = 120.0  # for a server to be ready, on a busy machine
STOP_SECONDS = 60.0  # for a server to end after SIGTERM


class RunningServer:
    """A server process: its `base_url`, its `output` so far (both streams), and the `process`."""

    def __init__(
        self, part: int, *args: str, env: dict[str, str] | None = None, module: str | None = None
    ) -> None:
        """module: another name of the part's server."""
        module = module or f"part{part:02d}.server"
        command = [sys.executable, "-m", module, "--port", "0", *args]
        kept = {name: value for name, value in os.environ.items() if name != "ENGINE_API_KEY"}
        environment = {**kept, "OMP_NUM_THREADS": "1", **(env or {})}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        self.output = ""
        self.base_url = ""
        self._ready = threading.Event()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._drain, args=(self.process.stdout,))
        self._reader.start()

    def _drain(self, stream: IO[str]) -> None:
        """Read until the end, so that the server is never stuck on a full pipe."""
        for line in stream:
            self.output += line
            if match := re.match(r"Ready after .*: (http://\S+)$", line):
                self.base_url = match[1]
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2])

    def wait_until_ready(self) -> None:
        """Raises AssertionError with the server's output when it does not come up."""
        self._ready.wait(START_SECONDS)
        if not self.base_url:
            self.kill()
            raise AssertionError(f"the server did not start; it said:\n{self.output}")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Ask the server to end; its exit status. Raises AssertionError when it stays."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end; it said:\n{self.output}") from None
        self._reader.join()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def peak_rss(self) -> int:
        """Bytes of memory that the process held at most until now."""
        with open(f"/proc/{self.process.pid}/status") as file:
            [line] = [line for line in file if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def server_process(
    part: int, *args: str, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server that is ready, ended by SIGTERM afterwards."""
    server = RunningServer(part, *args, env=env)
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        if server.process.poll() is None:
            server.kill()


@contextlib.contextmanager
def running_server(part: int, *args: str) -> Iterator[str]:
    """The base URL of a server that is ready, ended by SIGTERM afterwards."""
    with server_process(part, *args) as server:
        yield server.base_url


@contextlib.contextmanager
def serving_thread(app: FastAPI, config: ServerConfig | None = None) -> Iterator[str]:
    """The base URL of an app served in a thread, as `serve` would, so that a test can reach inside.

    Leaving ends it as SIGTERM does, and raises AssertionError when it stays.
    """
    config = config or ServerConfig(port=0)
    AppStatus.disable_automatic_graceful_drain()
    sock = bind(config)
    server = make_server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    thread.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS)
        sock.close()
    assert not thread.is_alive(), "the server did not end"
