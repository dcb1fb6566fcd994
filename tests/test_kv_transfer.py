"""`common.kv_transfer`: frames, the greeting, memory, and both sides in one process."""

import contextlib
import importlib.util
import os
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kv_transfer import Fetched, PrefillRequest, Receiver, Sender, allocate_shared, auth
from common.kv_transfer import messages as m
from common.kv_transfer.frames import GREETING_LIMIT, HEADER, FrameError, FrameParser, encode
from common.kv_transfer.inlets import TcpInlet, split_host
from common.kv_transfer.layout import Layout, copy
from common.kv_transfer.memory import descriptor_of, map_shared
from common.kv_transfer.outcomes import split
from common.testing.leaks import open_files, shared_names

SECRET = b"sixteen bytes or more"
SHAPE = (24, 3, 2, 4, 2, 8)  # blocks, layers, ...
HAS_NIXL = importlib.util.find_spec("nixl") is not None
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason="nixl is not installed: see the Makefile")
)
TRANSPORTS = ["shm", "tcp"]
every_transport = pytest.mark.parametrize("pair", [*TRANSPORTS, NIXL], indirect=True)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)
    return value


class Pair:
    """A sender and receivers in this process; prompts and cancels as they come."""

    def __init__(self, transport: str, **options: Any) -> None:
        self.transport = transport
        self.prompts: list[PrefillRequest] = []
        self.cancelled: list[str] = []
        self.receivers: list[Receiver] = []
        shared = transport == "shm"
        self.source = allocate_shared(SHAPE, torch.float32) if shared else torch.zeros(SHAPE)
        self.source.normal_()
        self.target = torch.zeros(SHAPE)
        known = {"fingerprint": {"model": "m"}, "secret": SECRET, "transport": transport}
        told = {"on_prefill": self.prompts.append, "on_cancel": self.cancelled.append}
        self.sender = Sender([self.source], **{**known, **told, **options})

    def receiver(self, target: torch.Tensor | None = None, **options: Any) -> Receiver:
        known = {"fingerprint": {"model": "m"}, "secret": SECRET, "timeout": 20.0}
        target = self.target if target is None else target
        self.receivers.append(Receiver([target], **{**known, **options}))
        return self.receivers[-1]

    def begin(self, receiver: Receiver, name: str, num_blocks: int) -> None:
        receiver.request(self.sender.address, name, [1, 2, 3], None, num_blocks)
        until(lambda: any(p.transfer_id == name for p in self.prompts))

    def compute(self, name: str, blocks: list[int]) -> None:
        for layer in range(SHAPE[1]):
            self.sender.ready(name, blocks, layer, len(blocks))
        self.sender.finish(name, len(blocks))

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        self.sender.close()


@pytest.fixture(params=[*TRANSPORTS, pytest.param("nixl", marks=[*NIXL.marks, pytest.mark.long])])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.closing(Pair(request.param)) as pair:
        yield pair


def ended(receiver: Receiver) -> Fetched:
    """The next transfer that ends, which must be the only one."""
    assert receiver.wait(20)
    (fetched,) = receiver.finished()
    return fetched


# Frames.

MESSAGES = st.binary(min_size=1, max_size=40)
PAYLOADS = st.binary(max_size=40)


