"""Ranks: collectives against what one process computes, orders, and every way a rank can end."""

import contextlib
import itertools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

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
from common.distributed.control import CLOSED, HEARTBEAT, PipeReceiver, PipeSender
from common.distributed.gloo import TorchGroup, make_backend, num_children
from common.distributed.health import Health
from common.distributed.launch import join_group
from common.distributed.rendezvous import LocalStore, first_difference
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
    return connect(PACKAGE, config, CPU, size=size, timeout=timeout, fingerprint=prints, **more)


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
