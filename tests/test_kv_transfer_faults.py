"""`common.kv_transfer` when something goes wrong: processes killed and stopped in every state of a transfer,
peers that break the protocol, peers that do not read."""

import contextlib
import importlib.util
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.kv_transfer import Fetched, PrefillRequest, Receiver, Sender, auth, sender
from common.kv_transfer import messages as m
from common.kv_transfer.frames import PAYLOAD_LIMIT, FrameParser, encode
from common.kv_transfer.layout import Layout
from common.testing.kv_worker import SECRET, Nursery, Worker, contents
from common.testing.leaks import open_files

SHAPE = [16, 3, 2, 4, 2, 8]  # blocks, layers, ...
LARGE = [16, 3, 2, 64, 8, 64]  # 786,432 bytes a block: more than sockets hold
KNOWN: dict[str, Any] = {"fingerprint": {"model": "test"}, "secret": SECRET}
THEIRS, OURS = [9, 2, 3, 14], [1, 0, 7, 5]
HAS_NIXL = importlib.util.find_spec("nixl") is not None
NIXL = pytest.param(
    "nixl",
    marks=[pytest.mark.long, pytest.mark.skipif(not HAS_NIXL, reason="nixl is not installed")],
)
TRANSPORTS = ["shm", "tcp", NIXL]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)
    return value


def ended(receiver: Receiver) -> Fetched:
    assert receiver.wait(20)
    (fetched,) = receiver.finished()
    return fetched


# A sender that is killed or stopped.


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with contextlib.closing(Nursery()) as nursery:
        yield nursery


class Fetching:
    """A receiver here, a sender in a process of its own, and a transfer brought to a state."""

    STATES = ("greeting", "requested", "some layers", "all layers", "computed", "fetched in part")

    def __init__(self, nursery: Nursery, transport: str, state: str) -> None:
        shape = LARGE if state == "fetched in part" else SHAPE
        self.worker = Worker(nursery, role="sender", shape=shape, seed=1, transport=transport)
        self.target = torch.zeros(shape)
        self.receiver = Receiver([self.target], timeout=20.0, **KNOWN)
        if state == "greeting":
            self.worker.stop()
        self.receiver.request(self.worker.address, "a", [1, 2], None, 4)
        if state == "greeting":
            return
        assert self.worker.event() == ["prefill", "a", 4]
        if state == "computed":
            self.ready(range(3))
            self.worker.call("finish", "a", 4)
            until(lambda: "computed" in self.transfer.times)
            return
        self.receiver.fetch("a", 0, OURS)
        if state == "some layers":
            self.ready(range(2))
            until(lambda: min(self.transfer.done[:2]) == 4)
        elif state == "all layers":
            self.ready(range(3))
            until(lambda: self.transfer.checks)
        elif state == "fetched in part":
            self.worker.call("ready", "a", THEIRS, 0, 2)
            until(lambda: self.transfer.done[0] == 2)

    @property
    def transfer(self) -> Any:
        return self.receiver._where["a"].transfers["a"]

    def ready(self, layers: range) -> None:
        for layer in layers:
            self.worker.call("ready", "a", THEIRS, layer, 4)

    def close(self) -> None:
        self.receiver.close()
        self.worker.close()


