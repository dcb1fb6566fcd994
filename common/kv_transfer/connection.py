"""One socket between a receiver and a sender, greeting included."""

import array
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import msgspec

from common.kv_transfer.auth import Refusal
from common.kv_transfer.frames import FrameError, FrameParser, encode
from common.kv_transfer.messages import Accepted, Message, Refused, Welcome, encoder

READ_LIMIT = 8 << 20  # bytes that one connection may read before others have their turn
UNSENT_LIMIT = 64 << 20  # bytes of messages that wait for a peer that does not read


class Closed(Exception):
    """The connection has ended. The text says why."""


class Connection:
    """Frames in both directions over a non-blocking socket; the loop's thread only."""

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[Any],
        greeting: Generator[Any, Any, Any],
        takes_descriptors: bool = False,
        gives_descriptors: Sequence[int] = (),
    ) -> None:
        """greeting: see `auth`. takes_descriptors: the peer may send descriptors in its greeting.
        gives_descriptors: they go out with our Welcome."""
        sock.setblocking(False)
        self.socket, self._decoder, self._greeting = sock, decoder, greeting
        self._parser = FrameParser()
        self._unsent: deque[memoryview] = deque()
        self.num_unsent = 0  # bytes
        self._number = 0
        self._takes_descriptors, self._gives = takes_descriptors, list(gives_descriptors)
        self.descriptors: list[int] = []  # received
        self.is_open = False  # the greeting is over
        self.welcome: Welcome | None = None  # a sender's
        self.began = self.heard = time.monotonic()
        self.handle: Callable[[int], object]  # what the loop calls

    def greet(self, payload_limit: int) -> None:
        """The first message, where it is ours."""
        self._payload_limit = payload_limit
        message = next(self._greeting)
        if message is not None:
            self.send(message)

    def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        """Queue a frame. Raises Closed when the peer has not read for too long."""
        head = encode(self._number, encoder.encode(message), payload)
        self._number += 1
        for part in (head, payload):
            if part:
                self._unsent.append(memoryview(part))
                self.num_unsent += len(part)
        if self.num_unsent > UNSENT_LIMIT:
            raise Closed("the peer does not read")

    def flush(self) -> int:
        """Send what the socket takes; bytes. Raises Closed."""
        total = 0
        while self._unsent:
            try:
                sent = self.socket.sendmsg(
                    [self._unsent[i] for i in range(min(16, len(self._unsent)))]
                )
            except BlockingIOError:
                break
            except OSError as error:
                raise Closed(str(error)) from error
            total += sent
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.popleft())
            if sent:
                self._unsent[0] = self._unsent[0][sent:]
        self.num_unsent -= total
        return total

    def receive(self) -> Iterator[tuple[Message, memoryview]]:
        """Messages that have come, with their payloads, which are good until the next one. The
        greeting is dealt with here. Raises Closed."""
        for _ in range(READ_LIMIT >> 16):
            space = self._parser.space()
            try:
                count = self._read(space)
            except BlockingIOError:
                return
            except OSError as error:
                raise Closed(str(error)) from error
            if count == 0:
                raise Closed("the peer is gone")
            self.heard = time.monotonic()
            try:
                frame = self._parser.advance(count)
                if frame is None:
                    continue
                message = self._decoder.decode(frame[0])
            except (FrameError, msgspec.DecodeError) as error:
                raise Closed(f"refused: {error}") from error
            if self.is_open and not isinstance(message, Refused):
                yield message, frame[1]
            elif self.is_open:
                raise Closed(f"the peer refuses: {message.reason}")
            else:
                self._greet(message)

    def _greet(self, message: Message) -> None:
        try:
            answer = self._greeting.send(message)
            if isinstance(answer, Welcome) and self._gives:
                self._send_with_descriptors(answer)
            else:
                self.send(answer)
            if isinstance(answer, Accepted):
                self._open(None)
        except StopIteration as end:
            self._open(end.value)
        except Refusal as refusal:
            self._refuse(refusal)

    def _open(self, welcome: Welcome | None) -> None:
        self.is_open, self.welcome = True, welcome
        self._parser.raise_limits(self._payload_limit)

    def _send_with_descriptors(self, message: Message) -> None:
        head = memoryview(encode(self._number, encoder.encode(message)))
        self._number += 1
        assert not self._unsent, "descriptors go out with a message of their own"
        try:
            sent = socket.send_fds(self.socket, [head], self._gives)
        except OSError as error:
            raise Closed(str(error)) from error
        self._unsent.append(head[sent:])
        self.num_unsent += len(head) - sent

    def _refuse(self, refusal: Refusal) -> None:
        if not refusal.told:
            with contextlib.suppress(Closed):
                self.send(Refused(str(refusal)[:1000]))
                self.flush()
        who = "the peer refuses" if refusal.told else "refused"
        raise Closed(f"{who}: {refusal}") from refusal

    def _read(self, space: memoryview) -> int:
        if self.is_open or not self._takes_descriptors:
            return self.socket.recv_into(space)
        room = socket.CMSG_SPACE(8 * array.array("i").itemsize)
        count, ancillary, _, _ = self.socket.recvmsg_into([space], room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) - len(data) % 4
                self.descriptors += array.array("i", data[:whole]).tolist()
        return count

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        self.socket.close()