def stream_of(frames: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(encode(i, message, raw) + raw for i, (message, raw) in enumerate(frames))


def parse(parser: FrameParser, data: bytes, cuts: Iterator[int]) -> list[tuple[bytes, bytes]]:
    """In pieces of so many bytes. Raises FrameError."""
    frames = []
    while data:
        space = parser.space()
        assert len(space) > 0
        count = min(len(space), len(data), max(1, next(cuts, 1000)))
        space[:count] = data[:count]
        data = data[count:]
        frame = parser.advance(count)
        if frame is not None:
            frames.append((bytes(frame[0]), bytes(frame[1])))
    return frames


def open_parser() -> FrameParser:
    parser = FrameParser()
    parser.raise_limits(payload=100)
    return parser


@given(st.lists(st.tuples(MESSAGES, PAYLOADS), max_size=6), st.lists(st.integers(1, 50)))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    assert parse(open_parser(), stream_of(frames), iter(cuts)) == frames


@given(st.lists(st.tuples(MESSAGES, PAYLOADS), min_size=1, max_size=4), st.data())
def test_a_damaged_stream_gives_no_frame_that_was_not_sent(
    frames: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    stream = bytearray(stream_of(frames))
    place = data.draw(st.integers(0, len(stream) - 1))
    stream[place] ^= data.draw(st.integers(1, 255))
    found: list[tuple[bytes, bytes]] = []
    parser = open_parser()
    with contextlib.suppress(FrameError):
        for byte in bytes(stream):
            found += parse(parser, bytes([byte]), iter(()))
    assert len(found) < len(frames) and found == frames[: len(found)]


@given(st.lists(st.tuples(MESSAGES, PAYLOADS), min_size=2, max_size=5, unique=True), st.data())
def test_frames_lost_doubled_or_out_of_turn_are_refused(
    frames: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.integers(0, len(frames) - 1), min_size=1, max_size=6))
    parts = [encode(i, message, raw) + raw for i, (message, raw) in enumerate(frames)]
    right = 0
    while right < len(order) and order[right] == right:
        right += 1
    parser = open_parser()
    for i in order[:right]:
        assert parse(parser, parts[i], iter(())) == [frames[i]]
    if right < len(order):
        with pytest.raises(FrameError, match=f"frame {order[right]} has come where"):
            parse(parser, parts[order[right]], iter(()))


@given(st.binary(max_size=300))
def test_noise_is_refused_or_incomplete(noise: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert parse(FrameParser(), noise, iter(())) == []
    with contextlib.suppress(msgspec.DecodeError):
        m.from_sender.decode(noise)
    with contextlib.suppress(msgspec.DecodeError):
        m.from_receiver.decode(noise)


@pytest.mark.parametrize(
    "message, payload", [(GREETING_LIMIT + 1, 0), (2**32 - 1, 0), (0, 0), (5, 1)]
)
def test_no_length_is_believed_before_the_greeting(message: int, payload: int) -> None:
    header = HEADER.pack(b"KVX1", 0, message, payload, 0)
    with pytest.raises(FrameError, match="limit"):
        parse(FrameParser(), header, iter(()))


def test_a_pickle_runs_nothing(pair: Pair, tmp_path: Any) -> None:
    """As a stream, as a message, and where a message has bytes."""
    canary = tmp_path / "canary"

    class Rogue:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(canary),)

    stolen = pickle.dumps(Rogue())
    hello = m.encoder.encode(m.Hello(m.VERSION, bytes(32)))
    for data in (stolen, encode(0, stolen), encode(0, hello) + encode(1, stolen)):
        sock = connect(pair.sender.address)
        sock.settimeout(20)
        with contextlib.suppress(OSError):  # it may have hung up by now
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
        sock.close()
    assert not canary.exists()
    receiver = pair.receiver()
    pair.begin(receiver, "after", 1)


def connect(address: str) -> socket.socket:
    transport, _, rest = address.partition(":")
    if transport == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + rest)
        return sock
    return socket.create_connection(split_host(rest))


# The greeting.


def greet(
    secret: bytes, other: bytes, ours: dict[str, str], theirs: dict[str, str]
) -> tuple[Any, Any]:
    """How the greeting ends for receiver and sender: None, or the Refusal."""

    def welcome(proof: bytes) -> m.Welcome:
        return m.Welcome(proof, theirs, "tcp", 1, 1.0)

    receiver, sender = auth.receiver_side(secret, ours), auth.sender_side(other, theirs, welcome)
    ends: list[Any] = [None, None]
    next(sender)
    message: Any = next(receiver)
    sides = [sender, receiver]
    for turn in range(8):
        try:
            message = sides[turn % 2].send(message)
        except StopIteration:
            return tuple(ends)
        except auth.Refusal as refusal:
            ends[1 - turn % 2] = refusal
            if refusal.told or all(ends):
                return tuple(ends)
            message = m.Refused(str(refusal))
    raise AssertionError("it does not end")


