"""The processes behind part 13's proxy, as a soak looks at them, and a way to cut their connections."""

import contextlib
import ctypes
import os
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import psutil

from common.testing.router import engine_process
from common.testing.server import RunningServer

PREFILL, DECODE = "prefill", "decode"
PIDFD_GETFD = 438  # the system call's number, the same on all architectures


class Workers:
    """The processes behind a proxy, by their kind, as they are now."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.seen: dict[int, float] = {}  # process ids, ever, and their times of creation
        self.shared: set[str] = set()  # names in /dev/shm that one of them has had in its memory

    def note(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.server.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process.create_time())
                with contextlib.suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self.shared |= set(re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE))

    def find(self, kind: str) -> psutil.Process | None:
        """The worker's process; None while there is none that is ready."""
        self.note()
        with contextlib.suppress(psutil.NoSuchProcess):
            return engine_process(self.server, (PREFILL, DECODE).index(kind))
        return None

    def are_well(self) -> bool:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            told = httpx.get(f"{self.server.base_url}/health", timeout=5).json()
            return told["available"] == told["engines"]
        return False

    def left(self) -> list[int]:
        """Processes that still are."""
        found = []
        for pid, created in self.seen.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
        return found


def cut_connections(one: psutil.Process, other: psutil.Process) -> int:
    """Shut down the sockets of `one` that lead to `other`: both see the end. Returns how many.

    By pidfd_getfd, which takes a copy of another process's file: the process itself does nothing.
    """
    addresses = {tuple(c.laddr) for c in other.net_connections("inet")}
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(one.pid)
    count = 0
    try:
        for name in os.listdir(f"/proc/{one.pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{one.pid}/fd/{name}").startswith("socket:"):
                    continue
                copy = libc.syscall(PIDFD_GETFD, handle, int(name), 0)
                if copy < 0:
                    continue
                with socket.socket(fileno=copy) as found:
                    if leads_to(found, addresses):
                        found.shutdown(socket.SHUT_RDWR)
                        count += 1
    finally:
        os.close(handle)
    return count


def leads_to(found: socket.socket, addresses: set[tuple[Any, ...]]) -> bool:
    """To one of these, or between two processes by a socket without a file."""
    if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    try:
        peer, own = found.getpeername(), found.getsockname()
    except OSError:
        return False
    if found.family == socket.AF_UNIX:
        return any(isinstance(name, bytes) and name.startswith(b"\0") for name in (peer, own))
    return tuple(peer[:2]) in addresses
