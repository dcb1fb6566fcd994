"""NIXL: the receiver reads out of the sender's registered memory, by RDMA, NVLink, another process's
memory or TCP, whatever UCX finds between the two.

The control connection is the same as tcp's; what NIXL says of itself goes along in the greeting, as bytes
that only NIXL reads, and only after the sender has proved that it knows the secret. Descriptors are plain
numbers: NIXL's own form of them is a pickle, which is not used. A sender has to progress UCX for its
readers, in a thread of NIXL's that takes a share of a core even when nothing is read.
"""

import logging
import os
import secrets
import time
from typing import Any

import numpy as np

from common.kv_transfer.connection import Closed, Connection
from common.kv_transfer.fetching import Transfer
from common.kv_transfer.inlets import Inlet, connect_tcp
from common.kv_transfer.layout import Layout
from common.kv_transfer.messages import Welcome
from common.kv_transfer.spans import Read, Span, next_spans, note_read

logger = logging.getLogger(__name__)
POLL = 0.0005  # seconds
PATIENCE = 5.0  # seconds: with a read whose sender is lost
GRACE = 0.2  # seconds: what is under way when a connection is closed by force has ended then


class Agent:
    """NIXL's agent of this process, which knows the caches."""

    def __init__(self, layout: Layout) -> None:
        """Raises ValueError where NIXL is not installed, or does not work."""
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl._api import nixl_agent, nixl_agent_config

            config = nixl_agent_config(enable_prog_thread=True, backends=["UCX"])
            self.nixl = nixl_agent(secrets.token_hex(16), config)
            self.memory = "VRAM" if layout.device.type == "cuda" else "DRAM"
            self.device = layout.device.index or 0
            regions = zip(layout.addresses, layout.sizes, strict=True)
            regions = [(address, size, self.device, "") for address, size in regions]
            self._registered = self.nixl.register_memory(regions, self.memory)
            self.description: bytes = self.nixl.get_agent_metadata()
        except ImportError as error:
            command = "pip install --no-deps nixl nixl-cu12"
            raise ValueError(f"kv_transfer is nixl: {error} ({command})") from error
        except Exception as error:  # NIXL has classes of its own
            raise ValueError(f"kv_transfer is nixl, which does not work here: {error}") from error

    def close(self) -> None:
        """No memory is reachable any more."""
        try:
            self.nixl.deregister_memory(self._registered)
        except Exception as error:
            logger.warning("kv transfer: nixl: %s", error)


class NixlInlet(Inlet):
    """One read a transfer is under way; the next takes all that has become ready."""

    transport = "nixl"

    def __init__(self, layout: Layout, host: str, port: int, agent: Agent) -> None:
        super().__init__(layout)
        self._host, self._port, self._agent = host, port, agent
        # Handle, what it reads, bytes, when it began.
        self._reads: dict[str, tuple[Any, list[Span], int, float]] = {}
        self._name: Any = None  # of the sender
        self._closed: float | None = None  # when
        self._welcome: Welcome | None = None

    def connect(self) -> Any:
        return connect_tcp(self._host, self._port)

    def open(self, welcome: Welcome, descriptors: list[int]) -> None:
        super().open(welcome, descriptors)
        if len(welcome.addresses) != len(self.layout.caches):
            raise ValueError(f"{len(welcome.addresses)} addresses of caches")
        self._welcome = welcome
        try:
            self._name = self._agent.nixl.add_remote_agent(welcome.agent)
        except Exception as error:
            raise ValueError(f"nixl does not take the sender's description: {error}") from error

    def read(self, transfer: Transfer, connection: Connection) -> Read:
        if transfer.id in self._reads:
            if self._is_under_way(transfer.id):
                return Read(0, 0.0, POLL)
            _, spans, num_bytes, begin = self._reads.pop(transfer.id)
            note_read(transfer, spans)
            return Read(num_bytes, time.perf_counter() - begin, 0.0)
        spans = next_spans(self.layout, transfer)
        if not spans:
            return Read(0, 0.0, 1.0)
        begin = time.perf_counter()
        theirs, ours = self._descriptors(transfer, spans)
        nixl, memory = self._agent.nixl, self._agent.memory
        try:
            remote, local = (nixl.get_xfer_descs(rows, memory) for rows in (theirs, ours))
            handle = nixl.initialize_xfer("READ", local, remote, self._name, b"")
            self._reads[transfer.id] = handle, spans, int(ours[:, 1].sum()), begin
            nixl.transfer(handle)
        except Exception as error:
            raise Closed(f"nixl: {error}") from error
        return Read(0, 0.0, 0.0)

    def is_reading(self, transfer: Transfer) -> bool:
        if transfer.id in self._reads and not self._has_ended(transfer.id):
            return True
        self._reads.pop(transfer.id, None)
        if self._closed is not None and not self._reads:
            self._forget_sender()
        return False

    def close(self) -> None:
        """The sender is forgotten when the last read has ended: a read that is under way then is no longer
        under NIXL's watch, and might still write."""
        self._closed = time.monotonic()
        if not self._reads:
            self._forget_sender()

    def _has_ended(self, transfer_id: str) -> bool:
        """Well or not. A read from a process that has stopped may never end by itself: closing what it runs
        over ends it."""
        try:
            if not self._is_under_way(transfer_id):
                return True
        except Closed:
            return True
        if self._closed is None or time.monotonic() - self._closed < PATIENCE:
            return False
        logger.warning("kv receiver: nixl: a read does not end; its sender is cut off")
        self._forget_sender()
        time.sleep(GRACE)
        return True

    def _forget_sender(self) -> None:
        name, self._name = self._name, None
        if name is not None:
            try:
                self._agent.nixl.remove_remote_agent(name)
            except Exception as error:
                logger.info("kv receiver: nixl: %s", error)

    def _is_under_way(self, transfer_id: str) -> bool:
        """Raises Closed when the read has failed."""
        handle = self._reads[transfer_id][0]
        try:
            state = self._agent.nixl.check_xfer_state(handle)
            if state == "PROC":
                return True
            self._agent.nixl.release_xfer_handle(handle)
        except Exception as error:
            raise Closed(f"nixl: {error}") from error
        if state != "DONE":
            raise Closed("nixl: the read has failed")
        return False

    def _descriptors(self, transfer: Transfer, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """The sender's pieces and ours, uint64 [count, 3]: address, bytes, device."""
        assert self._welcome is not None
        theirs, ours = [], []
        for span in spans:
            size = span.num_bytes(self.layout)
            base = self._welcome.addresses[span.cache]
            theirs.append(
                _rows(span.sources(self.layout, transfer, base), size, self._welcome.device)
            )
            ours.append(_rows(span.targets(self.layout, transfer), size, self._agent.device))
        return np.concatenate(theirs), np.concatenate(ours)


def _rows(addresses: np.ndarray, num_bytes: int, device: int) -> np.ndarray:
    columns = addresses, np.full_like(addresses, num_bytes), np.full_like(addresses, device)
    return np.stack(columns, axis=1).astype(np.uint64)
