"""The side that has computed KV: it takes prompts from peers, and says which pieces are final.

The peer reads (shm, nixl) or is sent (tcp) what it asks for, and alone writes its own blocks, so nothing
that is late can land in a block that has been given to another sequence. The sender's part is to hold a
transfer's blocks until the peer has read them, or for `lease` seconds after the last was computed, or after
the peer's last sign that it still reads. What ends a transfer puts it, once, into `released`.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from common.kv_transfer import messages as m
from common.kv_transfer.auth import check_secret, sender_side
from common.kv_transfer.connection import Closed, Connection
from common.kv_transfer.layout import Layout
from common.kv_transfer.loop import Loop
from common.kv_transfer.outlets import make_outlet

logger = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
MAX_CONNECTIONS = 256
MAX_TRANSFERS = 4096  # of one connection


@dataclass(frozen=True)
class PrefillRequest:
    """A peer wants this prompt's KV: of its blocks the first `num_blocks`."""

    transfer_id: str
    token_ids: list[int]
    cache_salt: str | None
    num_blocks: int


@dataclass(eq=False)
class Transfer:
    """What has been computed and told of one request."""

    id: str
    connection: Connection
    num_blocks: int  # that the peer may ask for
    counts: list[int]  # per layer: leading blocks that are final
    told: list[int]  # the same, as the peer knows it
    sent: list[int]  # per layer: blocks of the pull that have been sent
    blocks: list[int] = field(default_factory=list)
    told_blocks: int = 0
    computed: int | None = None  # blocks in all; None: there may be more to come
    told_computed: bool = False
    checks: bool = False  # the peer has asked whether its blocks were held
    pull: tuple[int, int] | None = None  # first, count
    deadline: float | None = None


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
        self._layout = Layout(caches)
        self._outlet = make_outlet(transport, self._layout, host, port)
        self.address = self._outlet.address
        self._secret = secret
        self._fingerprint = {**fingerprint, "kv caches": self._layout.describe()}
        self._lease, self._on_prefill, self._on_cancel = lease, on_prefill, on_cancel
        self._lock = threading.Lock()  # what follows is the engine's and the loop's
        self._transfers: dict[str, Transfer] = {}
        self._news: dict[str, Transfer] = {}  # the peer does not know all of theirs
        self._failed: list[tuple[Transfer, str]] = []
        self._released: list[str] = []
        self._outcomes: Counter[str] = Counter()
        self._events: list[
            tuple[object, str, int, int]
        ] = []  # a GPU's: not final before they happen
        self._connections: set[Connection] = set()
        self._loop = Loop("kv sender", self._turn)
        self._loop.watch(self._outlet.socket, False, self._accept)
        self._loop.start()

    # What the engine says.

    def ready(self, transfer_id: str, blocks: list[int], layer: int, num_blocks: int) -> None:
        """Of the transfer's blocks, `blocks` so far, the first `num_blocks` are final in this layer. On a
        GPU: will be, when the current stream has come this far. Nothing happens when the transfer
        has ended."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return
            known = len(transfer.blocks)
            if blocks[:known] != transfer.blocks[: len(blocks)]:
                self._fail(transfer, "the prompt has lost its blocks while it was computed")
                return
            transfer.blocks += blocks[known:]
            event = self._outlet.record()
            if event is not None:
                self._events.append((event, transfer_id, layer, num_blocks))
            else:
                self._count(transfer, layer, num_blocks)
        self._loop.wake()

    def finish(self, transfer_id: str, num_blocks: int) -> None:
        """All is computed: the first `num_blocks` blocks are final in all layers. The lease begins."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.computed is not None:
                return
            transfer.computed = min(num_blocks, len(transfer.blocks), transfer.num_blocks)
            transfer.counts = [transfer.computed] * self._layout.num_layers
            transfer.deadline = time.monotonic() + self._lease
            self._news[transfer_id] = transfer
        self._loop.wake()

    def fail(self, transfer_id: str, reason: str) -> None:
        """It will not be computed. The peer is told."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                self._fail(transfer, reason)
        self._loop.wake()

    def released(self) -> list[str]:
        """Transfers that have ended since the last call, each once: nobody reads their blocks any more."""
        with self._lock:
            ended, self._released = self._released, []
        return ended

    def stats(self) -> dict[str, float]:
        """transfers: that are not over; connections; bytes_sent (tcp only: others read by
        themselves); ended_*: how many transfers were fetched, cancelled, failed, ran out of lease
        (expired) or lost their peer (lost)."""
        with self._lock:
            ended = {f"ended_{k}": float(v) for k, v in sorted(self._outcomes.items())}
            live = {"transfers": len(self._transfers), "connections": len(self._connections)}
        return {**live, "bytes_sent": self._outlet.bytes_sent, **ended}

    def close(self) -> None:
        """Ends all transfers and connections, and the thread."""
        self._loop.close(self._end_all)

    # Everything below happens in the loop's thread, but for what is called with the lock held.

    def _count(self, transfer: Transfer, layer: int, num_blocks: int) -> None:
        num_blocks = min(num_blocks, len(transfer.blocks), transfer.num_blocks)
        if num_blocks > transfer.counts[layer]:
            transfer.counts[layer] = num_blocks
            self._news[transfer.id] = transfer

    def _fail(self, transfer: Transfer, reason: str) -> None:
        self._end(transfer, "failed")
        self._failed.append((transfer, reason))

    def _end(self, transfer: Transfer, outcome: str) -> bool:
        """With the lock held. Whether its prompt is still being computed for nothing."""
        del self._transfers[transfer.id]
        self._news.pop(transfer.id, None)
        self._released.append(transfer.id)
        self._outcomes[outcome] += 1
        return transfer.computed is None and outcome != "failed"

    def _end_and_tell(self, transfer: Transfer, outcome: str) -> None:
        with self._lock:
            if self._transfers.get(transfer.id) is not transfer:
                return
            unwanted = self._end(transfer, outcome)
        if unwanted:
            self._on_cancel(transfer.id)

    def _turn(self) -> float:
        now = time.monotonic()
        waits = self._take_events()
        for connection, message in self._take_news(now):
            with self._guard(connection):
                connection.send(message)
        for connection in list(self._connections):
            with self._guard(connection):
                self._check_alive(connection, now)
                self._push(connection)
        with self._lock:
            deadlines = [t.deadline for t in self._transfers.values() if t.deadline is not None]
        return max(0.0, min([waits, *(d - now for d in deadlines)]))

    def _take_events(self) -> float:
        """GPU events that have happened. Returns how soon to look again."""
        with self._lock:
            while self._events and self._events[0][0].query():  # type: ignore[attr-defined]
                _, transfer_id, layer, num_blocks = self._events.pop(0)
                if transfer_id in self._transfers:
                    self._count(self._transfers[transfer_id], layer, num_blocks)
            return 0.0005 if self._events else 1.0

    def _take_news(self, now: float) -> list[tuple[Connection, m.Message]]:
        with self._lock:
            late = [
                t for t in self._transfers.values() if t.deadline is not None and t.deadline < now
            ]
            for transfer in late:
                self._end(transfer, "expired")
                self._failed.append((transfer, f"the lease of {self._lease:g} s is over"))
            told = [(t.connection, m.Failed(t.id, reason[:1000])) for t, reason in self._failed]
            self._failed = []
            for transfer in list(self._news.values()):
                told += [(transfer.connection, message) for message in self._news_of(transfer)]
            self._news = {}
        return told

    def _news_of(self, transfer: Transfer) -> list[m.Message]:
        told: list[m.Message] = []
        layers = [i for i, n in enumerate(transfer.counts) if n > transfer.told[i]]
        blocks = transfer.blocks[transfer.told_blocks : transfer.num_blocks]
        if layers:
            counts = [transfer.counts[i] for i in layers]
            told.append(m.Ready(transfer.id, blocks, layers, counts))
            transfer.told_blocks += len(blocks)
            transfer.told = list(transfer.counts)
        if transfer.computed is not None and not transfer.told_computed:
            transfer.told_computed = True
            told.append(m.Computed(transfer.id, transfer.computed))
        if transfer.computed is not None and transfer.checks:
            self._end(transfer, "fetched")
            told.append(m.Held(transfer.id))
        return told

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self._outlet.socket.accept()
        except OSError as error:
            logger.warning("kv sender: accept: %s", error)
            return
        reason = self._outlet.reason_to_refuse(sock)
        if reason is None and len(self._connections) >= MAX_CONNECTIONS:
            reason = f"there are {MAX_CONNECTIONS} connections already"
        if reason is not None:
            logger.warning("kv sender: a connection is refused: %s", reason)
            sock.close()
            return
        greeting = sender_side(
            self._secret, self._fingerprint, self._outlet.welcome_with(self._fingerprint)
        )
        given = self._outlet.descriptors
        connection = Connection(sock, m.from_receiver, greeting, gives_descriptors=given)
        connection.greet(payload_limit=0)
        with self._lock:
            self._connections.add(connection)
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        def handle(events: int) -> None:
            with self._guard(connection):
                for message, _ in connection.receive():
                    self._hear(connection, message)
                self._push(connection)

        connection.handle = handle  # type: ignore[attr-defined]
        self._loop.watch(connection.socket, False, handle)

    @contextlib.contextmanager
    def _guard(self, connection: Connection):
        """What goes wrong with a connection ends it, and its transfers, and no others."""
        if connection not in self._connections:
            yield
            return
        try:
            yield
        except Closed as end:
            logger.log(
                logging.INFO if connection.is_open else logging.WARNING, "kv sender: %s", end
            )
            self._drop(connection)
        except Exception:
            logger.exception("kv sender: a connection ends by a fault")
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._loop.forget(connection.socket)
        with self._lock:
            self._connections.discard(connection)
            lost = [t for t in self._transfers.values() if t.connection is connection]
        connection.close()
        for transfer in lost:
            self._end_and_tell(transfer, "lost")

    def _end_all(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._loop.forget(self._outlet.socket)
        self._outlet.close()

    def _check_alive(self, connection: Connection, now: float) -> None:
        if not connection.is_open and now - connection.began > GREETING_SECONDS:
            raise Closed(f"no greeting within {GREETING_SECONDS:g} s")
        if connection.is_open and now - connection.heard > max(60.0, 2 * self._lease):
            raise Closed("the peer has said nothing for too long")

    def _push(self, connection: Connection) -> None:
        """Send what waits, and for tcp more pieces as long as the socket takes them."""
        connection.flush()
        if self._outlet.pushes and connection.is_open:
            with self._lock:
                mine = [
                    t for t in self._transfers.values() if t.connection is connection and t.pull
                ]
            self._outlet.push(connection, mine)
        if connection in self._connections:
            write = connection.num_unsent > 0
            self._loop.watch(connection.socket, write, connection.handle)  # type: ignore[attr-defined]

    def _hear(self, connection: Connection, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            connection.send(m.Pong())
        elif isinstance(message, m.Prefill):
            self._begin(connection, message)
        elif isinstance(message, m.Pull | m.Renew | m.Check | m.Cancel):
            with self._lock:
                transfer = self._transfers.get(message.transfer_id)
            if transfer is not None and transfer.connection is connection:
                self._hear_of(transfer, message)
        else:
            raise Closed(f"refused: {type(message).__name__} after the greeting")

    def _begin(self, connection: Connection, message: m.Prefill) -> None:
        layers = self._layout.num_layers
        with self._lock:
            mine = sum(t.connection is connection for t in self._transfers.values())
            reason = None
            if message.transfer_id in self._transfers:
                reason = "its id is in use"
            elif not 0 < message.num_blocks <= self._layout.num_blocks:
                reason = (
                    f"num_blocks is {message.num_blocks}, the pool has {self._layout.num_blocks}"
                )
            elif not message.token_ids:
                reason = "token_ids is empty"
            elif mine >= MAX_TRANSFERS:
                reason = f"there are {MAX_TRANSFERS} transfers on this connection"
            else:
                zeros = ([0] * layers for _ in range(3))
                transfer = Transfer(message.transfer_id, connection, message.num_blocks, *zeros)
                self._transfers[transfer.id] = transfer
        if reason is not None:
            connection.send(m.Failed(message.transfer_id, reason))
            return
        wanted = message.transfer_id, message.token_ids, message.cache_salt, message.num_blocks
        self._on_prefill(PrefillRequest(*wanted))

    def _hear_of(self, transfer: Transfer, message: m.Message) -> None:
        if isinstance(message, m.Cancel):
            self._end_and_tell(transfer, "cancelled")
        elif isinstance(message, m.Pull):
            if transfer.pull is not None or message.first + message.count > transfer.num_blocks:
                raise Closed(f"refused: a pull of {message.count} blocks from {message.first}")
            transfer.pull = (message.first, message.count)
        with self._lock:
            if isinstance(message, m.Renew) and transfer.deadline is not None:
                transfer.deadline = time.monotonic() + self._lease
            if isinstance(message, m.Check):
                transfer.checks = True
                self._news[transfer.id] = transfer
        self._loop.wake()