def test_two_that_agree_open() -> None:
    assert greet(SECRET, SECRET, {"a": "1"}, {"a": "1"}) == (None, None)


@given(st.binary(min_size=16, max_size=40), st.binary(min_size=16, max_size=40))
def test_another_secret_is_refused_on_both_sides(ours: bytes, theirs: bytes) -> None:
    ends = greet(ours, theirs, {}, {})
    assert (ends == (None, None)) == (ours == theirs)
    if ours != theirs:
        assert all("does not know the secret" in str(end) for end in ends)


def test_a_proof_cannot_be_reflected() -> None:
    """A rogue sender that answers with what the receiver itself has proved."""
    receiver = auth.receiver_side(SECRET, {})
    hello: Any = next(receiver)
    answer: Any = receiver.send(m.Challenge(m.VERSION, hello.nonce))
    with pytest.raises(auth.Refusal, match="does not know the secret"):
        receiver.send(m.Welcome(answer.proof, {}, "tcp", 1, 1.0))


FINGERPRINTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), max_size=4)


@given(FINGERPRINTS, FINGERPRINTS)
def test_the_first_field_that_differs_is_named_on_both_sides(
    ours: dict[str, str], theirs: dict[str, str]
) -> None:
    ends = greet(SECRET, SECRET, ours, theirs)
    differing = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    assert (ends == (None, None)) == (not differing)
    for end in ends if differing else ():
        assert str(end).startswith(f"{differing[0]} is ")


def test_messages_out_of_turn_are_refused() -> None:
    sender = auth.sender_side(SECRET, {}, lambda proof: m.Welcome(proof, {}, "tcp", 1, 1.0))
    next(sender)
    with pytest.raises(auth.Refusal, match="Ping has come where Hello was due"):
        sender.send(m.Ping())
    receiver = auth.receiver_side(SECRET, {})
    next(receiver)
    with pytest.raises(auth.Refusal, match="protocol version is 1 here and 2 there"):
        receiver.send(m.Challenge(2, bytes(32)))


@pytest.mark.parametrize("secret", [b"", b"short"])
def test_a_secret_that_is_none_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Pair("tcp", secret=secret)
    with pytest.raises(ValueError, match="at least 16"):
        Receiver([torch.zeros(SHAPE)], fingerprint={}, secret=secret)


@pytest.mark.parametrize("what", ["secret", "model", "block size"])
def test_peers_that_differ_are_refused_and_both_logs_say_why(
    pair: Pair, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = torch.zeros(24, 3, 2, 8, 2, 8) if what == "block size" else None
    options = {
        "secret": {"secret": SECRET + b"!"},
        "model": {"fingerprint": {"model": "other"}},
        "block size": {},
    }[what]
    receiver = pair.receiver(target, **options)
    receiver.request(pair.sender.address, "a", [1], None, 1)
    error = ended(receiver).error
    expected = {
        "secret": "the receiver does not know the secret",
        "model": "model is 'm' here and 'other' there",
        "block size": "kv caches is 'float32 3x2x4x2x8' here and 'float32 3x2x8x2x8' there",
    }[what]
    assert error is not None
    until(lambda: any(expected in r.message and "sender" in r.message for r in caplog.records))
    name = {"secret": "secret", "model": "model", "block size": "kv caches"}[what]
    assert name in error
    assert pair.prompts == []


# Memory and copies.


def test_shared_memory_has_no_name_and_is_given_out_read_only() -> None:
    before = shared_names()
    tensor = allocate_shared((5, 3, 16), torch.float32)
    assert torch.equal(tensor, torch.zeros(5, 3, 16))
    tensor[4, 2] = 7.0
    view = map_shared(os.dup(descriptor_of(tensor)), tensor.numel() * 4)
    assert np.array_equal(view.view(np.float32).reshape(5, 3, 16), tensor.numpy())
    assert not view.flags.writeable
    with pytest.raises(OSError):
        os.write(descriptor_of(tensor), b"x")
    with pytest.raises(OSError):
        os.ftruncate(descriptor_of(tensor), 1)
    assert shared_names() <= before
    files = open_files()
    del tensor, view
    assert open_files() < files


def test_memory_that_could_shrink_is_refused() -> None:
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 4096)
    with pytest.raises(ValueError, match="not sealed"):
        map_shared(os.dup(loose), 4096)
    tensor = allocate_shared((16,), torch.float32)
    with pytest.raises(ValueError, match="64 bytes, not 4096"):
        map_shared(os.dup(descriptor_of(tensor)), 4096)
    with pytest.raises(ValueError, match="does not lie in shared memory"):
        descriptor_of(torch.zeros(4))
    os.close(loose)


