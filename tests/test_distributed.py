"""Ranks: collectives against what one process computes, orders, and every way a rank can end."""

import contextlib
import gc
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore

from common.distributed import (
    Group,
    OneRank,
    RankError,
    Ranks,
    checkpoint_fingerprint,
    connect,
    even_split,
    project_fingerprint,
)
from common.distributed.children import Children, process_state
from common.distributed.control import SocketReceiver, SocketSender
from common.distributed.control_gloo import GlooReceiver, GlooSender
from common.distributed.gloo import TorchGroup, make_backend, num_children, wait_for
from common.distributed.health import Health
from common.distributed.launch import join_group
from common.distributed.rendezvous import LocalStore, file_store, first_difference, open_store
from common.distributed.shared_memory import SLOT, SharedMemoryGroup, make_memory
from common.testing.ranks.worker import REPEAT, SLEEP, SUM, obey
from common.testing.threads import longest_wait

CPU = torch.device("cpu")
PACKAGE = "common.testing.ranks"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SUMMED = (*FLOATS, torch.int64, torch.int32)
MOVED = (*SUMMED, torch.bool, torch.uint8)
BACKENDS = ("shared memory", "gloo")


def start(size: int = 2, timeout: float = 5.0, **more: Any) -> Ranks:
    config, prints = more.pop("config", {}), more.pop("fingerprint", {})
    ranks = connect(PACKAGE, config, CPU, size=size, timeout=timeout, fingerprint=prints, **more)
    ranks.loaded()
    return ranks


# Groups of threads in this process: what collectives compute, without the cost of processes.


def make_groups(backend: str, size: int, timeout: float = 10.0) -> list[Group]:
    """One group a rank, all in this process."""
    healths = [Health() for _ in range(size)]
    if backend == "shared memory":
        memory = make_memory(size)
        groups = [SharedMemoryGroup(memory, r, size, timeout, healths[r]) for r in range(size)]
        os.close(memory)
        return groups
    local = LocalStore(size)

    def make(rank: int) -> Group:
        made = make_backend(local.store, "test", rank, size, CPU, timeout, "127.0.0.1")
        return TorchGroup(made, CPU, timeout, healths[rank])

    groups = in_threads([lambda r=r: make(r) for r in range(size)])
    local.close()
    return groups


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that run at once; the first error is raised."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture(scope="module", params=[(b, n) for b in BACKENDS for n in (2, 3, 4)], ids=str)
def groups(request: pytest.FixtureRequest) -> Iterator[list[Group]]:
    made = make_groups(*request.param)
    yield made
    for group in made:
        group.close()


def each(groups: Sequence[Group], call: Callable[[Group], Any]) -> list[Any]:
    return in_threads([lambda g=g: call(g) for g in groups])


