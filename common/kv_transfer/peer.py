"""A receiver's connection to one sender, and the transfers on it. The receiver's thread only."""

import logging
import time
from typing import TYPE_CHECKING

from common.kv_transfer import messages as m
from common.kv_transfer.auth import receiver_side
from common.kv_transfer.connection import Closed, Connection
from common.kv_transfer.fetching import Transfer

if TYPE_CHECKING:
    from common.kv_transfer.receiver import Receiver

logger = logging.getLogger(__name__)
GREETING_SECONDS = 5.0
CLOSED = "closed"  # by ourselves


class Peer:
    """One sender."""

    def __init__(self, receiver: "Receiver", address: str) -> None:
        """Begins to connect. Raises ValueError for an address that is none, OSError."""
        self.receiver, self.address = receiver, address
        self.inlet = receiver.inlets.make(address)
        self.transfers: dict[str, Transfer] = {}
        self._ending: list[tuple[Transfer, str | None]] = []  # a read is still under way
        self._prompts: list[m.Prefill] = []  # until the greeting is over
        self._pinged = self._turned = time.monotonic()
        self._lease = 0.0  # the sender's
        greeting = receiver_side(receiver.secret, receiver.fingerprint)
        takes = self.inlet.takes_descriptors
        self.connection = Connection(self.inlet.connect(), m.from_sender, greeting, takes)
        self.connection.greet(self.inlet.payload_limit)
        self._is_lost = self._is_set_up = False
        receiver.loop.watch(self.connection.socket, True, self._handle)

    def begin(self, transfer: Transfer, token_ids: list[int], cache_salt: str | None) -> None:
        self.transfers[transfer.id] = transfer
        prompt = m.Prefill(transfer.id, token_ids, cache_salt, transfer.num_blocks)
        if (problem := m.problem(prompt)) is not None:  # its own, and not the connection's
            self._end(transfer, f"the prompt cannot be sent: {problem}", tell=False)
            return
        self._prompts.append(prompt)
        self._handle(0)

    def fetch(self, transfer_id: str, first: int, blocks: list[int]) -> None:
        transfer = self.transfers.get(transfer_id)
        if transfer is None or transfer.local is not None:
            return
        if first + len(blocks) > transfer.num_blocks:
            self._end(transfer, f"blocks {first} to {first + len(blocks)} of {transfer.num_blocks}")
            return
        transfer.first, transfer.local = first, blocks
        transfer.note("fetch")
        transfer.progress = transfer.renewed = time.monotonic()
        self._handle(0)

    def cancel(self, transfer_id: str) -> None:
        if transfer_id in self.transfers:
            self._end(self.transfers[transfer_id], "cancelled")

    def turn(self, now: float) -> float:
        """Whatever is due. In how many seconds there is more."""
        self._finish_ending()
        self._excuse_pause(now)
        try:
            waits = self._work(now)
            return min(waits, 0.001) if self._ending else waits
        except Closed as end:
            self.lose(str(end))
        except Exception as error:
            logger.exception("kv receiver: %s: a fault", self.address)
            self.lose(f"a fault: {error}")
        return 1.0

    def lose(self, reason: str) -> None:
        """The connection has ended, and so have its transfers."""
        if self._is_lost:
            return
        self._is_lost = True
        level = logging.INFO if reason == CLOSED else logging.WARNING
        logger.log(level, "kv receiver: %s: %s", self.address, reason)
        self.receiver.loop.forget(self.connection.socket)
        self.connection.close()
        for transfer in list(self.transfers.values()):
            self._end(transfer, f"{self.address}: {reason}")
        self.receiver.lost(self)

    def leave(self) -> bool:
        """After it is lost: whether no read is under way any more, and all of its transfers have ended."""
        self._finish_ending()
        if not self._ending:
            self.inlet.close()
        return not self._ending

    def _handle(self, events: int) -> None:
        if self._is_lost:
            return
        try:
            for message, payload in self.connection.receive():
                self._hear(message, payload)
            self._flush()
        except Closed as end:
            self.lose(str(end))
        except ValueError as error:
            self.lose(f"refused: {error}")

    def _excuse_pause(self, now: float) -> None:
        """A sender is not silent while this process is stopped."""
        pause, self._turned = now - self._turned, now
        if pause > self.receiver.timeout / 2:  # turns are a quarter of it apart at most
            self.connection.heard += pause
            for transfer in self.transfers.values():
                transfer.progress += pause

    def _work(self, now: float) -> float:
        limit = self.receiver.timeout
        connection = self.connection
        self._set_up()
        if not connection.is_open and now - connection.began > min(limit, GREETING_SECONDS):
            raise Closed("no greeting in time")
        if connection.is_open and now - connection.heard > limit:
            raise Closed(f"the sender has said nothing for {limit:g} s")
        if connection.is_open and now - self._pinged > limit / 4:
            self._pinged = now
            connection.send(m.Ping())
        waits = min(limit / 4, 1.0)
        for transfer in list(self.transfers.values()):
            if connection.is_open and transfer.local is not None:
                waits = min(waits, self._advance(transfer, now))
        self._flush()
        return waits

    def _advance(self, transfer: Transfer, now: float) -> float:
        """Fetch more of it. In how many seconds there is more to do."""
        if now - transfer.progress > self.receiver.timeout:
            self._end(transfer, f"no progress for {self.receiver.timeout:g} s")
            return 1.0
        if transfer.checks:
            return 1.0
        read = self.inlet.read(transfer, self.connection)
        self._note_copy(transfer, read.num_bytes, read.seconds)
        if transfer.is_whole:
            transfer.checks = True
            self.connection.send(m.Check(transfer.id))
        elif transfer.progress > transfer.renewed and now - transfer.renewed > self._lease / 4:
            transfer.renewed = now
            self.connection.send(m.Renew(transfer.id))
        return read.waits

    def _note_copy(self, transfer: Transfer, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            transfer.copying += seconds
            self.receiver.copied(self.inlet.transport, num_bytes, seconds)

    def _flush(self) -> None:
        self._set_up()
        if self.connection.is_open:
            for prompt in self._prompts:
                if prompt.transfer_id in self.transfers:
                    self.connection.send(prompt)
            self._prompts = []
        self.connection.flush()
        self.receiver.loop.watch(
            self.connection.socket, self.connection.num_unsent > 0, self._handle
        )

    def _set_up(self) -> None:
        """Once, after the greeting. Raises Closed."""
        if self._is_set_up or not self.connection.is_open:
            return
        welcome = self.connection.welcome
        assert welcome is not None
        self._lease = welcome.lease
        descriptors, self.connection.descriptors = self.connection.descriptors, []
        try:
            self.inlet.open(welcome, descriptors)
        except ValueError as error:
            raise Closed(f"refused: {error}") from error
        self._is_set_up = True

    def _hear(self, message: m.Message, payload: memoryview) -> None:
        """Raises ValueError for what no sender says."""
        if isinstance(message, m.Pong):
            return
        if not isinstance(message, m.Ready | m.Computed | m.Failed | m.Held | m.Pieces):
            raise ValueError(f"{type(message).__name__} after the greeting")
        transfer = self.transfers.get(message.transfer_id)
        if transfer is None:
            return  # cancelled meanwhile
        if isinstance(message, m.Ready):
            assert self.connection.welcome is not None
            if any(b >= self.connection.welcome.num_blocks for b in message.new_blocks):
                raise ValueError(f"blocks {message.new_blocks} are not all in the sender's pool")
            transfer.heard(message.new_blocks, message.layers, message.counts)
        elif isinstance(message, m.Computed):
            transfer.heard_computed(message.num_blocks)
        elif isinstance(message, m.Pieces):
            begin = time.perf_counter()
            self.inlet.take(transfer, message, payload)
            self._note_copy(transfer, len(payload), time.perf_counter() - begin)
        elif isinstance(message, m.Failed):
            self._end(transfer, f"the sender: {message.reason}", tell=False)
        elif not transfer.checks:
            raise ValueError("Held without a question")
        else:
            self._end(transfer, None, tell=False)

    def _end(self, transfer: Transfer, error: str | None, tell: bool = True) -> None:
        del self.transfers[transfer.id]
        self._ending.append((transfer, error))
        if tell and not self._is_lost and self.connection.is_open:
            try:
                self.connection.send(m.Cancel(transfer.id))
            except Closed as end:
                self.lose(str(end))
        self._finish_ending()

    def _finish_ending(self) -> None:
        """Those of which no read is under way are over."""
        waiting = []
        for transfer, error in self._ending:
            if self.inlet.is_reading(transfer):
                waiting.append((transfer, error))
            else:
                self.receiver.ended(transfer, error)
        self._ending = waiting
