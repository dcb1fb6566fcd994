"""A router in a process of its own, for tests, and looks at it and its replicas."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from common.testing.server import RunningServer

STAND_INS = "common.testing.stand_ins.router"


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.05)


def children(server: RunningServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def engine_process(server: RunningServer, engine: int) -> psutil.Process | None:
    """The process that listens where this engine was last said to be ready, if there is one."""
    said = rf"Engine {engine} is ready (?:again|after .*): http://[\w.]+:(\d+)$"
    ports = re.findall(said, server.output, re.MULTILINE)
    if not ports:
        return None
    for process in children(server):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            for connection in process.net_connections("inet"):
                if connection.status == "LISTEN" and connection.laddr.port == int(ports[-1]):
                    return process
    return None


def health(server: RunningServer) -> dict[str, Any]:
    return httpx.get(f"{server.base_url}/health").json()


@contextlib.contextmanager
def router(*flags: str, module: str = STAND_INS) -> Iterator[RunningServer]:
    server = RunningServer(10, *flags, module=module)
    try:
        server.wait_until_ready()
        yield server
    finally:
        left = children(server) if server.process.poll() is None else []
        server.kill()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