@given(st.integers(1, 700), st.integers(0, 40), st.integers(0, 40), st.randoms())
def test_pieces_are_copied_whatever_their_size_and_place(
    size: int, source_begin: int, target_begin: int, order: random.Random
) -> None:
    count = 5
    source = np.frombuffer(order.randbytes(count * size + 40), dtype=np.uint8)
    target = np.zeros(count * size + 80, dtype=np.uint8)
    expected = target.copy()
    places = order.sample(range(count), 3)
    sources = source.ctypes.data + source_begin + size * np.arange(3)
    targets = target.ctypes.data + target_begin + size * np.array(places)
    for i, place in enumerate(places):
        piece = source[source_begin + size * i :][:size]
        expected[target_begin + size * place :][:size][: len(piece)] = piece
    if source_begin + 3 * size <= len(source):
        copy(sources, targets, size)
        assert np.array_equal(target, expected)


def test_a_layout_names_what_is_wrong_with_caches() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Layout([torch.zeros(4, 4, 4).transpose(0, 1)])
    with pytest.raises(ValueError, match="as many blocks each, not 4, 5"):
        Layout([torch.zeros(4, 1, 1), torch.zeros(5, 1, 1)])
    layout = Layout([torch.zeros(4, 2, 3), torch.zeros(4, 1, 5, dtype=torch.float16)])
    assert layout.describe() == "float32 2x3, float16 1x5"
    assert (layout.num_layers, layout.block_bytes) == (3, 2 * 12 + 10)


# Both sides.


@every_transport
def test_blocks_arrive_layer_by_layer_and_nothing_else_is_written(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 6)
    assert pair.prompts == [PrefillRequest("a", [1, 2, 3], None, 6)]
    theirs, ours = [3, 4, 5, 9, 20, 1], [7, 2, 3, 4]
    receiver.fetch("a", 2, ours)
    for blocks in (theirs[:3], theirs):
        for layer in (2, 0, 1):
            pair.sender.ready("a", blocks, layer, len(blocks))
    until(lambda: torch.equal(pair.target[ours], pair.source[theirs[2:]]))
    assert receiver.finished() == [] and pair.sender.released() == []
    pair.sender.finish("a", 6)
    fetched = ended(receiver)
    assert (fetched.transfer_id, fetched.num_blocks, fetched.error) == ("a", 4, None)
    times = [fetched.times[k] for k in ("requested", "ready", "computed", "ended")]
    assert times == sorted(times)
    assert until(pair.sender.released) == ["a"]
    others = [b for b in range(SHAPE[0]) if b not in ours]
    assert not pair.target[others].any()
    assert pair.cancelled == []
    stats = receiver.stats()
    assert stats[f"{pair.transport}_bytes"] == 4 * 3 * 2 * 4 * 2 * 8 * 4
    assert (stats["fetched"], stats["transfers"]) == (1, 0)
    assert pair.sender.stats()["ended_fetched"] == 1


def test_a_sender_that_is_done_before_the_fetch_waits_for_it(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 3)
    pair.compute("a", [5, 6, 7])
    time.sleep(0.05)
    assert receiver.finished() == []
    receiver.fetch("a", 0, [0, 1, 2])
    assert ended(receiver).num_blocks == 3
    assert torch.equal(pair.target[:3], pair.source[5:8])


