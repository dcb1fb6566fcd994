"""Orders of rank 0 to ranks on other hosts: the messages of `control`, in frames, by gloo."""

import contextlib
from typing import Any

import torch
from torch.distributed import Store

from common.distributed.control import CLOSED, Receiver, Sender
from common.distributed.gloo import is_done, wait_for
from common.distributed.group import RankError
from common.distributed.health import Health, reason_of

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
                reason = reason_of(error)
                raise self.health.report_after_grace(f"another rank is gone ({reason})") from None

    def _give_sign(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.add("sign/0", 1)

    def _heard(self, rank: int) -> bool:
        try:
            before, self._counts[rank] = self._counts[rank], self._store.add(f"sign/{rank}", 0)
        except RuntimeError:
            return False  # the store is gone, and its host
        return self._counts[rank] != before

    def _say_closed(self) -> None:
        with contextlib.suppress(RuntimeError):  # of which a RankError is one
            if self.health.problem is None:
                self._put(CLOSED)
                patience = min(2.0, self.timeout)
                wait_for(self._pending[-1], "rank 0 waited to close", patience, Health())
        self._backend.abort()


class GlooReceiver(Receiver):
    """Another rank's side of the broadcasts. Rank 0's signs of life come by the store: a broadcast
    reaches no rank while another is too busy to take part."""

    def __init__(self, backend: Any, store: Store, timeout: float, health: Health) -> None:
        self._backend, self._store, self.health = backend, store, health
        self._silence, self._count = 0.0, 0  # of rank 0: seconds; its last sign
        super().__init__(timeout)

    def receive(self) -> list[int]:
        length, *numbers = self._frame()
        while len(numbers) < length:
            numbers += self._frame()
        return numbers[:length]

    def _frame(self) -> list[int]:
        frame = torch.empty(FRAME, dtype=torch.int64)
        try:
            work = self._backend.broadcast(frame, 0)
            while not is_done(work):
                self.health.check()
                if self._silence > self.timeout:
                    silence = f"rank 0 has given no sign of life for {self.timeout:g} s"
                    raise self.health.report(silence)
        except RankError:
            raise
        except RuntimeError as error:
            reason = reason_of(error)
            raise self.health.report(f"rank 0 is gone ({reason})") from None
        return frame.tolist()

    def _give_sign(self) -> None:
        before = self._count
        with contextlib.suppress(RuntimeError):  # the store is gone, and its host
            self._store.add(f"sign/{self._backend.rank()}", 1)
            self._count = self._store.add("sign/0", 0)
        self._silence = 0.0 if self._count != before else self._silence + self.period

    def close(self) -> None:
        super().close()
        self._backend.abort()
