"""Orders of rank 0 to the other ranks: lists of integers, and a sign of life when there are none.

A message is its length as an int64, then as many int64s. Length 0: rank 0 has closed the group.
Length -1: a heartbeat. Nothing here is unpickled, and nothing received is more than a number.
"""

import array
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from common.distributed.gloo import wait_for
from common.distributed.group import RankError
from common.distributed.health import Health

CLOSED = array.array("q", [0]).tobytes()
HEARTBEAT = array.array("q", [-1]).tobytes()
SLICE = 0.1  # seconds of a wait between two looks at whether a rank has died
FRAME = 64  # int64s that gloo sends at once


class Control(ABC):
    """What rank 0 tells the others. Rank 0 sends, every other rank receives."""

    def send(self, numbers: list[int]) -> None:
        """Tell every other rank these integers (at least one, each an int64). Returns before they
        are received. Raises RankError when a rank is gone or takes nothing for the timeout."""
        raise AssertionError("only rank 0 sends")

    def receive(self) -> list[int]:
        """The next integers of rank 0; [] when it has closed the group. Waits as long as rank 0
        gives signs of life. Raises RankError when it is gone or silent for the timeout."""
        raise AssertionError("rank 0 receives nothing")

    @abstractmethod
    def close(self) -> None:
        """Rank 0: tell the others that there will be no more. Raises nothing."""


class NoControl(Control):
    """Rank 0 without others."""

    def send(self, numbers: list[int]) -> None:
        """No rank is there to hear it."""

    def close(self) -> None:
        """Nothing is held."""


class Sender(Control):
    """Rank 0's side: a thread gives the signs of life."""

    def __init__(self, timeout: float, health: Health) -> None:
        self.timeout, self.health = timeout, health
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def send(self, numbers: list[int]) -> None:
        assert numbers, "an empty message would close the group"
        with self._lock:
            self.health.check()
            self._put(array.array("q", [len(numbers), *numbers]).tobytes())

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with self._lock:
            self._put_if_idle(CLOSED)
            self._end()

    def _beat(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout / 4)):
            with self._lock:
                self._put_if_idle(HEARTBEAT)

    @abstractmethod
    def _put(self, message: bytes) -> None:
        """Raises RankError."""

    @abstractmethod
    def _put_if_idle(self, message: bytes) -> None:
        """Leaves out ranks that have not taken earlier messages; raises nothing."""

    @abstractmethod
    def _end(self) -> None:
        """Let go of what is held."""


class PipeSender(Sender):
    """Rank 0 writes into one pipe for every other rank of its host."""

    def __init__(self, ends: list[int], timeout: float, health: Health) -> None:
        """ends: file descriptors to write to, of rank 1, 2, …; closed by `close`."""
        self._ends = ends
        for end in ends:
            os.set_blocking(end, False)
        super().__init__(timeout, health)

    def _put(self, message: bytes) -> None:
        for rank, end in enumerate(self._ends, 1):
            self._write(rank, end, message)

    def _write(self, rank: int, end: int, message: bytes) -> None:
        deadline = time.monotonic() + self.timeout
        while message:
            try:
                message = message[os.write(end, message) :]
            except BlockingIOError:
                self.health.check()
                if time.monotonic() > deadline:
                    problem = f"rank {rank} has taken no message for {self.timeout:g} s"
                    raise self.health.report(problem) from None
                poll = select.poll()
                poll.register(end, select.POLLOUT)
                poll.poll(1000 * SLICE)
            except OSError:
                raise self.health.report_after_grace(f"rank {rank} is gone") from None

    def _put_if_idle(self, message: bytes) -> None:
        for end in self._ends:
            try:
                os.write(end, message)  # a pipe takes 8 bytes whole or not at all
            except OSError:
                continue  # full, or the rank is gone: both are noticed elsewhere

    def _end(self) -> None:
        for end in self._ends:
            os.close(end)
        self._ends = []


class PipeReceiver(Control):
    """Another rank's end of the pipe."""

    def __init__(self, end: int, timeout: float) -> None:
        self.end, self.timeout = end, timeout
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._unread = b""

    def receive(self) -> list[int]:
        while (length := self._read(1)[0]) < 0:
            pass
        return list(self._read(length))

    def _read(self, count: int) -> array.array:
        while len(self._unread) < 8 * count:
            if not self._poll.poll(1000 * self.timeout):
                raise RankError(f"rank 0 has given no sign of life for {self.timeout:g} s")
            received = os.read(self.end, 1 << 16)
            if not received:
                raise RankError("rank 0 is gone")
            self._unread += received
        taken, self._unread = self._unread[: 8 * count], self._unread[8 * count :]
        return array.array("q", taken)

    def close(self) -> None:
        os.close(self.end)


class GlooSender(Sender):
    """Rank 0 broadcasts with gloo: for ranks on several hosts.

    A broadcast is done when every rank has taken it; `send` does not wait for that.
    """

    def __init__(self, backend: Any, timeout: float, health: Health) -> None:
        self._backend = backend
        self._pending: list[Any] = []  # broadcasts that some rank has not taken
        super().__init__(timeout, health)

    def _put(self, message: bytes) -> None:
        self._pending = [work for work in self._pending if not work.is_completed()]
        numbers = torch.frombuffer(bytearray(message), dtype=torch.int64)
        for part in numbers.split(FRAME):
            frame = torch.zeros(FRAME, dtype=torch.int64)
            frame[: len(part)] = part
            try:
                self._pending.append(self._backend.broadcast([frame], 0))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise self.health.report_after_grace(f"another rank is gone ({reason})") from None

    def _put_if_idle(self, message: bytes) -> None:
        if self.health.problem is None and all(work.is_completed() for work in self._pending):
            try:
                self._put(message)
            except RankError:
                return  # the next wait raises it

    def _end(self) -> None:
        for work in self._pending[-1:]:
            try:
                wait_for(work, "rank 0 waited to close", min(2.0, self.timeout), Health())
            except RuntimeError:
                break
        self._backend.abort()


class GlooReceiver(Control):
    """Another rank's side of the broadcasts."""

    def __init__(self, backend: Any, timeout: float, health: Health) -> None:
        self._backend, self.timeout, self.health = backend, timeout, health

    def receive(self) -> list[int]:
        while (frame := self._frame())[0] < 0:
            pass
        length, numbers = frame[0], frame[1:]
        while len(numbers) < length:
            numbers += self._frame()
        return numbers[:length]

    def _frame(self) -> list[int]:
        frame = torch.empty(FRAME, dtype=torch.int64)
        try:
            work = self._backend.broadcast([frame], 0)
            wait_for(work, "no sign of life from rank 0", self.timeout, self.health)
        except RankError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise self.health.report(f"rank 0 is gone ({reason})") from None
        return frame.tolist()

    def close(self) -> None:
        self._backend.abort()
