"""How a sender's KV leaves: what differs between the transports on its side."""

import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.kv_transfer import memory
from common.kv_transfer.connection import Connection
from common.kv_transfer.frames import PAYLOAD_LIMIT
from common.kv_transfer.layout import Layout, copy
from common.kv_transfer.messages import Pieces, Welcome

if TYPE_CHECKING:
    from common.kv_transfer.ledger import Transfer

TRANSPORTS = ("shm", "tcp", "nixl")
CHUNK = 1 << 20  # bytes of pieces in a frame, or one piece
BACKLOG = 2 << 20  # bytes that wait for a socket before more pieces are made into frames


class Outlet:
    """A listening socket, and where the KV lies."""

    pushes = False  # pieces go out on the connection
    transport = ""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.descriptors: list[int] = []  # that a peer gets with the welcome
        self.bytes_sent = 0
        self.socket: socket.socket
        self.address: str

    def reason_to_refuse(self, sock: socket.socket) -> str | None:
        """Of a connection that has just come."""
        return None

    def welcome_with(self, fingerprint: dict[str, str], lease: float) -> Callable[[bytes], Welcome]:
        """Makes the greeting's message from a proof."""
        known = {"transport": self.transport, "num_blocks": self.layout.num_blocks, "lease": lease}

        def welcome(proof: bytes) -> Welcome:
            return Welcome(proof, fingerprint, **known, **self.where())

        return welcome

    def where(self) -> dict[str, Any]:
        """More fields of it."""
        return {}

    def push(self, connection: Connection, transfers: list["Transfer"]) -> None:
        raise AssertionError(f"{self.transport} sends no pieces")

    def close(self) -> None:
        self.socket.close()


class ShmOutlet(Outlet):
    """An abstract unix socket with an unguessable name, for processes of this user alone; a peer maps the
    caches, read-only."""

    transport = "shm"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.descriptors = [memory.descriptor_of(cache) for cache in layout.caches]
        name = f"kv-{secrets.token_hex(16)}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind("\0" + name)
        self.socket.listen(64)
        self.socket.setblocking(False)
        self.address = f"shm:{name}"

    def reason_to_refuse(self, sock: socket.socket) -> str | None:
        return refuse_other_users(sock)


class TcpOutlet(Outlet):
    """Pieces in frames with checksums, on a socket that is bound to loopback unless a host is given."""

    pushes = True
    transport = "tcp"

    def __init__(self, layout: Layout, host: str | None, port: int) -> None:
        super().__init__(layout)
        if max(layout.piece_bytes) > PAYLOAD_LIMIT:
            raise ValueError(
                f"kv_transfer is tcp: a block's {max(layout.piece_bytes)} bytes of one layer do not fit"
                f" into a frame of {PAYLOAD_LIMIT}: make block_size smaller"
            )
        self.socket = listen(host, port)
        name = self.socket.getsockname()
        self.address = f"{self.transport}:{join_host(name[0], name[1])}"

    def push(self, connection: Connection, transfers: list["Transfer"]) -> None:
        """Pieces that are ready, of each transfer in turn, as long as the socket takes them."""
        waiting = deque(transfers)
        while waiting and connection.num_unsent < BACKLOG:
            transfer = waiting.popleft()
            if self._push_some(connection, transfer):
                waiting.append(transfer)
                connection.flush()

    def _push_some(self, connection: Connection, transfer: "Transfer") -> bool:
        assert transfer.pull is not None
        first, wanted = transfer.pull
        for layer, (cache, place) in enumerate(self.layout.layers):
            begin = transfer.sent[layer]
            end = min(wanted, transfer.told[layer] - first)
            end = min(end, begin + max(1, CHUNK // self.layout.piece_bytes[cache]))
            if end <= begin:
                continue
            blocks = transfer.blocks[first + begin : first + end]
            payload = self._read(cache, place, blocks)
            transfer.sent[layer] = end
            connection.send(Pieces(transfer.id, layer, first + begin, end - begin), payload)
            self.bytes_sent += len(payload)
            return True
        return False

    def _read(self, cache: int, place: int, blocks: list[int]) -> memoryview:
        """A copy: the blocks may be given away while the frame waits."""
        whole, piece = self.layout.caches[cache], self.layout.piece_bytes[cache]
        if whole.device.type != "cpu":
            pieces = whole.view(torch.uint8)[blocks, place].contiguous()  # whatever the dtype
            return memoryview(pieces.cpu().numpy()).cast("B")
        data = np.empty(len(blocks) * piece, dtype=np.uint8)
        targets = data.ctypes.data + piece * np.arange(len(blocks), dtype=np.int64)
        copy(self.layout.places(whole.data_ptr(), cache, place, blocks), targets, piece)
        return memoryview(data)


class NixlOutlet(Outlet):
    """A control socket as tcp's; a peer's NIXL reads the registered caches."""

    transport = "nixl"

    def __init__(self, layout: Layout, host: str | None, port: int) -> None:
        from common.kv_transfer.nixl_agent import Agent

        super().__init__(layout)
        self._agent = Agent(layout)
        self.socket = listen(host, port)
        name = self.socket.getsockname()
        self.address = f"{self.transport}:{join_host(name[0], name[1])}"

    def where(self) -> dict[str, Any]:
        agent = self._agent
        known = {"agent": agent.description, "addresses": self.layout.addresses}
        return {**known, "device": agent.device}

    def close(self) -> None:
        super().close()
        self._agent.close()


def make_outlet(transport: str, layout: Layout, host: str | None, port: int) -> Outlet:
    """Raises ValueError."""
    if transport == "shm":
        if host is not None or port:
            raise ValueError("kv_transfer is shm, which has neither host nor port")
        return ShmOutlet(layout)
    if transport == "tcp":
        return TcpOutlet(layout, host, port)
    if transport == "nixl":
        return NixlOutlet(layout, host, port)
    raise ValueError(f"kv_transfer is {transport!r}, not one of {', '.join(TRANSPORTS)}")


def listen(host: str | None, port: int) -> socket.socket:
    """Raises ValueError."""
    host = host or "127.0.0.1"
    if host in ("0.0.0.0", "::"):
        raise ValueError(f"kv_host is {host}: give the address at which peers reach this worker")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise ValueError(f"kv_host {host}, kv_port {port}: cannot listen: {error}") from error
    sock.setblocking(False)
    return sock


def join_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refuse_other_users(sock: socket.socket) -> str | None:
    """Why a peer on a unix socket is refused: it runs for another user."""
    form = struct.Struct("3i")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size)
    pid, uid, _ = form.unpack(credentials)
    return None if uid == os.geteuid() else f"process {pid} runs for user {uid}"
