"""The side that has computed KV: it takes prompts from peers, and says which pieces are final.

The peer reads (shm, nixl) or is sent (tcp) what it asks for, and alone writes its own blocks, so nothing
that is late can land in a block that has been given to another sequence. The sender's part is to hold a
transfer's blocks until the peer has read them, or for `lease` seconds after the last was computed, or after
the peer's last sign that it still reads. What ends a transfer puts it, once, into `released`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.kv_transfer import messages as m
from common.kv_transfer.auth import check_secret, sender_side
from common.kv_transfer.connection import Closed, Connection
from common.kv_transfer.layout import Layout
from common.kv_transfer.ledger import Ledger, Transfer
from common.kv_transfer.loop import Loop
from common.kv_transfer.outlets import make_outlet

logger = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
MAX_CONNECTIONS = 256


@dataclass(frozen=True)
class PrefillRequest:
    """A peer wants this prompt's KV: of its blocks the first `num_blocks`."""

    transfer_id: str
    token_ids: list[int]
    cache_salt: str | None
    num_blocks: int


class Sender:
    """Listens at `address` in a thread of its own. The engine says what is ready."""

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        fingerprint: dict[str, str],
        secret: bytes,
        transport: str,
        host: str | None = None,
        port: int = 0,
        lease: float = 30.0,
        on_prefill: Callable[[PrefillRequest], None],
        on_cancel: Callable[[str], None],
    ) -> None:
        """caches: [num_blocks, num_layers, ...] each; for shm from `allocate_shared`. Layers are counted
        on through the caches. host: where tcp and nixl listen (default: loopback). on_prefill,
        on_cancel: called in the sender's thread; cancel means that the peer no longer wants what is
        not computed yet. Raises ValueError."""
        check_secret(secret)
        if lease <= 0:
            raise ValueError(f"kv_lease is {lease}: it must be positive")
        self._layout = Layout(caches)
        self._secret, self._lease = secret, lease
        self._fingerprint = {**fingerprint, "kv caches": self._layout.describe()}
        self._on_prefill, self._on_cancel = on_prefill, on_cancel
        self._ledger = Ledger(self._layout.num_layers, self._layout.num_blocks, lease)
        self._outlet = make_outlet(transport, self._layout, host, port)
        self.address = self._outlet.address
        self._connections: set[Connection] = set()  # changed by the loop's thread only
        self._loop = Loop("kv sender", self._turn)
        self._loop.watch(self._outlet.socket, False, self._accept)
        self._loop.start()

    # What the engine says.

    def ready(self, transfer_id: str, blocks: list[int], layer: int, num_blocks: int) -> None:
        """Of the transfer's blocks, `blocks` so far, the first `num_blocks` are final in this layer. On a
        GPU: will be, when the current stream has come this far. Nothing happens when the transfer
        has ended; one whose earlier blocks have become others fails."""
        self._ledger.ready(transfer_id, blocks, layer, num_blocks, self._layout.record())
        self._loop.wake()

    def finish(self, transfer_id: str, num_blocks: int) -> None:
        """All is computed: the first `num_blocks` blocks that `ready` has told of are final in all
        layers. The lease begins."""
        self._ledger.finish(transfer_id, num_blocks)
        self._loop.wake()

    def fail(self, transfer_id: str, reason: str) -> None:
        """It will not be computed, or its blocks are lost. The peer is told."""
        self._ledger.fail(transfer_id, reason)
        self._loop.wake()

    def released(self) -> list[str]:
        """Transfers that have ended since the last call, each once: nobody needs their blocks any more."""
        return self._ledger.released()

    def wait(self, seconds: float) -> bool:
        """Until a transfer has ended, or the time is over. Whether one has."""
        return self._ledger.wait(seconds)

    def stats(self) -> dict[str, float]:
        """transfers: that are not over; connections; bytes_sent (tcp only: others read by
        themselves); ended_*: how many transfers were fetched, cancelled, failed, ran out of lease
        (expired) or lost their peer (lost)."""
        more = {"connections": len(self._connections), "bytes_sent": self._outlet.bytes_sent}
        return {**self._ledger.stats(), **more}

    def close(self) -> None:
        """Ends all transfers and connections, and the thread."""
        self._loop.close(self._end_all)

    # Everything below happens in the loop's thread.

    def _turn(self) -> float:
        for connection, message in self._ledger.news():
            self._do(connection, Connection.send, message)
        for connection in list(self._connections):
            self._do(connection, self._check_alive)
            self._do(connection, self._push)
        return self._ledger.seconds_left()

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._outlet.socket.accept()
        except OSError as error:
            logger.warning("kv sender: accept: %s", error)
            time.sleep(0.01)  # no descriptors left, perhaps: the next try is at once
            return
        reason = self._outlet.reason_to_refuse(sock)
        if reason is None and len(self._connections) >= MAX_CONNECTIONS:
            reason = f"there are {MAX_CONNECTIONS} connections already"
        if reason is not None:
            logger.warning("kv sender: a connection is refused: %s", reason)
            sock.close()
            return
        welcome = self._outlet.welcome_with(self._fingerprint, self._lease)
        greeting = sender_side(self._secret, self._fingerprint, welcome)
        given = self._outlet.descriptors
        connection = Connection(sock, m.from_receiver, greeting, gives_descriptors=given)
        connection.greet(payload_limit=0)
        self._connections.add(connection)
        connection.handle = lambda _: self._do(connection, self._listen)
        self._loop.watch(sock, False, connection.handle)

    def _listen(self, connection: Connection) -> None:
        for message, _ in connection.receive():
            self._hear(connection, message)
        self._push(connection)

    def _do(self, connection: Connection, function: Callable[..., object], *args: object) -> None:
        """What goes wrong with a connection ends it, and its transfers, and no others."""
        if connection not in self._connections:
            return
        try:
            function(connection, *args)
        except Closed as end:
            level = logging.INFO if connection.is_open else logging.WARNING
            logger.log(level, "kv sender: a connection ends: %s", end)
            self._drop(connection)
        except Exception:
            logger.exception("kv sender: a connection ends by a fault")
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._loop.forget(connection.socket)
        self._connections.discard(connection)
        connection.close()
        for transfer in self._ledger.of(connection):
            self._end(transfer, "lost")

    def _end(self, transfer: Transfer, outcome: str) -> None:
        if self._ledger.end(transfer, outcome):
            self._on_cancel(transfer.id)

    def _end_all(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._loop.forget(self._outlet.socket)
        self._outlet.close()

    def _check_alive(self, connection: Connection) -> None:
        now = time.monotonic()
        if not connection.is_open and now - connection.began > GREETING_SECONDS:
            raise Closed(f"no greeting within {GREETING_SECONDS:g} s")
        if connection.is_open and now - connection.heard > max(60.0, 2 * self._lease):
            raise Closed("the peer has said nothing for too long")

    def _push(self, connection: Connection) -> None:
        """Send what waits, and for tcp more pieces as long as the socket takes them."""
        connection.flush()
        if self._outlet.pushes and connection.is_open:
            pulled = [t for t in self._ledger.of(connection) if t.pull is not None]
            self._outlet.push(connection, pulled)
        self._loop.watch(connection.socket, connection.num_unsent > 0, connection.handle)

    def _hear(self, connection: Connection, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            connection.send(m.Pong())
        elif isinstance(message, m.Prefill):
            self._begin(connection, message)
        elif isinstance(message, m.Pull | m.Renew | m.Check | m.Cancel):
            transfer = self._ledger.find(connection, message.transfer_id)
            if transfer is not None:
                self._hear_of(transfer, message)
        else:
            raise Closed(f"refused: {type(message).__name__} after the greeting")

    def _begin(self, connection: Connection, message: m.Prefill) -> None:
        reason = self._ledger.begin(connection, message)
        if reason is not None:
            connection.send(m.Failed(message.transfer_id, reason))
            return
        wanted = message.transfer_id, message.token_ids, message.cache_salt, message.num_blocks
        try:
            self._on_prefill(PrefillRequest(*wanted))
        except Exception:
            logger.exception("kv sender: the engine does not take a prompt")
            self._ledger.fail(message.transfer_id, "a fault in the prefill worker")

    def _hear_of(self, transfer: Transfer, message: m.Message) -> None:
        if isinstance(message, m.Cancel):
            self._end(transfer, "cancelled")
        elif isinstance(message, m.Renew):
            self._ledger.renew(transfer)
        elif isinstance(message, m.Check):
            self._ledger.check(transfer)
            self._loop.wake()
        elif isinstance(message, m.Pull):
            if transfer.pull is not None or message.first + message.count > transfer.num_blocks:
                raise Closed(f"refused: a pull of {message.count} blocks from {message.first}")
            transfer.pull = (message.first, message.count)
