"""An HTTP process's two sockets to the core."""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import zmq

from common.distributed.health import Health
from common.engine_core.messages import Message, encoder, from_core

LOOKS = 0.5  # seconds between two checks, at which a sign of life is sent
MOST_READ = 1 << 20  # bytes; after as many the core is told at once that they are read
MOST_REQUESTS = 10_000  # messages that may wait for the core
LONGEST_PATH = 100  # bytes that fit into a socket's address


class Link:
    """Requests go out from any thread; one thread reads what comes back.

    The sockets are files in a folder that only this user may enter. The folder is removed once the core
    is connected, so no other process can connect later, and no file is left over.
    """

    def __init__(self, connect: Callable[[str], None], health: Health, timeout: float) -> None:
        """connect: makes the core connect to a folder's sockets. health: the core's. timeout: seconds
        of silence after which the core is taken as lost. Raises RankError when it is."""
        self.health, self.most_silent = health, timeout / LOOKS
        self.closing = False
        self.lock = threading.Lock()  # of `requests`
        self.num_received = self.num_told = self.num_silent = 0
        self.next_look = 0.0
        self.on_look: Callable[[], None] = lambda: None
        with private_folder() as folder:
            self.folder = folder
            context = zmq.Context.instance()
            self.requests, self.outputs = context.socket(zmq.PUSH), context.socket(zmq.PULL)
            self.requests.setsockopt(zmq.SNDHWM, MOST_REQUESTS)
            for name in ("requests", "outputs"):
                getattr(self, name).setsockopt(zmq.LINGER, 0)
                getattr(self, name).bind(f"ipc://{folder}/{name}")
            connect(folder)
            while not self.outputs.poll(LOOKS * 1000):
                health.check()

    def send(self, message: Message) -> None:
        """Raises RankError when MOST_REQUESTS messages wait for the core."""
        data = encoder.encode(message)
        with self.lock:
            if self.requests.closed:
                return
            try:
                self.requests.send(data, zmq.NOBLOCK)
            except zmq.Again:
                raise self.health.report("the engine core takes no requests") from None

    def receive(self) -> Iterator[Message]:
        """The core's messages, until `close`. Bytes that are not a message are dropped. `on_look` is
        called every LOOKS seconds and after MOST_READ bytes. Raises RankError when the core is lost."""
        try:
            while not self.closing:
                self.health.check()
                if self.outputs.poll(LOOKS * 1000):
                    data = b"".join(self.outputs.recv_multipart())
                    self.num_silent, self.num_received = 0, self.num_received + len(data)
                    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
                        yield from_core.decode(data)
                if time.monotonic() >= self.next_look:
                    self.next_look = time.monotonic() + LOOKS
                    self._look()
                elif self.num_received - self.num_told > MOST_READ:
                    self.on_look()
        finally:
            self.outputs.close()

    def _look(self) -> None:
        """Counts checks and not seconds: a process that was itself stopped must not blame the core."""
        self.num_silent += 1
        if self.num_silent > self.most_silent:
            seconds = self.num_silent * LOOKS
            raise self.health.report_silence(
                0, f"the engine core has said nothing for {seconds:g} s"
            )
        self.on_look()

    def num_read(self) -> int:
        """Bytes of all messages read so far, to be reported to the core."""
        self.num_told = self.num_received
        return self.num_told

    def close(self) -> None:
        """End `receive` soon. Unsent messages are dropped."""
        self.closing = True
        with self.lock:
            self.requests.close()


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder that only this user may enter, removed afterwards."""
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > LONGEST_PATH - len("/core-12345678/requests"):
        root = "/tmp"
    folder = tempfile.mkdtemp(prefix="core-", dir=root)  # with mode 0700
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
