"""The core's side: HTTP processes join, send requests, get the outputs of these, and leave.

A message thread reads what they send, so that the core also answers during a long step. The engine's
thread sends the steps, and never waits: the bytes that a process has not read are counted. A process with
64 MiB unread, or silent for `timeout` seconds, is taken as lost. Its requests are aborted, and it is sent
nothing more until it sends a message again.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
import zmq

from common.completions import RequestOutput
from common.engine_core.child import Line, Parent
from common.engine_core.connections import MOST_UNREAD, Connection, State, add_counts
from common.engine_core.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Beat,
    Message,
    Status,
    Welcome,
    encode_records,
    from_http,
    step,
)
from common.http.calls import Call
from common.metrics import Counts, EngineMetrics
from common.requests import Request
from common.trace import StepRecord

logger = logging.getLogger(__name__)
LOOKS = 0.5  # seconds between two checks for silent processes
MESSAGES = 64  # read from one process before the next has its turn
RECORDS = 1 << 16  # records that one message may carry: going to sleep runs several steps
END_SECONDS = 20.0  # for the engine to end after its parent


class CoreServer:
    """Stands between the engine's loop and the HTTP processes."""

    def __init__(
        self,
        parent: Parent,
        engine: Any,
        about: dict[str, Any],
        timeout: float,
        put: Callable[[Request | Call], None],
        abort: Callable[[str], None],
        stop: Callable[[], None],
    ) -> None:
        """about: what HTTP processes must know about the engine. put, abort, stop: methods of the
        engine's loop that any thread may call."""
        self.parent, self.engine, self.about = parent, engine, about
        self.put, self.abort, self.stop = put, abort, stop
        self.most_silent = timeout / LOOKS
        self.context = zmq.Context.instance()
        self.connections: dict[str, Connection] = {}  # by folder
        self.owners: dict[str, Connection] = {}  # of running requests, by id
        self.gone: Counts = {}  # the counts of processes that have left
        self.metrics = EngineMetrics(engine.stats, engine.max_model_len)  # counts steps
        self.poller = zmq.Poller()
        self.closing = False
        self.thread = threading.Thread(target=self._serve, name="messages", daemon=True)

    def run(self, loop: Callable[[Callable[..., None]], None]) -> None:
        """Run the engine's loop with `emit` as its argument. Raises what the loop raises."""
        with self.engine.trace.follow(RECORDS) as self.records:
            self.thread.start()
            self.parent.say(ready=True)
            try:
                loop(self.emit)
            finally:
                self.closing = True
                self.thread.join()

    # In the engine's thread.

    def emit(self, record: StepRecord | None, outputs: list[RequestOutput]) -> None:
        """Send each process the steps' records, and the outputs of its own requests."""
        self.metrics.on_step(record)
        own: dict[Connection, list[RequestOutput]] = {}
        for output in outputs:
            get = self.owners.pop if output.finished else self.owners.get
            if (owner := get(output.request_id, None)) is not None:
                own.setdefault(owner, []).append(output)
        records = [self.records.popleft() for _ in range(len(self.records))]
        if not records and not own:
            return
        encoded = encode_records(records)
        for connection in list(self.connections.values()):
            if connection.state is State.OPEN and (records or connection in own):
                connection.send(step(encoded, own.get(connection, ())))
                if connection.num_unread > MOST_UNREAD:
                    self._lose(connection, f"has {connection.num_unread} bytes unread")

    def _welcome(self, connection: Connection) -> None:
        """Send it every step from here on. Requests that ended while it was lost end with an error."""
        self.emit(None, [])  # send the others the steps that its Welcome already contains
        connection.send(Welcome(self.about, self.engine.trace.catch_up(deque())))
        connection.state = State.OPEN
        ended, connection.ended = connection.ended, []
        outputs = [RequestOutput(id, finish_reason="error") for id in ended]
        connection.send(step(encode_records([]), outputs))

    def _lose(self, connection: Connection, why: str) -> None:
        if connection.state is State.OPEN:
            connection.state = State.LOST
            connection.ended += self._drop_requests(connection)
            logger.warning("an HTTP process %s: its requests are aborted", why)
            self.parent.say(lost=connection.folder)

    def _lose_silent(self, connection: Connection) -> None:
        if connection.num_silent > self.most_silent:
            self._lose(connection, f"has said nothing for {connection.num_silent * LOOKS:g} s")

    def _leave(self, connection: Connection) -> None:
        self._drop_requests(connection)
        connection.close()

    def _drop_requests(self, connection: Connection) -> list[str]:
        ids = [id for id, owner in list(self.owners.items()) if owner is connection]
        for request_id in ids:
            self.owners.pop(request_id, None)
            self.abort(request_id)  # queued behind the request, which may still be in the inbox
        return ids

    def _answer(self, connection: Connection, number: int, done: Future[Any]) -> None:
        """Answer an Ask, after all processes have been sent the engine's new state."""
        for other in list(self.connections.values()):
            if other.state is State.OPEN:
                other.send(self._status(other, 0))
        if error := done.exception():
            answer = Answer(number, {}, str(error), type(error).__name__)
        else:
            answer = Answer(number, done.result())
        connection.send(answer)

    # In the message thread.

    def _serve(self) -> None:
        self.poller.register(self.parent.descriptor, zmq.POLLIN)
        next_look = time.monotonic()
        self._obey(self.parent.early_orders())
        while not self.closing:
            ready = dict(self.poller.poll(LOOKS * 1000))
            if self.parent.descriptor in ready and not self._read_orders():
                return
            for connection in list(self.connections.values()):
                if connection.requests in ready:
                    self._read(connection)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOKS
                self._look()

    def _read_orders(self) -> bool:
        """Returns False when the parent has ended."""
        try:
            self._obey(self.parent.orders())
        except EOFError:
            timer = threading.Timer(END_SECONDS, os._exit, [1])
            timer.daemon = True
            timer.start()
            self.stop()
            return False
        return True

    def _obey(self, orders: list[Line]) -> None:
        for order in orders:
            if folder := order.get("connect"):
                connection = self.connections[folder] = Connection(self.context, folder)
                self.poller.register(connection.requests, zmq.POLLIN)
                self.put(Call(partial(self._welcome, connection)))
            elif connection := self.connections.pop(order.get("disconnect"), None):
                self.poller.unregister(connection.requests)
                connection.requests.close()
                self.gone = add_counts([self.gone, connection.counts])
                self.put(Call(partial(self._leave, connection)))

    def _read(self, connection: Connection) -> None:
        """Handle up to MESSAGES of its messages. Bytes that are not a message are dropped."""
        for _ in range(MESSAGES):
            if (frames := connection.receive()) is None:
                return
            try:
                message = from_http.decode(b"".join(frames))
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                logger.warning("dropped what was no message: %s", type(error).__name__)
                continue
            connection.num_silent = 0
            if connection.state is State.LOST:
                connection.state = State.JOINING
                self.put(Call(partial(self._welcome, connection)))
            try:
                self._handle(connection, message)
            except Exception:  # one bad message must not stop the next from being read
                logger.exception("a message of an HTTP process failed")

    def _handle(self, connection: Connection, message: Message) -> None:
        match message:
            case Add(request):
                self.owners[request.request_id] = connection
                self.put(request)
            case Abort(request_id):
                if self.owners.get(request_id) is connection:
                    self.abort(request_id)
            case Beat(number, num_bytes, counts):
                connection.num_received, connection.counts = num_bytes, counts
                connection.send(self._status(connection, number))
            case Ask(number, method, arguments):
                call = Call(partial(getattr(self.engine, method), *arguments))
                call.result.add_done_callback(partial(self._answer, connection, number))
                self.put(call)

    def _status(self, connection: Connection, number: int) -> Status:
        others = [
            other.counts for other in list(self.connections.values()) if other is not connection
        ]
        counts = add_counts([self.gone, self.metrics.counts(), *others])
        return Status(number, self.engine.stats(), counts)

    def _look(self) -> None:
        for connection in list(self.connections.values()):
            connection.num_silent += 1
            if connection.num_silent > self.most_silent and connection.state is State.OPEN:
                self.put(Call(partial(self._lose_silent, connection)))
