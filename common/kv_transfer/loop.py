"""One thread that waits for sockets, and is handed calls by other threads."""

import contextlib
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class Loop:
    """Everything that touches a connection happens in its thread, in turns: sockets that are ready, calls
    that were handed over, then `turn`, which says in how many seconds it wants to be called again.
    """

    def __init__(self, name: str, turn: Callable[[], float]) -> None:
        self._turn = turn
        self._selector = selectors.DefaultSelector()
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._rung = self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """In the loop's thread, soon; after those that were handed over before."""
        self._calls.append((function, arguments))
        self.wake()

    def wake(self) -> None:
        """`turn` is called soon."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):
                self._bell.send(b"\0")

    def watch(self, sock: socket.socket, write: bool, handler: Callable[[int], None]) -> None:
        """Call handler(events) when there is something to read, and if `write` room to write."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        key = self._selector.get_map().get(sock)
        if key is None:
            self._selector.register(sock, events, handler)
        elif key.events != events:
            self._selector.modify(sock, events, handler)

    def forget(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def close(self, last: Callable[[], None]) -> None:
        """Calls `last` in the loop's thread, and ends it."""
        self.call(self._end, last)
        self._thread.join()

    def _end(self, last: Callable[[], None]) -> None:
        self._closed = True
        last()

    def _run(self) -> None:
        seconds = 0.0
        while not self._closed:
            for key, events in self._selector.select(seconds):
                if key.data is None:
                    self._empty_ear()
                else:
                    self._guarded(key.data, events)
            self._rung = False  # before the calls are taken: one that comes now rings again
            while self._calls:
                function, arguments = self._calls.popleft()
                self._guarded(function, *arguments)
            if not self._closed:
                seconds = self._guarded(self._turn)
                seconds = 0.1 if seconds is None else seconds
        self._selector.close()
        self._ear.close()
        self._bell.close()

    def _empty_ear(self) -> None:
        with contextlib.suppress(OSError):
            self._ear.recv(4096)

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The thread outlives a fault: the other transfers need it."""
        try:
            return function(*arguments)
        except Exception:
            logger.exception("kv transfer: a fault in %s", self._thread.name)
            return None