@pytest.mark.parametrize("state", Fetching.STATES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_a_sender_that_is_lost_ends_the_fetch_and_nothing_is_written_later(
    nursery: Nursery, what: str, transport: str, state: str
) -> None:
    with contextlib.closing(Fetching(nursery, transport, state)) as fetching:
        if what == "kill" or state != "greeting":
            getattr(fetching.worker, what)()
        if what == "stop":
            fetching.receiver.timeout = 0.5
        fetched = ended(fetching.receiver)
        fetching.receiver.timeout = 20.0
        assert fetched.num_blocks == 0 and fetched.error
        fetching.target.fill_(7.0)  # other sequences have the blocks now
        if what == "stop":
            fetching.worker.resume()
            fetching.worker.call("ready", "a", THEIRS, 2, 4)
            fetching.worker.call("finish", "a", 4)
            fetching.receiver.request(fetching.worker.address, "b", [1], None, 1)
            while fetching.worker.event() != ["prefill", "b", 1]:
                pass
            if state != "greeting":  # else it has never heard of it
                assert until(lambda: fetching.worker.call("released")) == ["a"]
        assert bool((fetching.target == 7.0).all())


# A receiver that is killed or stopped.


class Serving:
    """A sender here, a receiver in a process of its own."""

    STATES = ("requested", "some layers", "computed", "computed and fetching")

    def __init__(self, nursery: Nursery, transport: str, state: str, lease: float) -> None:
        self.prompts: list[PrefillRequest] = []
        self.cancelled: list[str] = []
        self.cache = contents(SHAPE, 1, shared=transport == "shm")
        told = {"on_prefill": self.prompts.append, "on_cancel": self.cancelled.append}
        self.sender = Sender([self.cache], transport=transport, lease=lease, **KNOWN, **told)
        self.worker = Worker(nursery, role="receiver", shape=SHAPE, timeout=20.0)
        self.worker.call("request", self.sender.address, "a", [1, 2], None, 4)
        until(lambda: self.prompts)
        if state == "some layers":
            self.worker.call("fetch", "a", 0, OURS)
            self.compute(2, finish=False)
        elif state == "computed and fetching":
            self.worker.stop()
            self.worker.begin(["fetch", "a", 0, OURS])  # it reads this when it goes on
        if state.startswith("computed"):
            self.compute(3, finish=True)

    def compute(self, num_layers: int, finish: bool) -> None:
        for layer in range(num_layers):
            self.sender.ready("a", THEIRS, layer, 4)
        if finish:
            self.sender.finish("a", 4)

    def close(self) -> None:
        self.sender.close()
        self.worker.close()


@pytest.mark.parametrize("state", Serving.STATES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_a_receiver_that_is_lost_returns_the_blocks(
    nursery: Nursery, what: str, transport: str, state: str
) -> None:
    lease = 0.5 if what == "stop" else 60.0
    with contextlib.closing(Serving(nursery, transport, state, lease)) as serving:
        getattr(serving.worker, what)()
        computed = state.startswith("computed")
        if what == "stop" and not computed:
            assert serving.sender.released() == []  # the prompt is computed; then the lease begins
            serving.compute(3, finish=True)
            computed = True
        assert until(serving.sender.released) == ["a"]
        outcome = "ended_lost" if what == "kill" else "ended_expired"
        assert serving.sender.stats()[outcome] == 1
        until(lambda: serving.cancelled == ([] if computed else ["a"]))
        if what == "stop":
            serving.cache.fill_(float("nan"))  # other sequences have the blocks now
            serving.worker.resume()
            if state == "computed and fetching":
                serving.worker.answer()
            else:
                serving.worker.call("fetch", "a", 0, OURS)
            ((name, count, error),) = until(lambda: serving.worker.call("finished"))
            assert (name, count) == ("a", 0) and "lease" in error


# Peers that break the protocol.


class Wire:
    """A peer that is written by hand, with a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        self.socket, self.number = sock, 0
        self.parser = FrameParser()

    def send(self, message: m.Message, payload: bytes = b"") -> None:
        self.socket.sendall(self.frame(m.encoder.encode(message), payload))

    def frame(self, message: bytes, payload: bytes = b"") -> bytes:
        self.number += 1
        return encode(self.number - 1, message, payload) + payload

    def receive(self, decoder: Any) -> tuple[Any, bytes] | None:
        """The next message and its payload; None when the peer has closed."""
        while True:
            with contextlib.suppress(ConnectionResetError):
                count = self.socket.recv_into(self.parser.space())
                if count == 0:
                    return None
                frame = self.parser.advance(count)
                if frame is None:
                    continue
                return decoder.decode(frame[0]), bytes(frame[1])
            return None

    def greet_sender(self, fingerprint: dict[str, str]) -> None:
        greeting = auth.receiver_side(SECRET, fingerprint)
        message: Any = next(greeting)
        with contextlib.suppress(StopIteration):
            while True:
                self.send(message)
                received = self.receive(m.from_sender)
                assert received is not None
                message = greeting.send(received[0])
        self.parser.raise_limits(PAYLOAD_LIMIT)

    def greet_receiver(self, fingerprint: dict[str, str]) -> None:
        def welcome(proof: bytes) -> m.Welcome:
            return m.Welcome(proof, fingerprint, "tcp", 16, 5.0)

        greeting = auth.sender_side(SECRET, fingerprint, welcome)
        message: Any = next(greeting)
        while not isinstance(message, m.Accepted):
            received = self.receive(m.from_receiver)
            assert received is not None
            message = greeting.send(received[0])
            self.send(message)
        self.parser.raise_limits(0)


def fingerprint(shape: list[int]) -> dict[str, str]:
    return {"model": "test", "kv caches": Layout([torch.zeros(shape)]).describe()}


@contextlib.contextmanager
def good_sender(transport: str = "tcp", shape: list[int] = SHAPE) -> Iterator[Any]:
    """A sender that computes at once whatever it is asked for, into THEIRS."""
    cache = contents(shape, 1, shared=transport == "shm")
    ends: dict[str, Any] = {"cache": cache, "cancelled": []}

    def compute(request: PrefillRequest) -> None:
        for layer in range(shape[1]):
            ends["sender"].ready(request.transfer_id, THEIRS, layer, request.num_blocks)
        ends["sender"].finish(request.transfer_id, request.num_blocks)

    told = {"on_prefill": compute, "on_cancel": ends["cancelled"].append}
    ends["sender"] = Sender([cache], transport=transport, **KNOWN, **told)
    try:
        yield ends
    finally:
        ends["sender"].close()


def fetch_from(ends: Any, receiver: Receiver, target: torch.Tensor, name: str) -> None:
    """A transfer goes through as it should."""
    receiver.request(ends["sender"].address, name, [1], None, 4)
    receiver.fetch(name, 0, OURS)
    fetched = ended(receiver)
    assert fetched.error is None
    assert torch.equal(target[OURS].view(torch.int32), ends["cache"][THEIRS].view(torch.int32))


PIECE = 2 * 4 * 2 * 8 * 4  # bytes
ROGUE_SENDERS: dict[str, tuple[list[Any], str]] = {
    "a block that its pool has not": ([m.Ready("a", [16], [0], [1])], "not all in the sender's pool"),
    "more ready than it has blocks": ([m.Ready("a", [1], [0], [2])], "2 blocks are ready of 1"),
    "more blocks than were asked for": ([m.Ready("a", [1] * 5, [0], [1])], "more than 4 blocks"),
    "a layer that is none": ([m.Ready("a", [1], [3], [1])], "of 3 layers"),
    "layers without counts": ([m.Ready("a", [1], [0, 1], [1])], "of 3 layers"),
    "computed without blocks": ([m.Computed("a", 4)], "4 blocks are computed of 0"),
    "computed twice": ([m.Computed("a", 0), m.Computed("a", 0)], "0 blocks are computed"),
    "held without a question": ([m.Held("a")], "Held without a question"),
    "pieces that are not ready": ([(m.Pieces("a", 0, 0, 1), bytes(PIECE))], "not ready"),
    "pieces that are too short": (
        [m.Ready("a", [1], [0], [1]), (m.Pieces("a", 0, 0, 1), bytes(PIECE - 1))],
        "bytes of 1 pieces",
    ),
    "pieces out of turn": (
        [m.Ready("a", [1, 2], [0], [2]), (m.Pieces("a", 0, 1, 1), bytes(PIECE))],
        "1 pieces from 1",
    ),
    "no pieces": ([m.Ready("a", [1], [0], [1]), m.Pieces("a", 0, 0, 0)], "0 pieces"),
    "pieces of no layer": ([(m.Pieces("a", 9, 0, 1), bytes(PIECE))], "not asked for"),
    "a greeting again": ([m.Accepted()], "Accepted after the greeting"),
    "a refusal": ([m.Refused("no more")], "the peer refuses: no more"),
    "a receiver's message": ([m.Ping()], "refused"),
    "a message that is none": ([b"\x81\xa4type\xa5Bogus"], "refused"),
    "a negative number": ([b"\x83\xa4type\xa8Computed\xabtransfer_id\xa1a\xaanum_blocks\xff"], "refused"),
    "a pickle": ([b"cos\nsystem\n(S'true'\ntR."], "refused"),
}  # fmt: skip


@pytest.mark.parametrize("what", ROGUE_SENDERS)
def test_a_rogue_sender_is_refused_and_others_are_not(what: str) -> None:
    said, expected = ROGUE_SENDERS[what]
    target = torch.zeros(SHAPE)
    receiver = Receiver([target], timeout=20.0, **KNOWN)
    listener = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(listener), good_sender() as good:
        receiver.request(f"tcp:127.0.0.1:{listener.getsockname()[1]}", "a", [1], None, 4)
        receiver.fetch("a", 0, OURS)
        wire = Wire(listener.accept()[0])
        wire.greet_receiver(fingerprint(SHAPE))
        for item in said:
            if isinstance(item, bytes):
                wire.socket.sendall(wire.frame(item))
            else:
                wire.send(*(item if isinstance(item, tuple) else (item,)))
        fetched = ended(receiver)
        assert fetched.error and expected in fetched.error, fetched.error
        while wire.receive(m.from_receiver) is not None:
            pass  # it is closed
        wire.socket.close()
        fetch_from(good, receiver, target, "b")
    receiver.close()


@pytest.mark.parametrize("what", ["cut", "damaged", "doubled", "oversized"])
def test_frames_that_are_wrong_end_a_fetch(what: str) -> None:
    target = torch.zeros(SHAPE)
    receiver = Receiver([target], timeout=20.0, **KNOWN)
    listener = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(listener):
        receiver.request(f"tcp:127.0.0.1:{listener.getsockname()[1]}", "a", [1], None, 4)
        receiver.fetch("a", 0, OURS)
        wire = Wire(listener.accept()[0])
        wire.greet_receiver(fingerprint(SHAPE))
        frame = bytearray(wire.frame(m.encoder.encode(m.Ready("a", [1], [0], [1]))))
        wire.socket.sendall(frame)
        frame = bytearray(wire.frame(m.encoder.encode(m.Pieces("a", 0, 0, 1)), b"\1" * PIECE))
        if what == "cut":
            del frame[-1]
        elif what == "damaged":
            frame[-5] ^= 4
        elif what == "doubled":
            wire.number -= 1
            frame += bytearray(wire.frame(m.encoder.encode(m.Pong())))
        else:
            frame[12:16] = struct.pack("<I", PAYLOAD_LIMIT + 1)
        wire.socket.sendall(frame)
        wire.socket.shutdown(socket.SHUT_WR)
        fetched = ended(receiver)
        expected = {
            "cut": "gone",
            "damaged": "checksum",
            "doubled": "was due",
            "oversized": "limit",
        }
        assert fetched.error and expected[what] in fetched.error
        if what in ("cut", "damaged"):
            assert not target.any()
    receiver.close()


ROGUE_RECEIVERS: dict[str, list[Any]] = {
    "a pull past the end": [m.Pull("a", 2, 3)],
    "two pulls": [m.Pull("a", 0, 4), m.Pull("a", 0, 4)],
    "a greeting again": [m.Hello(1, bytes(32))],
    "a sender's message": [m.Pong()],
    "raw bytes": [(m.Ping(), b"x")],
    "a refusal": [m.Refused("no more")],
    "a message that is none": [b"\x81\xa4type\xa5Bogus"],
    "a token that is none": [
        b"\x85\xa4type\xa7Prefill\xabtransfer_id\xa1b\xa9token_ids\x91\xff\xaacache_salt\xc0\xaanum_blocks\x01"
    ],
}


@pytest.mark.parametrize("what", ROGUE_RECEIVERS)
def test_a_rogue_receiver_is_refused_and_others_are_not(what: str) -> None:
    prompts: list[PrefillRequest] = []
    cancelled: list[str] = []
    cache = contents(SHAPE, 1)
    told = {"on_prefill": prompts.append, "on_cancel": cancelled.append}
    ours = Sender([cache], transport="tcp", **KNOWN, **told)
    wire = Wire(socket.create_connection(("127.0.0.1", int(ours.address.rpartition(":")[2]))))
    wire.greet_sender(fingerprint(SHAPE))
    wire.send(m.Prefill("a", [1], None, 4))
    until(lambda: prompts)
    for item in ROGUE_RECEIVERS[what]:
        if isinstance(item, bytes):
            wire.socket.sendall(wire.frame(item))
        else:
            wire.send(*(item if isinstance(item, tuple) else (item,)))
    while wire.receive(m.from_sender) is not None:
        pass
    until(lambda: cancelled == ["a"])
    assert until(ours.released) == ["a"]
    target = torch.zeros(SHAPE)
    receiver = Receiver([target], timeout=20.0, **KNOWN)
    receiver.request(ours.address, "b", [1], None, 1)
    until(lambda: [p.transfer_id for p in prompts] == ["a", "b"])
    receiver.close()
    ours.close()
    wire.socket.close()


def test_a_peer_that_does_not_read_stalls_nobody() -> None:
    with good_sender(shape=LARGE) as good:
        port = int(good["sender"].address.rpartition(":")[2])
        wire = Wire(socket.create_connection(("127.0.0.1", port)))
        wire.greet_sender(fingerprint(LARGE))
        for i in range(8):
            wire.send(m.Prefill(f"lazy {i}", [1], None, 4))
            wire.send(m.Pull(f"lazy {i}", 0, 4))
        target = torch.zeros(LARGE)
        receiver = Receiver([target], timeout=20.0, **KNOWN)
        for i in range(3):
            fetch_from(good, receiver, target, f"good {i}")
        connections = good["sender"]._connections
        until(lambda: sum(bool(c.num_unsent) for c in connections) == 1)  # the others have all
        (lazy,) = (c for c in connections if c.num_unsent)
        assert lazy.num_unsent < 4 << 20  # what waits for it is bounded: 8 transfers have 25 MB
        wire.socket.close()
        until(lambda: good["sender"].stats()["connections"] == 1)
        assert len(good["sender"].released()) == 11
        receiver.close()


def test_a_half_open_connection_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "GREETING_SECONDS", 0.2)
    with good_sender() as good:
        port = int(good["sender"].address.rpartition(":")[2])
        silent = socket.create_connection(("127.0.0.1", port))
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(encode(0, m.encoder.encode(m.Hello(1, bytes(32))))[:-7])
        until(lambda: good["sender"].stats()["connections"] == 2)
        for sock in (silent, half):
            sock.settimeout(20)
            assert sock.recv(100) == b""
            sock.close()
        assert good["sender"].stats()["connections"] == 0


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_nothing_is_left_of_connections_that_come_and_go(transport: str) -> None:
    with good_sender(transport) as good:
        target = torch.zeros(SHAPE)

        def visit(name: str) -> None:
            receiver = Receiver([target], timeout=20.0, **KNOWN)
            fetch_from(good, receiver, target, name)
            receiver.close()
            until(lambda: good["sender"].stats()["connections"] == 0)

        visit("first")
        files, num_threads = open_files(), threading.active_count()
        for i in range(10):
            visit(f"t{i}")
        assert open_files() <= files and threading.active_count() <= num_threads


def test_processes_of_other_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with good_sender("shm") as good:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + good["sender"].address.removeprefix("shm:"))
        sock.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
        sock.close()
        receiver = Receiver([torch.zeros(SHAPE)], timeout=20.0, **KNOWN)
        receiver.request(good["sender"].address, "a", [1], None, 1)
        assert "runs for user" in str(ended(receiver).error)
        receiver.close()


def test_a_fault_in_the_engine_fails_one_transfer(caplog: pytest.LogCaptureFixture) -> None:
    def on_prefill(request: PrefillRequest) -> None:
        if request.transfer_id == "bad":
            raise RuntimeError("a fault for this test")
        ours.fail(request.transfer_id, "as told")

    cache = contents(SHAPE, 1)
    ours = Sender([cache], transport="tcp", on_prefill=on_prefill, on_cancel=print, **KNOWN)
    receiver = Receiver([torch.zeros(SHAPE)], timeout=20.0, **KNOWN)
    for name, error in (("bad", "a fault in the prefill worker"), ("good", "as told")):
        receiver.request(ours.address, name, [1], None, 1)
        assert error in str(ended(receiver).error)
    assert "a fault for this test" in caplog.text
    receiver.close()
    ours.close()
