"""Orders of rank 0 to ranks on other hosts: the messages of `control`, in frames, by gloo."""

import contextlib
from typing import Any

import torch
from torch.distributed import Store

from common.distributed.control import Receiver, Sender
from common.distributed.gloo import wait_for
from common.distributed.group import RankError
from common.distributed.health import Health

FRAME = 64  # int64s that gloo sends at once


class GlooSender(Sender):
    """Rank 0 broadcasts with gloo: for ranks on several hosts.

    A broadcast is done when every rank has taken it; `send` does not wait for that.
    """

    def __init__(self, backend: Any, store: Store, timeout: float, health: Health) -> None:
        """backend: gloo. store: where the other ranks count their signs of life."""
        self._backend, self._store = backend, store
        self._pending: list[Any] = []  # broadcasts that some rank has not taken
        self._counts = [0] * backend.size()
        super().__init__(backend.size(), timeout, health)

    def _put(self, message: bytes) -> None:
        self._pending = [work for work in self._pending if not work.is_completed()]
        numbers = torch.frombuffer(bytearray(message), dtype=torch.int64)
        for part in numbers.split(FRAME):
            frame = torch.zeros(FRAME, dtype=torch.int64)
            frame[: len(part)] = part
            try:
                self._pending.append(self._backend.broadcast(frame, 0))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise self.health.report_after_grace(f"another rank is gone ({reason})") from None

    def _put_if_idle(self, message: bytes) -> None:
        if self.health.problem is None and all(work.is_completed() for work in self._pending):
            try:
                self._put(message)
            except RankError:
                return  # the next wait raises it

    def _heard(self, rank: int) -> bool:
        try:
            before, self._counts[rank] = self._counts[rank], self._store.add(f"sign/{rank}", 0)
        except RuntimeError:
            return False  # the store is gone, and its host
        return self._counts[rank] != before

    def _end(self) -> None:
        for work in self._pending[-1:]:
            try:
                wait_for(work, "rank 0 waited to close", min(2.0, self.timeout), Health())
            except RuntimeError:
                break
        self._backend.abort()


class GlooReceiver(Receiver):
    """Another rank's side of the broadcasts."""

    def __init__(self, backend: Any, store: Store, timeout: float, health: Health) -> None:
        self._backend, self._store, self.health = backend, store, health
        super().__init__(timeout)

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
            work = self._backend.broadcast(frame, 0)
            wait_for(work, "no sign of life from rank 0", self.timeout, self.health)
        except RankError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise self.health.report(f"rank 0 is gone ({reason})") from None
        return frame.tolist()

    def _give_sign(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.add(f"sign/{self._backend.rank()}", 1)

    def close(self) -> None:
        super().close()
        self._backend.abort()
