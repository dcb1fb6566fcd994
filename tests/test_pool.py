"""The workers of the CPU kernels: every share once, whoever comes; none is waited for that does not."""

import os
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
from numba import types

from common.kernels.cpu.atomics import add, load, pause
from common.kernels.cpu.jit import helper, int64_array
from common.kernels.cpu.pool import STATE, Pool, spread, threads_of_pool

INT = types.int64


@helper
def count_share(counts, worth, share, num_shares):
    """Note that a share was done, after some work."""
    total = 0
    for i in range(worth):
        total += i * share
        pause()
    add(counts.ctypes.data + 8 * share, 1 + (total < 0) + (num_shares != len(counts)))


@numba.njit(INT(INT, INT, INT, INT, INT))
def spread_often(counts, num_shares, times, worth, pool):
    """Spread `times` times; how often a share had not been done, or twice, when `spread` returned."""
    done, wrong = int64_array(counts, (num_shares,)), 0
    for number in range(times):
        spread(count_share, (done, worth), num_shares, pool)
        for share in range(num_shares):
            wrong += done[share] != number + 1
    return wrong


@helper
def hold_share(begun, ended, share, num_shares):
    """The second share takes until the test ends it."""
    if share == 1:
        add(begun.ctypes.data, 1)
        while load(ended.ctypes.data) == 0:
            pause()


@numba.njit(INT(INT, INT, INT), nogil=True)
def spread_held(begun, ended, pool):
    spread(hold_share, (int64_array(begun, (1,)), int64_array(ended, (1,))), 2, pool)
    return load(ended)


@pytest.mark.parametrize("worth", [0, 40])
@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_every_share_is_done_once(num_shares: int, worth: int) -> None:
    counts = np.zeros(num_shares, np.int64)
    _, pool = threads_of_pool(num_shares + 1)
    assert spread_often(counts.ctypes.data, num_shares, 3000, worth, pool) == 0


def test_workers_that_never_come_are_not_waited_for() -> None:
    pool, counts = Pool(), np.zeros(4, np.int64)
    assert spread_often(counts.ctypes.data, 4, 100, 0, pool.address) == 0 and pool.workers == []


def test_a_share_that_a_worker_has_begun_is_waited_for() -> None:
    pool, begun, ended = Pool(), np.zeros(1, np.int64), np.zeros(1, np.int64)
    pool.threads(2)
    seen: list[int] = []
    places = begun.ctypes.data, ended.ctypes.data, pool.address
    waiting = threading.Thread(target=lambda: seen.append(spread_held(*places)))
    waiting.start()
    while begun[0] == 0:
        time.sleep(0.001)
    # Whichever thread has the second share, the call cannot be over before that.
    assert seen == []
    ended[0] = 1
    waiting.join(20)
    pool.stop()
    assert seen == [1]


def test_a_call_beside_another_does_its_work_alone() -> None:
    """Another thread has the pool, and is not done with it."""
    pool, begun, ended = Pool(), np.zeros(1, np.int64), np.zeros(1, np.int64)
    places = begun.ctypes.data, ended.ctypes.data, pool.address
    busy = threading.Thread(target=spread_held, args=places)
    busy.start()
    while begun[0] == 0:
        time.sleep(0.001)
    counts = np.zeros(3, np.int64)
    assert spread_often(counts.ctypes.data, 3, 10, 0, pool.address) == 0
    ended[0] = 1
    busy.join(20)
    assert not busy.is_alive()


def test_workers_sleep_when_there_is_nothing_to_do() -> None:
    """And wake up: the next shares are done by two threads again, or at least done."""
    pool, counts = Pool(), np.zeros(2, np.int64)
    _, address = pool.threads(2)
    cpu = [time.process_time()]
    while len(cpu) < 200 and (len(cpu) < 20 or cpu[-1] - cpu[-10] > 0.05):
        time.sleep(0.02)
        cpu.append(time.process_time())
    assert cpu[-1] - cpu[-10] <= 0.05, "the worker does not sleep"
    assert spread_often(counts.ctypes.data, 2, 100, 10, address) == 0
    pool.stop()
    assert pool.workers == []


def test_a_generation_that_is_over_is_not_entered() -> None:
    """A worker that sees work which ends before it enters finds another state, and looks anew."""
    pool = Pool()
    memory = pool.memory[pool.address - pool.memory.ctypes.data :].view(np.int64)
    counts = np.zeros(2, np.int64)
    for _ in range(5):
        before = memory[STATE // 8]
        assert spread_often(counts.ctypes.data, 2, 1, 0, pool.address) == 0
        counts[:] = 0
        assert memory[STATE // 8] == before + (2 << 16)  # open, then closed; none is inside


CHILD = """
import os, sys, numpy as np, torch
from common.kernels.cpu.ops import CpuOps
from common.kernels.cpu.pool import POOL
ops = CpuOps(2)
weight = ops.prepare_weight(torch.ones(256, 512))
expected = ops.linear(torch.ones(9, 512), weight)
assert len(POOL.workers) == 1
child = os.fork()
if child == 0:  # without the worker, then with one of its own
    same = torch.equal(ops.linear(torch.ones(9, 512), weight), expected) and POOL.workers == []
    again = CpuOps(2)
    same = same and torch.equal(again.linear(torch.ones(9, 512), weight), expected)
    os._exit(0 if same and len(POOL.workers) == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_workers_of_its_own_and_both_end() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
