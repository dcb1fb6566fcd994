"""Where ranks meet, and the proof that they are alike before they compute anything together."""

import ctypes
import hashlib
import importlib
import json
import platform
import socket
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch.distributed import FileStore, Store, TCPStore

from common.distributed.health import Health, reason_of

PACKAGES = ("torch", "numpy", "numba", "safetensors", "tokenizers", "transformers")


class LocalStore:
    """A store for the processes of this host: a file in a private folder, so that no port is open."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")  # mode 0700
        self.path = str(Path(self._folder.name) / "store")
        self.store = file_store(self.path, size)

    def close(self) -> None:
        """Once all ranks are connected."""
        self._folder.cleanup()


def file_store(path: str, size: int) -> Store:
    """A store in a file, which every rank makes for itself. It is never destroyed.

    The destructor of a FileStore opens the file twice more, to count. If another process removes the
    folder between these two system calls, it goes on trying for five minutes, and holds the
    interpreter's lock: the rank gives no sign of life, and its engine is given up. Raises ValueError.
    """
    if not Path(path).parent.is_dir():  # for this, too, a FileStore would wait five minutes
        raise ValueError(f"no rendezvous at {path!r}: no such folder")
    store = FileStore(path, size)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
    return store


def open_store(rendezvous: str, rank: int, size: int, timeout: float) -> Store:
    """The store at a path, or at host:port, where rank 0 listens. Raises ValueError."""
    if "/" in rendezvous:
        return file_store(rendezvous, size)
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"rendezvous must be a path or host:port, not {rendezvous!r}")
    limit = timedelta(seconds=timeout)
    try:
        if rank != 0:
            return TCPStore(host, int(port), size, False, limit, wait_for_workers=False)
        # Bound here, to this address alone: left to itself the store listens on all of them.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host.strip("[]"), int(port)), family=family) as server:
            return TCPStore(
                host,
                int(port),
                size,
                True,
                limit,
                wait_for_workers=False,
                master_listen_fd=server.detach(),
            )
    except (RuntimeError, OSError) as error:
        reason = reason_of(error)
        raise ValueError(f"no rendezvous at {rendezvous!r}: {reason}") from None


def meet(
    store: Store,
    rank: int,
    size: int,
    fingerprint: Mapping[str, str],
    *,
    timeout: float,
    health: Health,
) -> None:
    """Wait until every rank has come, and compare all fingerprints with rank 0's.

    Raises ValueError, on every rank, when two differ or a rank does not come within `timeout`
    seconds; RankError when one is known to have died.
    """
    store.set(f"fingerprint/{rank}", json.dumps(fingerprint))
    deadline = time.monotonic() + timeout
    prints = []
    for other in range(size):
        key = f"fingerprint/{other}"
        while not store.check([key]):
            health.check()
            if time.monotonic() > deadline:
                raise ValueError(f"rank {other} of {size} has not come within {timeout:g} s")
            time.sleep(0.01)
        prints.append(json.loads(store.get(key)))
    for other, theirs in enumerate(prints):
        if difference := first_difference(prints[0], theirs):
            name, first, second = difference
            raise ValueError(f"{name} differs: {first} on rank 0, {second} on rank {other}")


def first_difference(
    ours: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """The first field, by name, in which two fingerprints differ, and both values."""
    for name in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if first != second:
            return name, first, second
    return None


def project_fingerprint(package: str) -> dict[str, str]:
    """Versions of Python and of the packages that compute, and a hash over the project's own code:
    all of `common` and of the part's package."""
    prints = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            prints[name] = version(name)
        except PackageNotFoundError:
            prints[name] = "none"
    digest = hashlib.sha256()
    for name in ("common", package):
        folder = Path(importlib.import_module(name).__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{name}/{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    prints["code"] = digest.hexdigest()[:16]
    return prints
