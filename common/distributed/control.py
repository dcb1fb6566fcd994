"""Orders of rank 0 to the other ranks: lists of integers, and a sign of life when there are none.

A message is its length as an int64, then as many int64s. Length 0: rank 0 has closed the group.
Length -1: a heartbeat. Nothing here is unpickled, and nothing received is more than a number.

The other ranks give signs of life too, from a thread: a rank that computes for minutes is alive, one
that is stopped is noticed even when nothing is to be computed. Silence is counted in heartbeats of
the rank that listens, so that a pause of the whole machine is nobody's silence.
"""

import array
import contextlib
import select
import socket
import threading
import time
from abc import ABC, abstractmethod

from common.distributed.group import RankError
from common.distributed.health import Health

CLOSED = array.array("q", [0]).tobytes()
HEARTBEAT = array.array("q", [-1]).tobytes()
SLICE = 0.1  # seconds of a wait between two looks at whether a rank has died


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

    def expect_signs(self) -> None:  # noqa: B027
        """All ranks are there: from now on rank 0 misses the signs of life of each."""

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
    """Rank 0's side: a thread gives the signs of life, and listens for the others'."""

    def __init__(self, size: int, timeout: float, health: Health) -> None:
        self.timeout, self.health = timeout, health
        self._size = size
        self._silence: dict[int, float] = {}  # seconds, of the ranks that are there
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def send(self, numbers: list[int]) -> None:
        assert numbers, "an empty message would close the group"
        with self._lock:
            self.health.check()
            self._put(array.array("q", [len(numbers), *numbers]).tobytes())

    def expect_signs(self) -> None:
        self._silence = dict.fromkeys(range(1, self._size), 0.0)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with self._lock:
            self._say_closed()

    def _beat(self) -> None:
        period = min(1.0, self.timeout / 4)
        while not self._closed.wait(period):
            with self._lock:
                self._give_sign()
            for rank in range(1, self._size):
                if self._heard(rank):
                    self._silence[rank] = 0.0
                elif rank in self._silence:
                    self._silence[rank] += period
            for rank, silence in self._silence.items():
                if silence > self.timeout:
                    problem = f"rank {rank} gives no sign of life for {self.timeout:g} s"
                    self.health.report_silence(rank, problem)

    @abstractmethod
    def _put(self, message: bytes) -> None:
        """Raises RankError."""

    @abstractmethod
    def _give_sign(self) -> None:
        """Of life. Waits for no rank; raises nothing."""

    @abstractmethod
    def _heard(self, rank: int) -> bool:
        """Whether a rank has given a sign of life since the last question."""

    @abstractmethod
    def _say_closed(self) -> None:
        """To all that still listen, and let go of what is held. Raises nothing."""


class Receiver(Control):
    """Another rank's side: a thread gives signs of life."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.period = timeout, min(1.0, timeout / 4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sign of life", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._closed.wait(self.period):
            self._give_sign()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    @abstractmethod
    def _give_sign(self) -> None:
        """Raises nothing."""


class SocketSender(Sender):
    """Rank 0 writes into one local socket, without a name, for every other rank of its host."""

    def __init__(self, ends: list[socket.socket], timeout: float, health: Health) -> None:
        """ends: of rank 1, 2, …; closed by `close`."""
        self._ends = ends
        for end in ends:
            end.setblocking(False)
        super().__init__(len(ends) + 1, timeout, health)

    def _put(self, message: bytes) -> None:
        for rank, end in enumerate(self._ends, 1):
            self._write(rank, end, message)

    def _write(self, rank: int, end: socket.socket, message: bytes) -> None:
        deadline = time.monotonic() + self.timeout
        while message:
            try:
                message = message[end.send(message) :]
            except BlockingIOError:
                self.health.check()
                if time.monotonic() > deadline:
                    problem = f"rank {rank} has taken no message for {self.timeout:g} s"
                    raise self.health.report_silence(rank, problem) from None
                poll = select.poll()
                poll.register(end, select.POLLOUT)
                poll.poll(1000 * SLICE)
            except OSError:
                raise self.health.report_after_grace(f"rank {rank} is gone") from None

    def _give_sign(self, message: bytes = HEARTBEAT) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):  # full, or the rank is gone: both show elsewhere
                end.send(message)  # 8 bytes are taken whole or not at all

    def _heard(self, rank: int) -> bool:
        try:
            return bool(self._ends[rank - 1].recv(4096))
        except OSError:
            return False

    def _say_closed(self) -> None:
        self._give_sign(CLOSED)
        for end in self._ends:
            end.close()


class SocketReceiver(Receiver):
    """Another rank's end of the socket."""

    def __init__(self, end: socket.socket, timeout: float) -> None:
        self._end = end
        self._end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._unread = b""
        super().__init__(timeout)

    def receive(self) -> list[int]:
        while (length := self._read(1)[0]) < 0:
            pass
        return list(self._read(length))

    def _read(self, count: int) -> array.array:
        while len(self._unread) < 8 * count:
            if not self._poll.poll(1000 * self.timeout):
                raise RankError(f"rank 0 has given no sign of life for {self.timeout:g} s")
            try:
                received = self._end.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                raise RankError("rank 0 is gone")
            self._unread += received
        taken, self._unread = self._unread[: 8 * count], self._unread[8 * count :]
        return array.array("q", taken)

    def _give_sign(self) -> None:
        with contextlib.suppress(OSError):
            self._end.send(b"\0")

    def close(self) -> None:
        super().close()
        self._end.close()