def test_fewer_blocks_than_asked_for_are_told(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 5)
    receiver.fetch("a", 1, [0, 1, 2, 3])
    for layer in range(3):
        pair.sender.ready("a", [5, 6, 7, 8, 9], layer, 3)
    pair.sender.finish("a", 3)
    fetched = ended(receiver)
    assert (fetched.num_blocks, fetched.error) == (2, None)
    assert torch.equal(pair.target[:2], pair.source[6:8])


def test_a_draft_models_cache_goes_along(pair: Pair) -> None:
    shape = (SHAPE[0], 2, 2, 4, 1, 8)
    shared = pair.transport == "shm"
    caches = [
        (allocate_shared(s, torch.float32) if shared else torch.zeros(s)).normal_()
        for s in (SHAPE, shape)
    ]
    prompts: list[PrefillRequest] = []
    known: dict[str, Any] = {"fingerprint": {}, "secret": SECRET}
    sender = Sender(
        caches, transport=pair.transport, on_prefill=prompts.append, on_cancel=print, **known
    )
    targets = [torch.zeros(s) for s in ((9, *SHAPE[1:]), (9, *shape[1:]))]
    receiver = Receiver(targets, **known)
    receiver.request(sender.address, "a", [1], "salt", 2)
    until(lambda: prompts == [PrefillRequest("a", [1], "salt", 2)])
    for layer in range(5):
        sender.ready("a", [11, 3], layer, 2)
    receiver.fetch("a", 0, [8, 0])
    sender.finish("a", 2)
    assert ended(receiver).error is None
    assert all(torch.equal(t[[8, 0]], c[[11, 3]]) for t, c in zip(targets, caches, strict=True))
    receiver.close()
    sender.close()


@every_transport
def test_cancel_ends_on_both_sides_once(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 4)
    receiver.fetch("a", 0, [0, 1, 2, 3])
    receiver.cancel("a")
    receiver.cancel("a")
    assert ended(receiver).error == "cancelled"
    until(lambda: pair.cancelled == ["a"])
    assert until(pair.sender.released) == ["a"]
    pair.compute("a", [4, 5, 6, 7])  # the engine does not know yet
    pair.begin(receiver, "a", 1)  # the id is free again
    assert not pair.target.any() and receiver.finished() == []


def test_a_failed_prefill_is_told(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 4)
    pair.sender.fail("a", "out of blocks")
    assert ended(receiver).error == "the sender: out of blocks"
    assert pair.sender.released() == ["a"] and pair.cancelled == []


def test_a_prompt_that_loses_its_blocks_fails(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 4)
    receiver.fetch("a", 0, [0, 1])
    pair.sender.ready("a", [4, 5], 0, 2)
    pair.sender.ready("a", [4, 6], 0, 2)
    assert "lost its blocks" in str(ended(receiver).error)
    assert pair.sender.released() == ["a"]


def test_a_lease_that_is_over_returns_the_blocks_and_is_told(pair: Pair) -> None:
    pair.close()
    pair = Pair(pair.transport, lease=0.2)
    receiver = pair.receiver()
    pair.begin(receiver, "a", 2)
    pair.compute("a", [4, 5])
    assert "lease of 0.2 s is over" in str(ended(receiver).error)
    assert pair.sender.released() == ["a"]
    assert pair.sender.stats()["ended_expired"] == 1 and pair.cancelled == []
    pair.close()


def test_what_was_read_after_the_lease_is_not_used(pair: Pair) -> None:
    """The receiver is late: it has read pieces of blocks that were given away meanwhile."""
    receiver = pair.receiver()
    pair.begin(receiver, "a", 2)
    pair.compute("a", [4, 5])
    held = threading.Event()
    receiver.loop.call(held.wait)  # as if it were stopped
    time.sleep(0.05)
    transfer = pair.sender._ledger._transfers["a"]
    transfer.deadline = 0.0
    pair.sender._loop.wake()
    until(lambda: pair.sender.released() == ["a"])
    pair.source[4:6] = float("nan")
    receiver.fetch("a", 0, [0, 1])
    held.set()
    assert "lease" in str(ended(receiver).error)


