"""Cores that share a kernel's work, without waiting for one that does not come.

`prange` would do it by OpenMP, which splits the work among its threads and waits for every one of
them. Where another process has a thread's core, that is a wait of milliseconds, in each of the 150
loops of a decode step, though one core alone had done the work in a tenth of it. Here a kernel tells
what there is to do, in shares, and takes one share after another itself; so does each worker that is
awake. It waits only for shares that a worker has begun.

The pool is a few words of memory. STATE holds a generation, odd while work is to be had, and how many
workers are inside. A worker enters by adding itself to the state that it has seen: so none enters
too late, when the kernel's arguments are gone. Without work it looks again for some microseconds,
then sleeps (futex) until a kernel wakes it; the kernel does not wait for that.
"""

import atexit
import os
import threading

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.atomics import (
    FUTEX,
    add,
    load,
    pause,
    replace,
    sched_yield,
    sleep_while,
    store,
    usleep,
    wake_sleepers,
)
from common.kernels.cpu.jit import helper, int64_array, kernel

# Words of the pool, by their place in bytes. Those that change often lie in lines of their own.
STATE, NEXT, OWNER, SLEEPERS, STOPPED, JOB = 0, 128, 256, 384, 392, 512
POOL_BYTES = 640
GENERATION, INSIDE = 1 << 16, (1 << 16) - 1  # of STATE: what one more is, and the workers inside
SPINS = 1_000  # looks for work before a worker sleeps: 0.1 to 0.2 ms, since it costs 0.1 to wake it
PAUSES = 10  # between looks, so that they take nothing from the core's other thread
PATIENCE = 2_000  # looks for the last worker's end before its core is offered to it
MOST_NAP = 5_000  # microseconds between looks, where there is no futex

Threads = tuple[int, int]  # how many cores, and the address of the pool where they meet
WORD, VOID = ir.IntType(64), ir.VoidType()
SHARE = ir.FunctionType(VOID, [WORD, WORD, WORD])  # arguments, number of the share, of how many


@intrinsic
def pack(typing_context, function, arguments):
    """Addresses of function(*arguments, i, count) as a SHARE, and of its arguments. They are good as
    long as the calling function runs."""
    kinds = (*arguments.types, types.int64, types.int64)
    inner = function.get_call_type(typing_context, kinds, {})

    def codegen(context, builder, signature, args):
        compiled = function.dispatcher.overloads[tuple(inner.args)]
        context.active_code_library.add_linking_library(compiled.library)
        place = cgutils.alloca_once_value(builder, args[1])
        name = builder.module.get_unique_name(f"share_of_{function.dispatcher.py_func.__name__}")
        share = ir.Function(builder.module, SHARE, name)
        share.linkage = "internal"
        inside = ir.IRBuilder(share.append_basic_block("entry"))
        packed = inside.load(inside.inttoptr(share.args[0], place.type))
        values = [inside.extract_value(packed, i) for i in range(len(arguments.types))]
        target = context.declare_function(builder.module, compiled.fndesc)
        values = [*values, *share.args[1:]]
        context.call_conv.call_function(inside, target, inner.return_type, inner.args, values)
        inside.ret_void()
        addresses = [builder.ptrtoint(pointer, WORD) for pointer in (share, place)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.int64, 2)(function, arguments), codegen


@intrinsic
def run_share(typing_context, share, arguments, number, count):
    def codegen(context, builder, signature, args):
        builder.call(builder.inttoptr(args[0], SHARE.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@helper
def run_shares(pool):
    """Take shares of what is to be done, until none is left."""
    job = int64_array(pool + JOB, (3,))
    share, arguments, count = job[0], job[1], job[2]
    number = add(pool + NEXT, 1)
    while number < count:
        run_share(share, arguments, number, count)
        number = add(pool + NEXT, 1)


@helper
def spread(function, arguments, num_threads, pool):
    """function(*arguments, i, num_threads) for every i below num_threads, each once, in any order and
    on any core. The function is a `helper`, and raises nothing.

    An array goes in as such: of one whose address alone is among the arguments, numba does not know
    that it is used, and lets it go.
    """
    share, place = pack(function, arguments)
    if num_threads == 1 or not replace(pool + OWNER, 0, 1):
        for number in range(num_threads):
            run_share(share, place, number, num_threads)
        return
    job = int64_array(pool + JOB, (3,))
    job[0], job[1], job[2] = share, place, num_threads
    store(pool + NEXT, 0)
    add(pool + STATE, GENERATION)
    wake_sleepers(pool + STATE, pool + SLEEPERS)
    run_shares(pool)
    add(pool + STATE, GENERATION)
    looks = 0
    while load(pool + STATE) & INSIDE:
        looks += 1
        if looks > PATIENCE:
            sched_yield()
        pause()
    store(pool + OWNER, 0)


@kernel(nogil=True)
def pool_worker(pool):
    """What a worker does until the pool is stopped."""
    seen, left, nap = 0, SPINS, 50
    while load(pool + STOPPED) == 0:
        state = load(pool + STATE)
        generation = state // GENERATION
        if generation % 2 == 1 and generation != seen:
            if replace(pool + STATE, state, state + 1):
                run_shares(pool)
                add(pool + STATE, -1)
                seen, left, nap = generation, SPINS, 50
        elif left > 0:
            left -= 1
            sched_yield()  # another thread, say the one that prepares the next step, may want the core
            for _ in range(PAUSES):
                pause()
        elif FUTEX:
            sleep_while(pool + STATE, state, pool + SLEEPERS, 0)
            left = SPINS
        else:
            usleep(nap)
            nap = min(2 * nap, MOST_NAP)


@kernel
def pool_stop(pool):
    """Workers end as soon as they have no share."""
    store(pool + STOPPED, 1)
    add(pool + STATE, 2 * GENERATION)
    wake_sleepers(pool + STATE, pool + SLEEPERS)


class Pool:
    """The process's workers. They start when they are first asked for, and end with the process; a
    forked process has none until it asks for them."""

    def __init__(self) -> None:
        self.memory = np.zeros(POOL_BYTES + 128, np.uint8)
        self.address = -(-self.memory.ctypes.data // 128) * 128
        self.workers: list[threading.Thread] = []

    def forget(self) -> None:
        """The workers are another process's: a kernel does without."""
        self.memory[:] = 0
        self.workers = []

    def threads(self, num_threads: int) -> Threads:
        """So many cores: the calling one, and workers, which are there from now on."""
        if not self.workers:
            for needed in (pool_worker, pool_stop):  # before a request, or the end, waits for it
                needed.dispatcher.compile(needed.dispatcher._cache.signature)
        while len(self.workers) < num_threads - 1:
            worker = threading.Thread(
                target=pool_worker, args=(self.address,), name="kernels", daemon=True
            )
            worker.start()
            self.workers.append(worker)
        return num_threads, self.address

    def stop(self) -> None:
        if self.workers:
            pool_stop(self.address)
        for worker in self.workers:
            worker.join()
        self.workers = []


ALONE: Threads = (1, 0)
POOL = Pool()


def threads_of_pool(num_threads: int) -> Threads:
    """So many cores of the process's pool."""
    return POOL.threads(num_threads) if num_threads > 1 else ALONE


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget)
atexit.register(POOL.stop)
