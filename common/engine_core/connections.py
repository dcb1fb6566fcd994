"""What the core knows of one HTTP process: its two sockets, its requests, and how much it has not read."""

import threading
from enum import Enum, auto
from typing import Any

import zmq

from common.engine_core.messages import Message, encoder
from common.metrics import Counts

MOST_UNREAD = (
    64 << 20
)  # bytes that may wait for one HTTP process: what it costs while it stands still


class State(Enum):
    JOINING = auto()  # a Welcome is under way
    OPEN = auto()  # it is told of every step
    LOST = auto()  # it does not read: nothing is sent to it until it speaks again


class Connection:
    """Requests are read in the core's thread for messages, steps are sent in the engine's."""

    def __init__(self, context: zmq.Context, folder: str) -> None:
        """folder: where the HTTP process has bound both."""
        self.folder, self.state = folder, State.JOINING
        self.requests = context.socket(zmq.PULL)
        self.requests.connect(f"ipc://{folder}/requests")
        self.outputs = context.socket(zmq.PUSH)
        # No limit of messages, of which sizes differ: `num_unread` counts bytes. So a send never waits.
        self.outputs.setsockopt(zmq.SNDHWM, 0)
        self.outputs.setsockopt(zmq.LINGER, 0)
        self.outputs.connect(f"ipc://{folder}/outputs")
        self.lock = threading.Lock()  # of `outputs`
        self.num_sent = self.num_received = 0  # bytes
        self.num_silent = 0  # looks in a row at which it had said nothing
        self.ended: list[str] = []  # requests that ended while it was lost
        self.counts: Counts = {}

    @property
    def num_unread(self) -> int:
        return self.num_sent - self.num_received

    def send(self, message: Message) -> None:
        data = encoder.encode(message)
        with self.lock:
            if not self.outputs.closed:
                self.outputs.send(data, zmq.NOBLOCK)
                self.num_sent += len(data)

    def receive(self) -> list[bytes] | None:
        """The frames of the next message; None when there is none."""
        try:
            return self.requests.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """What waits to be read is dropped with it."""
        with self.lock:
            self.outputs.close()


def add_counts(parts: list[Counts]) -> Counts:
    total: dict[str, Any] = {}
    for part in parts:
        for name, values in part.items():
            before = total.get(name)
            total[name] = [a + b for a, b in zip(before, values, strict=True)] if before else values
    return total
