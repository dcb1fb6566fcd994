"""Part 13 under load and faults: in the short form half a minute, a fault every four seconds."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from common.testing import disagg_soak as soak
from common.testing.disagg_workers import DECODE, PREFILL, Workers, cut_connections

WARM_UP = 1.5  # times the memory after the first seconds


@pytest.mark.timeout(240)
@pytest.mark.parametrize("transfer", ["shm"])
def test_half_a_minute_of_load_and_faults(transfer: str) -> None:
    result, found = soak.run_soak(35, 4, 0.8, 0, WARM_UP, "--kv-transfer", transfer)
    assert found == [], result
    assert result["done"]["whole"] > 20 and result["done"]["streamed"] > 20
    assert result["done"]["left"] > 3
    assert_faults(result["faults"], soak.CUT, soak.KILL, soak.STOP)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("transfer", ["shm", "tcp"])
def test_a_quarter_of_an_hour(transfer: str) -> None:
    result, found = soak.run_soak(900, 20, 0.8, 1, 1.1, "--kv-transfer", transfer)
    assert found == [], result
    workers = PREFILL, DECODE
    kinds = soak.CUT, soak.KILL, soak.STOP, soak.STOP_LONG
    assert_faults(result["faults"], *(f"{kind} {worker}" for kind in kinds for worker in workers))


def assert_faults(faults: dict[str, int], *wanted: str) -> None:
    """Faults of these kinds were injected, and most that were to be."""
    missed = sum(count for name, count in faults.items() if name.endswith(soak.NO_WORKER))
    assert missed <= 0.3 * sum(faults.values()), faults
    done = {name for name in faults if not name.endswith(soak.NO_WORKER)}
    assert all(any(name.startswith(kind) for name in done) for kind in wanted), faults


CHILD = """
import socket, sys
kind, address = sys.argv[1:]
if kind == "unix":
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\\0" + address)
else:
    connection = socket.create_connection(("127.0.0.1", int(address)))
print("connected", flush=True)
print("end" if connection.recv(1) == b"" else "data", flush=True)
"""


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_connection_of_another_process_is_cut(kind: str) -> None:
    """The control: else the soak's cuts would show nothing."""
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as listener:
        name = f"soak-{os.getpid()}"
        listener.bind("\0" + name if kind == "unix" else ("127.0.0.1", 0))
        listener.listen()
        address = name if kind == "unix" else str(listener.getsockname()[1])
        command = [sys.executable, "-c", CHILD, kind, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            accepted, _ = listener.accept()
            assert child.stdout is not None and child.stdout.readline() == "connected\n"
            assert cut_connections(psutil.Process(child.pid), psutil.Process()) == 1
            assert child.stdout.readline() == "end\n" and accepted.recv(1) == b""
            accepted.close()


MAPPED = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_a_name_in_shared_memory_is_noticed() -> None:
    """The control: of a process that would leave one."""
    path = f"/dev/shm/soak-{os.getpid()}"
    server: Any = SimpleNamespace(process=SimpleNamespace(pid=os.getpid()))
    workers = Workers(server)
    command = [sys.executable, "-c", MAPPED, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        with subprocess.Popen(command, **pipes) as child:
            assert child.stdout is not None and child.stdout.readline() == "mapped\n"
            workers.note()
        assert path in workers.shared and child.pid in workers.seen
    finally:
        os.unlink(path)


FINE = {
    "errors": [], "left": {"running": 0.0, "kv_usage": 0.0},
    "growth": [{
        "process": "proxy",
        "early": {"files": 20, "threads": 9, "bytes": 100},
        "late": {"files": 21, "threads": 9, "bytes": 105},
    }],
}  # fmt: skip


def test_complaints() -> None:
    assert soak.complaints(FINE, 1.1) == []
    assert soak.complaints(FINE | {"errors": ["x"]}, 1.1)
    assert soak.complaints(FINE | {"left": {"kv_usage": 0.1}}, 1.1)
    for name, value in {"files": 90, "threads": 30, "bytes": 120}.items():
        [one] = FINE["growth"]
        grown = one | {"late": one["late"] | {name: value}}
        assert soak.complaints(FINE | {"growth": [grown]}, 1.1), name
