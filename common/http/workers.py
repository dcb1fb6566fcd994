"""Several HTTP processes in front of one engine core, with one listening socket.

    supervisor --starts--> engine core
        |                    ^ |  ZeroMQ
        '--starts--> HTTP process 0, 1, …    all accept from one socket

The supervisor serves no requests. It restarts an HTTP process that has ended, and kills one that the core
reports as not reading. When the core is lost, the HTTP processes say so at /health. At SIGTERM they finish
their running requests.
"""

import contextlib
import mmap
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, MutableSequence
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from fastapi import FastAPI

from common.distributed.health import Health
from common.engine_core.child import Child, Line, Parent
from common.engine_core.client import RemoteEngine
from common.engine_core.process import CoreProcess
from common.http.app import Seat
from common.http.run import BACKLOG, ServerConfig, announce, bind, exit_once, serve
from common.requests import name_requests

BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 30.0  # before an HTTP process is restarted
STEADY_SECONDS = 60.0  # of life after which earlier deaths are forgotten
GRACE_SECONDS = 10.0  # for HTTP processes to end, beyond their own shutdown timeout


def shared_places(descriptor: int, count: int) -> MutableSequence[int]:
    """A number for each process, in a shared file whose descriptor all have inherited."""
    return memoryview(mmap.mmap(descriptor, 8 * count)).cast("q")  # type: ignore[return-value]


class Worker:
    """One of the HTTP processes, and its successors after a restart."""

    def __init__(self, index: int) -> None:
        self.index, self.num_deaths, self.began = index, 0, 0.0
        self.child: Child | None = None  # None: not started yet, or to be restarted
        self.folder: str | None = None  # of its sockets
        self.is_ready = False


class Supervisor:
    """Starts and watches core and HTTP processes. Every event is a function in a queue, which the main
    thread calls."""

    def __init__(self, package: str, engine: Any, config: ServerConfig, count: int) -> None:
        self.package, self.engine, self.config = package, engine, config
        self.begin, self.status = time.monotonic(), 0
        self.sock = bind(config)
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.memory = tempfile.TemporaryFile()  # noqa: SIM115 -- to the end
        self.memory.truncate(8 * count)
        self.places = shared_places(self.memory.fileno(), count)
        self.workers = [Worker(index) for index in range(count)]
        self.num_started, self.is_ready, self.is_stopping = 0, False, False

    def run(self) -> NoReturn:
        """Serve until SIGTERM or Ctrl+C."""
        signal.signal(signal.SIGTERM, exit_once)
        try:
            module, settings = f"{self.package}.engine_core", asdict(self.engine)
            self.core = CoreProcess(module, settings, self._when(self.lose))
            self.core.health.when_lost(partial(self.events.put, self.tell_all))
            self.sock.listen(BACKLOG)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *got: self.events.put(partial(self.stop, got[0])))
        for worker in self.workers:
            self.start(worker)
        while not self.is_stopping or any(worker.child for worker in self.workers):
            self.events.get()()
        self.core.end()
        sys.exit(self.status)

    def _when(self, handle: Callable[..., None], *first: Any) -> Callable[..., None]:
        """A callback for any thread, which the main thread then runs."""
        return lambda *more: self.events.put(partial(handle, *first, *more))

    def start(self, worker: Worker) -> None:
        if self.is_stopping or self.core.health.problem is not None:
            return
        self.num_started += 1
        worker.began, worker.is_ready = time.monotonic(), False
        job = {
            "engine": asdict(self.engine),
            "server": asdict(self.config),
            "name": f"request-{self.num_started}",
            "index": worker.index,
            "count": len(self.workers),
            "socket": self.sock.fileno(),
            "memory": self.memory.fileno(),
        }
        name, module = f"HTTP process {worker.index}", f"{self.package}.api_server"
        on_line, on_end = self._when(self.hear, worker), self._when(self.bury, worker)
        try:
            worker.child = Child(module, job, name, on_line, on_end, (job["socket"], job["memory"]))
        except OSError as error:  # no memory, or no descriptor: it is tried again
            self.bury(worker, str(error))

    def hear(self, worker: Worker, line: Line) -> None:
        if (folder := line.get("connect")) is not None:
            worker.folder = folder
            self.core.connect(folder)
        if (problem := line.get("problem")) is not None:  # the core may hang: tell the others
            self.core.health.report(problem)
        worker.is_ready |= "ready" in line
        if not self.is_ready and all(worker.is_ready for worker in self.workers):
            self.is_ready = True
            announce(self.sock, self.config, self.begin)

    def bury(self, worker: Worker, reason: str) -> None:
        """An HTTP process has ended: end its requests, free its share of the queue, and restart it."""
        worker.child = None
        if worker.folder is not None:
            self.core.disconnect(worker.folder)
            worker.folder = None
        self.places[worker.index] = 0
        if self.is_stopping:
            return
        if not self.is_ready:
            self.status = f"error: {reason}"
            return self.stop()
        if time.monotonic() - worker.began > STEADY_SECONDS:
            worker.num_deaths = 0
        seconds = min(BACKOFF_SECONDS * 2**worker.num_deaths, MAX_BACKOFF_SECONDS)
        worker.num_deaths += 1
        print(f"{reason}; it starts again in {seconds:g} s", file=sys.stderr, flush=True)
        timer = threading.Timer(seconds, self._when(self.start, worker))
        timer.daemon = True
        timer.start()

    def lose(self, folder: str) -> None:
        """Kill an HTTP process that the core takes as lost: it is stopped, or hangs."""
        for worker in self.workers:
            if worker.folder == folder and worker.child is not None:
                worker.child.kill()

    def tell_all(self) -> None:
        for worker in self.workers:
            if worker.child is not None:
                worker.child.tell(problem=self.core.health.problem)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Let the HTTP processes finish their requests. A second Ctrl+C, or the timer, kills them."""
        if number == signal.SIGINT:
            self.status = 130
        for worker in self.workers:
            if worker.child is not None:
                if self.is_stopping and number != signal.SIGTERM:
                    worker.child.kill()
                elif not self.is_stopping:
                    worker.child.process.terminate()
        if not self.is_stopping:
            self.is_stopping = True
            self.sock.close()
            seconds = self.config.shutdown_timeout + GRACE_SECONDS
            timer = threading.Timer(seconds, self._when(self.stop, signal.SIGKILL))
            timer.daemon = True
            timer.start()


def run_worker(config_class: type, create_app: Callable[..., FastAPI]) -> None:
    """The `main` of an HTTP process that the supervisor has started.

    config_class: the part's EngineConfig. create_app: takes the engine, a ServerConfig and a Seat.
    """
    parent, health = Parent(), Health()
    job = parent.job
    engine, server = config_class(**job["engine"]), ServerConfig(**job["server"])
    name_requests(job["name"])
    seat = Seat(job["index"], shared_places(job["memory"], job["count"]))

    def obey() -> None:
        with contextlib.suppress(EOFError):
            orders = parent.early_orders()
            while True:
                for order in orders:
                    health.report(order["problem"])
                orders = parent.orders()
        os._exit(1)

    health.when_lost(lambda: parent.say(problem=health.problem))
    threading.Thread(target=obey, name="orders", daemon=True).start()

    def build() -> FastAPI:
        remote = RemoteEngine(lambda folder: parent.say(connect=folder), health, engine)
        return create_app(remote, server, seat)

    sock = socket.socket(fileno=job["socket"])
    serve(build, server, sock, lambda: parent.say(ready=True))