def rows(generator: random.Random, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose sums are exact in every format."""
    values = [[generator.randint(0, 9) for _ in range(width)] for _ in range(count)]
    return torch.tensor(values, dtype=dtype).view(count, width)


def some_counts(generator: random.Random, size: int) -> list[list[int]]:
    """Rows of every rank: none at all, one rank's only, uneven ones, equal ones."""
    uneven = [generator.randint(0, 5) for _ in range(size)]
    return [[0] * size, [0] * (size - 1) + [3], uneven, [2] * size]


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums(groups: list[Group], dtype: torch.dtype) -> None:
    generator = random.Random(1)
    for count, width in ((0, 3), (1, 1), (5, 7), (1, 9001)):
        xs = [rows(generator, count, width, dtype) for _ in groups]
        expected = sum(xs[1:], xs[0].clone())
        outs = each(groups, lambda g, xs=xs: g.all_reduce(xs[g.rank].clone()))
        assert all(torch.equal(out, expected) for out in outs), (count, width)
    for counts in some_counts(generator, len(groups)):
        xs = [rows(generator, sum(counts), 5, dtype) for _ in groups]
        expected = sum(xs[1:], xs[0].clone()).split(counts)
        outs = each(groups, lambda g, xs=xs, c=counts: g.reduce_scatter(xs[g.rank].clone(), c))
        assert all(map(torch.equal, outs, expected)), counts


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_moves(groups: list[Group], dtype: torch.dtype) -> None:
    generator, size = random.Random(2), len(groups)
    for counts in some_counts(generator, size):
        xs = [rows(generator, count, 3, dtype) for count in counts]
        for out in each(groups, lambda g, xs=xs, c=counts: g.all_gather(xs[g.rank], c)):
            assert torch.equal(out, torch.cat(xs)), counts
        shapes = [tuple(x.shape) for x in xs]
        first, *others = each(groups, lambda g, xs=xs, s=shapes: g.gather(xs[g.rank], s))
        assert all(map(torch.equal, first, xs)) and others == [None] * (size - 1)
    for root, count in itertools.product(range(size), (0, 4)):
        xs = [rows(generator, count, 3, dtype) for _ in groups]
        expected = xs[root].clone()
        each(groups, lambda g, xs=xs, root=root: g.broadcast(xs[g.rank], root))
        assert all(torch.equal(x, expected) for x in xs)
    for most in (0, 1, 4):
        table = [[generator.randint(0, most) for _ in range(size)] for _ in range(size)]
        xs = [rows(generator, sum(sends), 3, dtype) for sends in table]
        pieces = [x.split(sends) for x, sends in zip(xs, table, strict=True)]
        columns = [[table[r][to] for r in range(size)] for to in range(size)]
        outs = each(
            groups,
            lambda g, xs=xs, t=table, c=columns: g.all_to_all(xs[g.rank], t[g.rank], c[g.rank]),
        )
        for to, out in enumerate(outs):
            assert torch.equal(out, torch.cat([pieces[r][to] for r in range(size)])), table
    assert each(groups, lambda g: g.minimum(2**60 + g.rank)) == [2**60] * size


def test_large_tensors_go_in_chunks() -> None:
    """More than two slots, with a rest, and shares whose borders are within a chunk."""
    groups = make_groups("shared memory", 3)
    count = 2 * SLOT // 4 + 5
    xs = [torch.rand(count, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    expected = xs[0] + xs[1] + xs[2]
    outs = each(groups, lambda g: g.all_reduce(xs[g.rank].clone()))
    assert all(torch.equal(out, expected) for out in outs)
    halves = [x.bfloat16() for x in xs]
    expected = (halves[0].float() + halves[1].float() + halves[2].float()).bfloat16()
    counts = [count // 2, 1, count - count // 2 - 1]
    outs = each(groups, lambda g: g.reduce_scatter(halves[g.rank], counts))
    assert torch.equal(torch.cat(outs), expected)
    table = [[count, 3, 0], [0, 0, 7], [1, count // 2, 0]]
    sources = [torch.cat([xs[r][:n] for n in table[r]]) for r in range(3)]
    columns = [list(column) for column in zip(*table, strict=True)]
    outs = each(groups, lambda g: g.all_to_all(sources[g.rank], table[g.rank], columns[g.rank]))
    for to, out in enumerate(outs):
        assert torch.equal(out, torch.cat([xs[r][: table[r][to]] for r in range(3)]))
    copies = [xs[0].clone(), *(torch.zeros(count) for _ in range(2))]
    each(groups, lambda g: g.broadcast(copies[g.rank]))
    assert all(torch.equal(copy, xs[0]) for copy in copies)
    gathered = each(groups, lambda g: g.gather(xs[g.rank], [(count,)] * 3))[0]
    assert all(map(torch.equal, gathered, xs))
    for group in groups:
        group.close()


def test_bytes_that_were_sent(groups: list[Group]) -> None:
    """By the formula of each docstring."""
    size, shared = len(groups), isinstance(groups[0], SharedMemoryGroup)
    x, counts = torch.zeros(size * 4, 3), [4] * size

    def sent(call: Callable[[Group], Any]) -> list[int]:
        before = [group.num_bytes_sent for group in groups]
        each(groups, call)
        return [group.num_bytes_sent - b for group, b in zip(groups, before, strict=True)]

    whole, part = size * 48, 48
    ring = whole if shared else 2 * (size - 1) * whole // size
    assert sent(lambda g: g.all_reduce(x.clone())) == [ring] * size
    assert sent(lambda g: g.reduce_scatter(x, counts)) == [ring] * size
    gathered = part if shared else (size - 1) * part
    assert sent(lambda g: g.all_gather(x[:4], counts)) == [gathered] * size
    exchanged = whole if shared else whole - part
    assert sent(lambda g: g.all_to_all(x, counts, counts)) == [exchanged] * size
    assert sent(lambda g: g.gather(x[:4], [(4, 3)] * size)) == [0] + [part] * (size - 1)
    tree = {2: [1, 0], 3: [2, 0, 0], 4: [2, 0, 1, 0]}[size]
    expected = [whole * n for n in ([1] + [0] * (size - 1) if shared else tree)]
    assert sent(lambda g: g.broadcast(x.clone())) == expected


def test_every_rank_but_the_root_has_one_parent() -> None:
    for size in range(1, 40):
        assert sum(num_children(place, size) for place in range(size)) == size - 1


def test_one_rank_and_even_splits() -> None:
    group, x = OneRank(), torch.arange(6.0).view(3, 2)
    assert group.all_reduce(x) is x and group.minimum(7) == 7
    assert torch.equal(group.all_to_all(x, [3], [3]), x)
    for total, size in ((9, 2), (3, 5), (0, 3)):
        ranges = even_split(total, size)
        assert [i for r in ranges for i in r] == list(range(total))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_ranks_that_do_different_things_are_told() -> None:
    groups = make_groups("shared memory", 2, timeout=2.0)
    with pytest.raises(RankError, match=r"rank \d is in (all_reduce|broadcast) of \d+ bytes, rank"):
        in_threads(
            [
                lambda: groups[0].all_reduce(torch.zeros(3)),
                lambda: groups[1].broadcast(torch.zeros(3)),
            ]
        )
    groups = make_groups("shared memory", 2, timeout=2.0)
    x = torch.zeros(3, 1)
    with pytest.raises(RankError, match="rank 0 has 8 bytes for rank 1, which expects 4"):
        in_threads(
            [
                lambda: groups[0].all_to_all(x, [1, 2], [1, 1]),
                lambda: groups[1].all_to_all(x, [1, 2], [1, 2]),
            ]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_does_not_come_is_noticed_in_time(backend: str) -> None:
    groups = make_groups(backend, 2, timeout=0.4)
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"does not answer|has not answered rank 0 for 0\.4 s"):
        groups[0].all_reduce(torch.zeros(3))
    assert time.monotonic() - begin < 3
    with pytest.raises(RankError):  # the group is lost: at once from now on
        groups[0].all_reduce(torch.zeros(3))
    for group in reversed(groups):
        group.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_threads_run_while_a_rank_waits(backend: str) -> None:
    """Rank 1 comes half a second late."""
    groups = make_groups(backend, 2)
    late = threading.Timer(0.5, lambda: groups[1].all_reduce(torch.zeros(3)))
    late.start()
    assert longest_wait(lambda: groups[0].all_reduce(torch.zeros(3))) < 0.5
    late.join()
    for group in groups:
        group.close()


# Orders.


def socket_controls(size: int, timeout: float) -> tuple[SocketSender, list[SocketReceiver]]:
    pairs = [socket.socketpair() for _ in range(1, size)]
    sender = SocketSender([ours for ours, _ in pairs], timeout, Health())
    return sender, [SocketReceiver(theirs, timeout) for _, theirs in pairs]


def gloo_controls(size: int, timeout: float) -> tuple[GlooSender, list[GlooReceiver]]:
    at = f"127.0.0.1:{free_port()}"
    stores = [open_store(at, rank, size, 10.0) for rank in range(size)]

    def make(rank: int) -> Any:
        return make_backend(stores[rank], "orders", rank, size, CPU, 60.0, "127.0.0.1")

    first, *others = in_threads([lambda r=r: make(r) for r in range(size)])
    sender = GlooSender(first, stores[0], timeout, Health())
    pairs = zip(others, stores[1:], strict=True)
    return sender, [GlooReceiver(other, store, timeout, Health()) for other, store in pairs]


def test_what_ends_as_a_wait_for_it_is_given_up_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An operation is waited for in slices. Here it ends when one does, again and again."""
    monkeypatch.setattr("common.distributed.gloo.SLICE", timedelta(milliseconds=1))
    groups = make_groups("gloo", 2)
    generator = random.Random(5)
    pauses = [generator.uniform(0.0005, 0.0015) for _ in range(1500)]

    def run(group: Group) -> list[int]:
        sums = []
        for pause in pauses:
            if group.rank == 1:
                time.sleep(pause)
            sums.append(int(group.all_reduce(torch.ones(1, dtype=torch.int64))))
        return sums

    try:
        assert each(groups, run) == [[2] * len(pauses)] * 2
    finally:
        for group in groups:
            group.close()


class Ending:
    """An operation that ends between the end of a wait and the question whether it has ended."""

    def __init__(self, error: str | None) -> None:
        self.error, self.waits = error, 0

    def is_completed(self) -> bool:
        return True

    def wait(self, *timeout: Any) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)


def test_how_it_has_ended_is_asked_again() -> None:
    wait_for(Ending(None), "", 10.0, Health())
    with pytest.raises(RuntimeError, match="Connection reset"):
        wait_for(Ending("Connection reset"), "", 10.0, Health())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize("make", (socket_controls, gloo_controls))
def test_orders_arrive_whole_and_in_turn(make: Callable) -> None:
    """Over heartbeats in between, and longer than what a socket takes at once."""
    sender, receivers = make(3, 2.0)
    generator = random.Random(3)
    lengths = [1, 63, 64, 65, 200, 60_000 if make is socket_controls else 1000]
    orders = [[generator.randint(-(2**63), 2**63 - 1) for _ in range(n)] for n in lengths]

    def send() -> None:
        for order in orders:
            sender.send(order)
        time.sleep(1.2)  # at least two heartbeats
        sender.send([7])
        sender.close()

    def receive(receiver: Any) -> list[list[int]]:
        received = list(iter(receiver.receive, []))
        receiver.close()
        return received

    _, *received = in_threads([send, *(lambda r=r: receive(r) for r in receivers)])
    assert received == [[*orders, [7]]] * 2


@pytest.mark.parametrize("make", (socket_controls, gloo_controls))
def test_silence_is_noticed_on_both_sides(make: Callable) -> None:
    """First the other rank's, whose thread no longer gives signs; then rank 0's."""
    sender, [receiver] = make(2, 0.4)
    deadline = time.monotonic() + 10
    while not sender._silence and time.monotonic() < deadline:
        time.sleep(0.01)  # until it has been heard once
    receiver._give_sign = lambda: None
    while sender.health.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sender.health.problem == "rank 1 gives no sign of life for 0.4 s"
    with pytest.raises(RankError, match="rank 1 gives no sign of life"):
        sender.send([1])
    receiver._give_sign = type(receiver)._give_sign.__get__(receiver)
    sender._closed.set()
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 0 has given no sign of life for 0\.4 s"):
        while True:
            receiver.receive()
    assert time.monotonic() - begin < 3
    sender.close()
    receiver.close()


# Real processes.


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that what is left there is ours."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def left_behind() -> dict[str, Any]:
    """What must be the same before and after: processes, files, segments, sockets, threads."""
    return {
        "processes": descendants(),
        "temporary files": os.listdir(tempfile.gettempdir()),
        "segments": Path("/proc/self/maps").read_text().count("/dev/shm"),
        "threads": {t.name for t in threading.enumerate()} & {"ranks", "heartbeat"},
    }


def settled(before: dict[str, Any]) -> None:
    """Nothing more than before is there, by and by."""
    gc.collect()
    deadline = time.monotonic() + 5
    while left_behind() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind() == before


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def worker_pids(ranks: Ranks) -> list[int]:
    assert ranks.children is not None
    return [process.pid for process in ranks.children.processes]


def wait_until(condition: Callable[[], Any], seconds: float) -> float:
    """Seconds until the condition holds. Raises AssertionError when they are over."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "in vain"
        time.sleep(0.01)
    return time.monotonic() - begin


def addresses(pids: Sequence[int]) -> list[tuple[str, int]]:
    """Where processes listen."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_two_engines_in_one_process_and_nothing_is_left() -> None:
    """One over shared memory and one over gloo, in any thread, and then no trace of them."""
    start(2).close()  # what a process opens once
    before, descriptors = left_behind(), num_descriptors()
    mine = set(addresses([os.getpid()]))
    shared, gloo = in_threads([lambda: start(3), lambda: start(2, use_shared_memory=False)])
    assert (type(shared.group), type(gloo.group)) == (SharedMemoryGroup, TorchGroup)
    assert set(addresses([os.getpid(), *worker_pids(shared)])) - mine <= {
        (host, port) for host, port in addresses([os.getpid()]) if host == "127.0.0.1"
    }
    assert addresses(worker_pids(shared)) == []
    assert {host for host, _ in addresses(worker_pids(gloo))} == {"127.0.0.1"}
    for ranks, total in ((shared, 6.0), (gloo, 3.0), (shared, 6.0)):
        ranks.control.send([SUM])
        assert obey([SUM], ranks.group).tolist() == [total] * 4
    assert shared.problem() is None and gloo.problem() is None
    shared.close()
    gloo.control.send([SUM])
    obey([SUM], gloo.group)
    gloo.close()
    gloo.close()  # once more does nothing
    del shared, gloo, ranks
    settled(before)
    wait_until(lambda: num_descriptors() <= descriptors, 5)


FAULTS = list(itertools.product((False, True), (signal.SIGKILL, signal.SIGSTOP)))


@pytest.mark.parametrize(("shares", "how"), FAULTS, ids=str)
def test_a_worker_is_lost_in_the_middle(shares: bool, how: signal.Signals) -> None:
    """A rank ends or stops while rank 0 waits for its sum: an error in time, nothing left. (One of
    several: see the long form.)"""
    before = left_behind()
    ranks = start(2, timeout=2.0, use_shared_memory=shares)
    ranks.control.send([SLEEP, 300])
    ranks.control.send([SUM])
    threading.Timer(0.1, os.kill, (worker_pids(ranks)[0], how)).start()
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        obey([SUM], ranks.group)
    seconds = time.monotonic() - begin
    if how == signal.SIGKILL:
        assert str(caught.value) == "rank 1 was killed by SIGKILL" and seconds < 2
    else:
        assert re.search("rank .* answer|sign of life", str(caught.value)) and seconds < 5
    assert ranks.problem() == str(caught.value)
    with pytest.raises(RankError):
        ranks.control.send([SUM])
    ranks.close()
    del ranks, caught
    settled(before)


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGSTOP), ids=str)
def test_a_worker_is_lost_while_nothing_is_computed(how: signal.Signals) -> None:
    before = left_behind()
    ranks = start(2, timeout=1.5)
    wait_until(lambda: 1 in ranks.control._silence, 5)  # it has been heard
    os.kill(worker_pids(ranks)[0], how)
    wait_until(ranks.problem, 1 if how == signal.SIGKILL else 5)
    if how == signal.SIGKILL:
        assert ranks.problem() == "rank 1 was killed by SIGKILL"
    else:
        silent = r"rank 1 gives no sign of life for 1\.5 s"
        told = rf"{silent} \(process \d+ is stopped.*, \d+\.\d s of CPU time\)"
        assert re.fullmatch(told, ranks.problem())
    ranks.close()
    settled(before)


def test_a_watcher_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The children end with its thread: unsaid, rank 0 would miss them a timeout later."""
    before = left_behind()
    ranks = start(2, timeout=30.0)

    def fail(self: Children, i: int) -> bool:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(Children, "_pass_on", fail)
    os.kill(worker_pids(ranks)[0], signal.SIGKILL)
    wait_until(ranks.problem, 5)
    told = "the ranks are watched no longer: ZeroDivisionError('of a test')"
    assert ranks.problem() == told
    ranks.close()
    settled(before)


def test_ranks_live_on_when_their_words_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = io.StringIO()
    nowhere.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", nowhere)  # of which the workers print one line at their start
        ranks = start(2)
    ranks.control.send([SUM])
    assert obey([SUM], ranks.group).tolist() == [3.0] * 4 and ranks.problem() is None
    assert ranks.children._thread.is_alive()
    ranks.close()


def test_the_state_of_a_process() -> None:
    assert re.fullmatch(
        rf"process {os.getpid()} runs.*, \d+\.\d s of CPU time", process_state(os.getpid())
    )
    assert process_state(2**22 + 1) is None  # the kernel gives no such number


@pytest.mark.long
@pytest.mark.parametrize(("shares", "how"), FAULTS, ids=str)
def test_twenty_losses_in_a_row(shares: bool, how: signal.Signals) -> None:
    before, generator = left_behind(), random.Random(4)
    for _ in range(20):
        ranks = start(3, timeout=2.0, use_shared_memory=shares)
        victim = generator.choice(worker_pids(ranks))
        killer = threading.Timer(generator.uniform(0, 0.3), os.kill, (victim, how))
        killer.start()
        with pytest.raises(RankError):
            while True:
                ranks.control.send([REPEAT, 5000, 20])
                obey([REPEAT, 5000, 20], ranks.group)
        killer.join()
        ranks.close()
        del ranks
        settled(before)


def server(*args: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", f"{PACKAGE}.server", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **more)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_workers_end_with_rank_0_even_a_stopped_one() -> None:
    with server("3", "30", "-1") as process:
        children = json.loads(process.stdout.readline())["children"]
        assert len(children) == 2 and all(map(is_alive, children))
        os.kill(children[0], signal.SIGSTOP)
        process.kill()
        wait_until(lambda: not any(map(is_alive, children)), 2)


def test_workers_end_when_rank_0_is_stopped() -> None:
    with server("2", "1.5", "-1") as process:
        children = json.loads(process.stdout.readline())["children"]
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: not any(map(is_alive, children)), 6)
        os.kill(process.pid, signal.SIGCONT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert [line for line in said.splitlines() if line.startswith("error: rank 1 ")]


def test_interrupts_are_for_rank_0() -> None:
    ranks = start(2)
    os.kill(worker_pids(ranks)[0], signal.SIGINT)
    time.sleep(0.3)
    ranks.control.send([SUM])
    assert obey([SUM], ranks.group).tolist() == [3.0] * 4
    ranks.close()


STARTS = {
    "a rank's own error": ({"fail early": "x is 3"}, {}, "rank 1 ended: x is 3"),
    "another checkpoint": (
        {"fingerprint": {"checkpoint": "abc", "torch": "2"}},
        {"fingerprint": {"checkpoint": "abd", "torch": "2"}},
        "checkpoint differs: abd on rank 0, abc on rank 1",
    ),
    "a rank stays away": (
        {"stay away": True},
        {"start_timeout": 4.0},
        "rank 1 of 2 has not come within 4 s",
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_starts_that_fail_are_one_line(name: str, capfd: pytest.CaptureFixture) -> None:
    config, more, message = STARTS[name]
    before = left_behind()
    with pytest.raises(ValueError) as caught:
        start(2, config=config, **more)
    assert str(caught.value) == message
    assert "error" not in capfd.readouterr().err  # the caller prints it, once
    del caught
    settled(before)


def test_a_package_without_a_worker_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"rank 1 ended with status 1$"):
        connect("common.kernels", {}, CPU, size=2, timeout=5.0, fingerprint={})


def test_an_error_after_the_start_is_told_by_its_words() -> None:
    ranks = start(2, config={"fail": "no such layer"})
    with pytest.raises(RankError, match=r"^rank 1 ended: no such layer$"):
        obey([SUM], ranks.group)
    ranks.close()


# Ranks of several hosts or engines.


def test_a_store_in_a_file_is_never_destroyed(tmp_path: Path) -> None:
    """The destructor of PyTorch's own opens the file twice more; with its folder removed in between
    it waits for five minutes, and lets no other thread run."""
    path = tmp_path / "store"
    for make in (FileStore, file_store):
        store = make(str(path), 2)
        store.set("a", "b")
        size = path.stat().st_size
        del store
        gc.collect()
        has_grown = path.stat().st_size > size
        assert has_grown == (make is FileStore)  # counted down, or left alone
    local = LocalStore(1)
    local.store.set("a", "b")
    kept = Path(local.path).read_bytes()
    del local.store
    assert Path(local.path).read_bytes() == kept
    local.close()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"^no rendezvous at '/nowhere/store': no such folder$"):
        open_store("/nowhere/store", 0, 2, 60.0)
    assert time.monotonic() - begin < 5


def test_join_group_by_path_and_by_port(tmp_path: Path) -> None:
    for rendezvous in (str(tmp_path / "store"), f"127.0.0.1:{free_port()}"):
        calls = [lambda r=r, at=rendezvous: join_group(at, r, 3, CPU, 10.0) for r in range(3)]
        groups = in_threads(calls)
        assert {host for host, _ in addresses([os.getpid()])} <= {"127.0.0.1", "::1"}
        assert each(groups, lambda g: g.minimum(5 + g.rank)) == [5, 5, 5]
        for group in groups:
            group.close()
    with pytest.raises(ValueError, match=r"rank 1 of 2 has not come within 0\.3 s"):
        join_group(str(tmp_path / "lonely"), 0, 2, CPU, 0.3)
    with pytest.raises(ValueError, match="rendezvous must be a path or host:port, not 'nowhere'"):
        join_group("nowhere", 0, 2, CPU, 0.3)


def torchrun_env(rank: int, size: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (values | more).items()}


def test_ranks_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables alone; the long form has torchrun itself. Then a rank is lost."""
    port = free_port()
    both = [server("2", "5", "20", env=torchrun_env(rank, 2, port)) for rank in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert json.loads(said[0][0].splitlines()[-1]) == {"sum": [3.0] * 4}, said
    assert [process.returncode for process in both] == [0, 0], said
    both = [server("2", "5", "-1", env=torchrun_env(rank, 2, port)) for rank in range(2)]
    assert json.loads(both[0].stdout.readline()) == {"children": []}
    both[1].kill()
    begin = time.monotonic()
    _, error = both[0].communicate(timeout=60)
    both[1].communicate()
    assert re.search("^error: another rank is gone", error, re.MULTILINE), error
    assert both[0].returncode == 1 and time.monotonic() - begin < 10
    for name, value in torchrun_env(0, 2, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^torchrun has started 2 ranks .*, but 3 are asked for$"):
        start(3)


@pytest.mark.long
def test_torchrun_itself() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", f"{PACKAGE}.server", "3", "5", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '{"sum": [6.0, 6.0, 6.0, 6.0]}' in done.stdout, done.stderr


# What others may send.


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_foreign_bytes_run_no_code_and_stop_no_group(tmp_path: Path) -> None:
    """Pickles and noise to every port that gloo has open, in a connection that stays open too."""
    canary = tmp_path / "canary"
    ranks = start(2, use_shared_memory=False)
    ports = addresses([os.getpid(), *worker_pids(ranks)])
    assert ports and all(host == "127.0.0.1" for host, _ in ports)
    generator = random.Random(5)
    noise = [generator.randbytes(n) for n in (1, 8, 64, 5000)]
    kept = []
    for address, sent in itertools.product(ports, [pickle.dumps(Canary(canary)), *noise, b""]):
        peer = socket.create_connection(address)
        peer.sendall(sent)
        kept.append(peer)
        if len(kept) % 2:
            kept.pop().close()
    for _ in range(5):
        ranks.control.send([SUM])
        assert obey([SUM], ranks.group).tolist() == [3.0] * 4
    for peer in kept:
        peer.close()
    ranks.control.send([SUM])
    assert obey([SUM], ranks.group).tolist() == [3.0] * 4
    assert ranks.problem() is None and not canary.exists()
    ranks.close()
    restarted = start(2, use_shared_memory=False)
    restarted.close()


def test_nothing_here_unpickles() -> None:
    """Nor are collectives on Python's objects used, which do."""
    folder = Path(sys.modules["common.distributed"].__path__[0])
    for path in folder.glob("*.py"):
        found = re.findall(
            r"import pickle|\bpickle\.|(?<!\bpy)_object|torch\.load|multiprocessing",
            path.read_text(),
        )
        assert not found, (path, found)


# Fingerprints.


def test_fingerprints_tell_checkpoints_and_code_apart(tmp_path: Path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [3000], "data_offsets": [0, 12000]}}
    ).encode()
    shard = bytearray(len(header).to_bytes(8, "little") + header + bytes(12000))

    def written(name: str, data: bytes) -> dict[str, str]:
        (tmp_path / name).write_bytes(data)
        return checkpoint_fingerprint(tmp_path)

    first = written("model.safetensors", shard)
    assert written("model.safetensors", shard) == first
    shard[-1] ^= 1
    assert written("model.safetensors", shard) != first
    shard[-1] ^= 1
    assert written("model.safetensors", shard) == first
    assert written("config.json", b"{}") != first
    ours = project_fingerprint("part09")
    assert ours["torch"] == torch.__version__ and ours == project_fingerprint("part09")
    assert ours["code"] != project_fingerprint("part08")["code"]
    assert first_difference(ours, {**ours, "torch": "1"}) == ("torch", torch.__version__, "1")
    assert first_difference(ours, ours) is None
