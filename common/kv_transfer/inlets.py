"""How a sender's KV comes in: what differs between the transports on the receiver's side."""

import os
import socket

import numpy as np
import torch

from common.kv_transfer import memory
from common.kv_transfer.connection import Connection
from common.kv_transfer.fetching import Transfer
from common.kv_transfer.frames import PAYLOAD_LIMIT
from common.kv_transfer.layout import Layout, copy
from common.kv_transfer.messages import Pieces, Pull, Welcome
from common.kv_transfer.outlets import refuse_other_users

TURN_BYTES = 16 << 20  # copied before the thread looks at its sockets again


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

    def read(self, transfer: Transfer, connection: Connection) -> tuple[int, float]:
        """Fetch pieces that are ready, as many as take some milliseconds. Bytes, and in how many seconds
        there may be more."""
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

    def read(self, transfer: Transfer, connection: Connection) -> tuple[int, float]:
        num_bytes = 0
        while num_bytes < TURN_BYTES:
            copied = self._copy_some(transfer)
            if copied == 0:
                return num_bytes, 1.0
            num_bytes += copied
        return num_bytes, 0.0

    def _copy_some(self, transfer: Transfer) -> int:
        """Whole blocks where all layers are ready, else pieces of the first layer that has some."""
        layers = self.layout.layers
        done, ready = max(transfer.done), min(map(transfer.available, range(len(layers))))
        if done == min(transfer.done) and ready > done:
            count = min(ready - done, max(1, TURN_BYTES // self.layout.block_bytes))
            for cache in range(len(self._maps)):
                num_layers = self.layout.caches[cache].shape[1]
                self._copy(transfer, cache, 0, num_layers, done, done + count)
            for layer in range(len(layers)):
                transfer.written(layer, done + count)
            return count * self.layout.block_bytes
        for layer, (cache, place) in enumerate(layers):
            begin, end = transfer.done[layer], transfer.available(layer)
            if end > begin:
                self._copy(transfer, cache, place, 1, begin, end)
                transfer.written(layer, end)
                return (end - begin) * self.layout.piece_bytes[cache]
        return 0

    def _copy(
        self, transfer: Transfer, cache: int, layer: int, num_layers: int, begin: int, end: int
    ) -> None:
        """Of blocks [begin, end) of the fetch what lies in so many layers from this one on."""
        assert transfer.local is not None
        blocks = transfer.remote[transfer.first + begin : transfer.first + end]
        theirs, ours = self._maps[cache].ctypes.data, self.layout.caches[cache].data_ptr()
        sources = self.layout.places(theirs, cache, layer, blocks)
        targets = self.layout.places(ours, cache, layer, transfer.local[begin:end])
        copy(sources, targets, num_layers * self.layout.piece_bytes[cache])

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

    def read(self, transfer: Transfer, connection: Connection) -> tuple[int, float]:
        if not transfer.asked and transfer.local:
            transfer.asked = True
            connection.send(Pull(transfer.id, transfer.first, len(transfer.local)))
        return 0, 1.0

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
        pieces = torch.from_numpy(data.copy()).view(whole.dtype).view(len(blocks), *whole.shape[2:])
        whole[torch.tensor(blocks, device=whole.device), place] = pieces.to(whole.device)
        torch.cuda.current_stream(whole.device).synchronize()


def make_inlet(address: str, layout: Layout) -> Inlet:
    """address: a sender's. Raises ValueError."""
    transport, _, rest = address.partition(":")
    if transport == "shm" and rest:
        return ShmInlet(layout, rest)
    if transport == "tcp":
        return TcpInlet(layout, *split_host(rest))
    raise ValueError(f"{address!r} is no address of a sender")


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
