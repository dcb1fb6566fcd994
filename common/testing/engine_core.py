"""An engine core in a thread of the test's process, so that a test can reach inside; the sockets are real."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from common.distributed.health import Health
from common.engine_core.child import Line, Parent
from common.engine_core.client import RemoteEngine
from common.engine_core.serving import CoreServer
from common.testing.parts import module_of


class PipeParent(Parent):
    """Orders come through a pipe; what is said is kept."""

    def __init__(self) -> None:
        self.descriptor, self.write_end = os.pipe()
        self._rest, self._early = b"", []
        self.said: list[Line] = []

    def tell(self, **order: Any) -> None:
        os.write(self.write_end, json.dumps(order).encode() + b"\n")

    def say(self, **line: Any) -> None:
        self.said.append(line)


class CoreInThread:
    """A part's loop around an engine, and HTTP processes' ends of the line to it."""

    def __init__(self, part: int, engine: Any, timeout: float = 30.0) -> None:
        self.engine, self.parent, self.health = engine, PipeParent(), Health()
        self.core = module_of(part, "engine_core").EngineCore(engine)
        about = module_of(part, "engine_core").describe(engine)
        callbacks = self.core.put, self.core.abort, self.core.stop
        self.server = CoreServer(self.parent, engine, about, timeout, *callbacks)
        self.thread = threading.Thread(target=self.server.run, args=(self.core.run,))
        self.thread.start()
        self.remotes: list[RemoteEngine] = []

    def remote(self) -> RemoteEngine:
        """Another HTTP process's end."""
        remote = RemoteEngine(
            lambda folder: self.parent.tell(connect=folder), self.health, self.engine.config
        )
        self.remotes.append(remote)
        return remote

    def close(self) -> None:
        self.core.stop()
        self.thread.join(30)
        assert not self.thread.is_alive(), "the core did not end"
        for descriptor in (self.parent.descriptor, self.parent.write_end):
            os.close(descriptor)


@contextlib.contextmanager
def core_in_thread(part: int, engine: Any, timeout: float = 30.0) -> Iterator[CoreInThread]:
    core = CoreInThread(part, engine, timeout)
    try:
        yield core
    finally:
        core.close()