@every_transport
def test_a_peer_that_goes_takes_its_transfers_with_it_and_no_others(pair: Pair) -> None:
    one, two = pair.receiver(), pair.receiver(torch.zeros(SHAPE))
    pair.begin(one, "a", 2)
    pair.begin(one, "b", 2)
    pair.begin(two, "c", 2)
    pair.compute("b", [4, 5])
    until(lambda: "computed" in one._where["b"].transfers["b"].times)
    one.close()
    assert {f.transfer_id for f in one.finished()} == {"a", "b"}
    pair.receivers.remove(one)
    until(lambda: pair.cancelled == ["a"])
    assert sorted(pair.sender.released()) == ["a", "b"]
    two.fetch("c", 0, [0, 1])
    pair.compute("c", [6, 7])
    assert ended(two).error is None


def test_requests_to_where_no_sender_is_end_with_an_error() -> None:
    receiver = Receiver([torch.zeros(SHAPE)], fingerprint={}, secret=SECRET, timeout=1.0)
    for address in (
        "shm:kv-nobody", "shm:", "tcp:127.0.0.1:1", "tcp:127.0.0.1:0", "tcp:nowhere.invalid:80",
        "tcp:", "udp:1", "",
    ):  # fmt: skip
        receiver.request(address, address, [1], None, 1)
        fetched = ended(receiver)
        assert fetched.transfer_id == address and fetched.error and fetched.num_blocks == 0
    receiver.close()


def test_bad_arguments_are_refused(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "a", 2)
    with pytest.raises(ValueError, match="transfer_id a is in use"):
        receiver.request(pair.sender.address, "a", [1], None, 1)
    receiver.request(pair.sender.address, "b", [], None, 1)
    assert "token_ids is empty" in str(ended(receiver).error)
    receiver.request(pair.sender.address, "b", [1], None, 25)
    assert "num_blocks is 25, the pool has 24" in str(ended(receiver).error)
    receiver.fetch("a", 1, [0, 1])
    assert "blocks 1 to 3 of 2" in str(ended(receiver).error)
    for transport in ("udp", "shm"):
        with pytest.raises(ValueError, match=f"kv_transfer is '?{transport}"):
            Pair(transport, host="127.0.0.1")
    with pytest.raises(ValueError, match="kv_lease is 0"):
        Pair("tcp", lease=0)
    with pytest.raises(ValueError, match="peers reach"):
        Pair("tcp", host="0.0.0.0")


def test_an_id_that_is_in_use_elsewhere_is_refused(pair: Pair) -> None:
    one, two = pair.receiver(), pair.receiver(torch.zeros(SHAPE))
    pair.begin(one, "a", 2)
    two.request(pair.sender.address, "a", [1], None, 1)
    assert "in use" in str(ended(two).error)
    one.fetch("a", 0, [3])
    pair.compute("a", [6])
    assert ended(one).error is None and pair.cancelled == []


@every_transport
def test_many_transfers_at_once_over_one_connection(pair: Pair) -> None:
    receiver = pair.receiver()
    names = [f"t{i}" for i in range(8)]
    for i, name in enumerate(names):
        pair.begin(receiver, name, 3)
        receiver.fetch(name, 0, [3 * i, 3 * i + 1, 3 * i + 2])
    order = random.Random(3)
    steps = [(i, layer, count) for i in range(8) for count in (1, 2, 3) for layer in range(3)]
    order.shuffle(steps)
    tables = {i: order.sample(range(24), 3) for i in range(8)}
    for i, layer, count in steps:
        pair.sender.ready(names[i], tables[i], layer, count)
    for name in names:
        pair.sender.finish(name, 3)
    found: list[Fetched] = []
    until(lambda: found.extend(receiver.finished()) or len(found) == 8)
    assert all(f.error is None and f.num_blocks == 3 for f in found)
    for i in range(8):
        assert torch.equal(pair.target[3 * i : 3 * i + 3], pair.source[tables[i]])
    assert sorted(pair.sender.released()) == names
    assert pair.sender.stats()["connections"] == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_closing_in_the_middle_ends_everything_once(seed: int) -> None:
    order = random.Random(seed)
    pair = Pair(order.choice(TRANSPORTS))
    receiver = pair.receiver()
    for name in "abcd":
        pair.begin(receiver, name, 4)
        receiver.fetch(name, 0, [order.randrange(24) for _ in range(4)])
    for name in order.sample("abcd", 2):
        pair.compute(name, [order.randrange(24) for _ in range(4)])
    first, second = order.sample([receiver, pair.sender], 2)
    first.close()
    found = receiver.finished()
    until(lambda: found.extend(receiver.finished()) or len(found) == 4)
    second.close()
    found += receiver.finished()
    assert sorted(f.transfer_id for f in found) == list("abcd")
    assert sorted(pair.sender.released()) == list("abcd")


