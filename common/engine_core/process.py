"""The core's process: how a parent starts it, and what it runs."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from common.distributed.children import process_state
from common.distributed.group import RankError
from common.distributed.health import Health
from common.engine_core.child import Child, Line, Parent
from common.engine_core.serving import END_SECONDS

logger = logging.getLogger(__name__)


class CoreProcess:
    """The core as a child of this process, with which it ends."""

    def __init__(
        self, module: str, settings: Line, on_lost: Callable[[str], None] | None = None
    ) -> None:
        """settings: the engine's. on_lost: given the folder of an HTTP process that does not read;
        without, a warning says that it is this process.

        Raises ValueError, one line, when the core does not start.
        """
        self.health, self.ready = Health(), threading.Event()
        self.on_lost = on_lost or self._warn
        self.child = Child(
            module, {"engine": settings}, "the engine core", self._listen, self._ended
        )
        self.health.state_of = lambda rank: process_state(self.child.process.pid)
        self.health.when_lost(self.child.kill)  # a stopped process would not end by itself
        try:
            while not self.ready.wait(0.1):
                self.health.check()
        except RankError as error:
            raise ValueError(str(error)) from None

    def connect(self, folder: str) -> None:
        self.child.tell(connect=folder)

    def disconnect(self, folder: str) -> None:
        self.child.tell(disconnect=folder)

    def end(self) -> None:
        self.child.end(END_SECONDS)

    def _listen(self, line: Line) -> None:
        if "ready" in line:
            self.ready.set()
        if (folder := line.get("lost")) is not None:
            self.on_lost(folder)

    def _warn(self, folder: str) -> None:
        logger.warning("this process does not read what the engine core sends")

    def _ended(self, reason: str) -> None:
        self.health.report(reason)


def run_core(serve: Callable[[Parent, dict[str, Any]], None]) -> NoReturn:
    """The core's `main`. serve: given the parent and the engine's settings, returns when the parent has
    ended. An error is reported to the parent, and the status is 1. Call it in the main thread."""
    parent = Parent()
    # A signal may reach all processes at once. The parent ends this one, after the running requests.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    status = 1
    try:
        serve(parent, parent.job["engine"])
        status = 0
    except (ValueError, RankError, OSError) as error:
        parent.say(error=str(error).partition("\n")[0])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: threads of gloo or NCCL may wait for ranks that are gone
