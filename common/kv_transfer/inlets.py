"""How a sender's KV comes in: what differs between the transports on the receiver's side."""

import os
import socket
import time
from typing import Any

import numpy as np
import torch

from common.kv_transfer import memory
from common.kv_transfer.connection import Connection
from common.kv_transfer.fetching import Transfer
from common.kv_transfer.frames import PAYLOAD_LIMIT
from common.kv_transfer.layout import Layout, copy
from common.kv_transfer.messages import Pieces, Pull, Welcome
from common.kv_transfer.outlets import refuse_other_users
from common.kv_transfer.spans import Read, next_spans, note_read


class Inlet:
    """One peer's."""

    transport = ""
    takes_descriptors = False
    payload_limit = 0  # bytes behind a message

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def connect(self) -> socket.socket:
        """A socket that is connecting. Raises OSError, ValueError."""
        raise NotImplementedError

    def open(self, welcome: Welcome, descriptors: list[int]) -> None:
        """The greeting is over. Takes the descriptors. Raises ValueError."""
        for descriptor in descriptors:
            os.close(descriptor)
        if welcome.transport != self.transport:
            raise ValueError(f"the sender's transport is {welcome.transport}")

    def read(self, transfer: Transfer, connection: Connection) -> Read:
        """Fetch pieces that are ready, as many as take some milliseconds."""
        raise NotImplementedError

    def take(self, transfer: Transfer, message: Pieces, payload: memoryview) -> None:
        """Pieces that the sender has sent. Raises ValueError for what was not asked for."""
        raise ValueError(f"Pieces on a connection of {self.transport}")

    def is_reading(self, transfer: Transfer) -> bool:
        """Whether something that was begun may still write the transfer's blocks."""
        return False

    def close(self) -> None:
        """The connection has ended."""


class ShmInlet(Inlet):
    """Copies out of the sender's memory, once."""

    transport = "shm"
    takes_descriptors = True

    def __init__(self, layout: Layout, name: str) -> None:
        super().__init__(layout)
        if layout.device.type != "cpu":
            raise ValueError("kv_transfer is shm, and the KV cache lies on a GPU")
        self._name = name
        self._maps: list[np.ndarray] = []

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect("\0" + self._name)
            reason = refuse_other_users(sock)
            if reason is not None:
                raise ValueError(reason)
        except (OSError, ValueError):
            sock.close()
            raise
        return sock

    def open(self, welcome: Welcome, descriptors: list[int]) -> None:
        if len(descriptors) != len(self.layout.caches):
            super().open(welcome, descriptors)
            raise ValueError(f"{len(descriptors)} descriptors for {len(self.layout.caches)} caches")
        super().open(welcome, [])
        for descriptor, cache in zip(descriptors, self.layout.caches, strict=True):
            size = welcome.num_blocks * cache[0].numel() * cache.element_size()
            self._maps.append(memory.map_shared(descriptor, size))

    def read(self, transfer: Transfer, connection: Connection) -> Read:
        spans = next_spans(self.layout, transfer)
        begin, num_bytes = time.perf_counter(), 0
        for span in spans:
            theirs = span.sources(self.layout, transfer, self._maps[span.cache].ctypes.data)
            copy(theirs, span.targets(self.layout, transfer), span.num_bytes(self.layout))
            num_bytes += len(theirs) * span.num_bytes(self.layout)
        note_read(transfer, spans)
        return Read(num_bytes, time.perf_counter() - begin, 0.0 if spans else 1.0)

    def close(self) -> None:
        self._maps = []


class TcpInlet(Inlet):
    """Asks once, and takes what comes."""

    transport = "tcp"
    payload_limit = PAYLOAD_LIMIT

    def __init__(self, layout: Layout, host: str, port: int) -> None:
        super().__init__(layout)
        self._host, self._port = host, port

    def connect(self) -> socket.socket:
        return connect_tcp(self._host, self._port)

    def read(self, transfer: Transfer, connection: Connection) -> Read:
        if not transfer.asked and transfer.local:
            transfer.asked = True
            connection.send(Pull(transfer.id, transfer.first, len(transfer.local)))
        return Read(0, 0.0, 1.0)

    def take(self, transfer: Transfer, message: Pieces, payload: memoryview) -> None:
        if message.layer >= transfer.num_layers or transfer.local is None:
            raise ValueError("pieces that were not asked for")
        begin = message.first - transfer.first
        cache, place = self.layout.layers[message.layer]
        piece = self.layout.piece_bytes[cache]
        if begin != transfer.done[message.layer] or len(payload) != message.count * piece:
            raise ValueError(f"{len(payload)} bytes of {message.count} pieces from {message.first}")
        if message.count == 0 or begin + message.count > transfer.available(message.layer):
            raise ValueError(f"{message.count} pieces from {message.first} that are not ready")
        self._write(cache, place, transfer.local[begin : begin + message.count], payload)
        transfer.written(message.layer, begin + message.count)

    def _write(self, cache: int, place: int, blocks: list[int], payload: memoryview) -> None:
        data = np.frombuffer(payload, dtype=np.uint8)
        whole, piece = self.layout.caches[cache], self.layout.piece_bytes[cache]
        if whole.device.type == "cpu":
            sources = data.ctypes.data + piece * np.arange(len(blocks), dtype=np.int64)
            copy(sources, self.layout.places(whole.data_ptr(), cache, place, blocks), piece)
            return
        whole = whole.view(torch.uint8)  # whatever the dtype
        pieces = torch.from_numpy(data.copy()).view(len(blocks), *whole.shape[2:])
        whole[torch.tensor(blocks, device=whole.device), place] = pieces.to(whole.device)
        torch.cuda.current_stream(whole.device).synchronize()


class Inlets:
    """Makes them, for a receiver."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._agent: Any = None  # NIXL's, once it is needed

    def make(self, address: str) -> Inlet:
        """address: a sender's. Raises ValueError."""
        transport, _, rest = address.partition(":")
        if transport == "shm" and rest:
            return ShmInlet(self._layout, rest)
        if transport == "tcp":
            return TcpInlet(self._layout, *split_host(rest))
        if transport == "nixl":
            from common.kv_transfer.nixl_agent import Agent, NixlInlet

            place = split_host(rest)
            self._agent = self._agent or Agent(self._layout)
            return NixlInlet(self._layout, *place, self._agent)
        raise ValueError(f"{address!r} is no address of a sender")

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()


def split_host(text: str) -> tuple[str, int]:
    """Of "host:port" or "[::1]:port". Raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, int(port)


def connect_tcp(host: str, port: int) -> socket.socket:
    """Begins to. host: an address, not a name, which might take seconds to look up. Raises OSError."""
    flags = socket.AI_NUMERICHOST
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.connect(place)
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock
