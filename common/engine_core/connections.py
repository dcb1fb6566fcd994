"""What the core knows of one HTTP process: its two sockets, its state, and how much it has not read."""

import contextlib
import threading
from enum import Enum, auto
from typing import Any

import zmq

from common.engine_core.messages import Message, encoder
from common.metrics import Counts

# Bytes that may wait for one HTTP process: the memory that a process costs which has stopped reading.
MOST_UNREAD = 64 << 20


class State(Enum):
    JOINING = auto()  # a Welcome is under way
    OPEN = auto()  # it is sent every step
    LOST = auto()  # it does not read: it is sent nothing until it sends something


class Connection:
    """The core's message thread reads requests from it; the engine's thread sends it steps."""

    def __init__(self, context: zmq.Context, folder: str) -> None:
        """folder: where the HTTP process has bound both sockets."""
        self.folder, self.state = folder, State.JOINING
        self.requests = context.socket(zmq.PULL)
        self.requests.setsockopt(zmq.RECONNECT_IVL, -1)  # the sockets' files are removed at once
        self.requests.connect(f"ipc://{folder}/requests")
        self.outputs = context.socket(zmq.PUSH)
        # No limit on the number of messages, so a send never waits. `num_unread` counts bytes instead.
        self.outputs.setsockopt(zmq.SNDHWM, 0)
        self.outputs.setsockopt(zmq.LINGER, 0)
        self.outputs.setsockopt(zmq.RECONNECT_IVL, -1)
        self.outputs.connect(f"ipc://{folder}/outputs")
        self.lock = threading.Lock()  # of `outputs`
        self.num_sent = self.num_received = 0  # bytes
        self.num_silent = 0  # checks in a row that found no message from it
        self.ended: list[str] = []  # requests that ended while it was lost
        self.counts: Counts = {}

    @property
    def num_unread(self) -> int:
        return self.num_sent - self.num_received

    def send(self, message: Message) -> None:
        """Nothing is sent to a process that has ended."""
        data = encoder.encode(message)
        with self.lock, contextlib.suppress(zmq.Again):
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
        """Close the output socket; unread messages are dropped."""
        with self.lock:
            self.outputs.close()


def add_counts(parts: list[Counts]) -> Counts:
    total: dict[str, Any] = {}
    for part in parts:
        for name, values in part.items():
            before = total.get(name)
            total[name] = [a + b for a, b in zip(before, values, strict=True)] if before else values
    return total