def test_a_prompt_that_cannot_be_sent_ends_alone(pair: Pair) -> None:
    """A client's salt may be half of a surrogate pair, and a prompt longer than a message may be."""
    receiver = pair.receiver()
    pair.begin(receiver, "other", 3)
    receiver.request(pair.sender.address, "salt", [1, 2, 3], "\ud800", 3)
    assert "surrogate" in str(ended(receiver).error)
    receiver.request(pair.sender.address, "long", [1 << 20] * 900_000, None, 3)
    assert "the limit is" in str(ended(receiver).error)
    receiver.fetch("other", 0, [5, 6, 7])
    pair.compute("other", [1, 2, 3])
    fetched = ended(receiver)
    assert (fetched.transfer_id, fetched.num_blocks, fetched.error) == ("other", 3, None)
    assert torch.equal(pair.target[[5, 6, 7]], pair.source[[1, 2, 3]])


def test_an_engine_can_wait_for_what_is_released(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "t", 3)
    begin = time.monotonic()
    assert not pair.sender.wait(0.05) and time.monotonic() - begin >= 0.05
    receiver.cancel("t")
    assert pair.sender.wait(20) and pair.sender.released() == ["t"]
    assert not pair.sender.wait(0)


def test_a_read_that_outlives_its_connection_ends_its_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NIXL reads by itself: until it has ended, the blocks are not anybody else's."""
    with contextlib.closing(Pair("tcp")) as pair:
        is_reading = threading.Event()
        is_reading.set()
        monkeypatch.setattr(TcpInlet, "is_reading", lambda self, transfer: is_reading.is_set())
        receiver = pair.receiver()
        pair.begin(receiver, "t", 3)
        receiver.fetch("t", 0, [1, 2, 3])
        pair.sender.close()
        assert not receiver.wait(0.3)
        is_reading.clear()
        fetched = ended(receiver)
        assert fetched.num_blocks == 0 and fetched.error is not None
        assert not receiver._leaving


def test_a_transfer_of_nothing_has_all_of_its_times(pair: Pair) -> None:
    receiver = pair.receiver()
    pair.begin(receiver, "t", 3)
    receiver.fetch("t", 0, [1, 2, 3])
    pair.sender.finish("t", 0)
    fetched = ended(receiver)
    assert (fetched.num_blocks, fetched.error) == (0, None)
    assert all(seconds >= 0 for seconds in split(fetched.times).values())


def test_a_fetch_waits_for_the_steps_that_a_gpu_was_given_before(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step under way may write to blocks that have a new owner."""
    is_done = threading.Event()

    class Event:
        query = staticmethod(is_done.is_set)

    receiver = pair.receiver()
    monkeypatch.setattr(receiver.layout, "record", Event)
    for name in ("late", "cancelled"):
        pair.begin(receiver, name, 3)
        pair.compute(name, [1, 2, 3])
    receiver.fetch("late", 0, [5, 6, 7])
    receiver.fetch("cancelled", 0, [9, 10, 11])
    receiver.cancel("cancelled")
    assert ended(receiver).error == "cancelled"
    time.sleep(0.1)
    assert not pair.target.any() and not receiver.finished()
    is_done.set()
    assert ended(receiver).num_blocks == 3
    assert torch.equal(pair.target[[5, 6, 7]], pair.source[[1, 2, 3]])
    assert not pair.target[[9, 10, 11]].any()
