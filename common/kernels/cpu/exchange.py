"""Ranks of one host exchange data through memory that they share: put, wait, take.

The memory begins with one page of flags: for every rank 128 bytes, the number of its last round at
their begin, and how many sleep until it changes at byte 64. Then come two slots a rank, used in
turns: a header of HEADER bytes (what the rank does, of how many bytes in all, a table), and
`slot_bytes` of data.

A rank that puts round n into its slot has finished reading round n - 1. So a slot may be written
for round n as soon as every other rank has put round n - 1: none reads what the slot held in round
n - 2. All ranks run all rounds.

A rank that waits spins for some microseconds, then sleeps in the kernel (futex) until the other
wakes it. Kernels that may sleep let go of the interpreter's lock.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import byte_array, float32_array, helper, int64_array, kernel

FLAG_BYTES, SLEEPERS = 128, 64
HEADER = 1024  # bytes: what, bytes in all, then the table
MAX_RANKS = HEADER // 8 - 2

# The system call's number. Elsewhere a waiting rank sleeps for a while and looks again.
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
FUTEX_WAIT, FUTEX_WAKE, ALL_SLEEPERS = 0, 1, 2**31 - 1
IS_X86 = platform.machine() in ("x86_64", "AMD64")

_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_usleep = types.ExternalFunction("usleep", types.int32(types.int64))


@intrinsic
def load(typing_context, address):
    """The int64 at an address; what was written before it was stored there is seen after."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def store(typing_context, address, value):
    """Store an int64 after all that was written before, and before all that is loaded after."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        builder.store_atomic(args[1], place, "seq_cst", 8)
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def add(typing_context, address, value):
    """Add to the int64 at an address, atomically."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        builder.atomic_rmw("add", place, args[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def pause(typing_context):
    """Leave the core's other thread some cycles."""

    def codegen(context, builder, signature, args):
        if IS_X86:
            instruction = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, instruction, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@helper
def missing_rank(memory, size, rank, target, spins):
    """The first other rank that has not put round `target`, after so many looks; -1 if all have."""
    for other in range(size):
        if other != rank:
            flag = memory + other * FLAG_BYTES
            left = spins
            while load(flag) < target:
                if left == 0:
                    return other
                left -= 1
                pause()
    return -1


@helper
def slot_of(memory, size, rank, number, slot_bytes):
    """Where a rank's slot of a round begins, with its header."""
    return (
        memory
        + 4096 * ((size * FLAG_BYTES + 4095) // 4096)
        + (2 * rank + (number & 1)) * (HEADER + slot_bytes)
    )


@helper
def copy(to, source, num_bytes):
    words = num_bytes // 8
    int64_array(to, (words,))[:] = int64_array(source, (words,))
    done = 8 * words
    if done < num_bytes:
        for i in range(done, num_bytes):
            byte_array(to, (num_bytes,))[i] = byte_array(source, (num_bytes,))[i]


@helper
def publish(memory, rank, number):
    """Say that this rank has put a round, and wake the ranks that sleep until then."""
    flag = memory + rank * FLAG_BYTES
    store(flag, number)
    if FUTEX and load(flag + SLEEPERS) != 0:
        _syscall(FUTEX, flag, FUTEX_WAKE, ALL_SLEEPERS, 0, 0, 0)


@helper
def write_slot(memory, size, rank, number, slot_bytes, what, total, source, num_bytes):
    slot = slot_of(memory, size, rank, number, slot_bytes)
    header = int64_array(slot, (2,))
    header[0], header[1] = what, total
    copy(slot + HEADER, source, num_bytes)


@helper
def add_slots(memory, size, number, slot_bytes, offset, out, count):
    """out = the sum over all ranks, in their order, of so many float32 from a byte offset on."""
    into = float32_array(out, (count,))
    first = slot_of(memory, size, 0, number, slot_bytes) + HEADER + offset
    second = slot_of(memory, size, 1, number, slot_bytes) + HEADER + offset
    a, b = float32_array(first, (count,)), float32_array(second, (count,))
    for i in range(count):
        into[i] = a[i] + b[i]
    for rank in range(2, size):
        more = slot_of(memory, size, rank, number, slot_bytes) + HEADER + offset
        c = float32_array(more, (count,))
        for i in range(count):
            into[i] += c[i]


@kernel(parallel=False)
def exchange_put(
    memory, size, rank, number, slot_bytes, what, total, source, num_bytes, table, spins
):
    """Put a round; table: address of `size` int64s for the header, or 0. Returns -1, or the rank
    that is missed: then nothing is done."""
    missing = missing_rank(memory, size, rank, number - 1, spins)
    if missing >= 0:
        return missing
    write_slot(memory, size, rank, number, slot_bytes, what, total, source, num_bytes)
    if table != 0:
        copy(slot_of(memory, size, rank, number, slot_bytes) + 16, table, 8 * size)
    publish(memory, rank, number)
    return -1


@kernel(parallel=False)
def exchange_sum(memory, size, number, slot_bytes, offset, out, count):
    """See `add_slots`."""
    add_slots(memory, size, number, slot_bytes, offset, out, count)


@kernel(parallel=False)
def exchange_all_reduce(memory, size, rank, number, slot_bytes, what, total, x, count, spins):
    """Put float32 x, and replace it by the sum, if all goes fast. Returns -1 then; else a rank r
    that is missed before putting: r; after: size + r; that does something else: 2 size + r."""
    missing = missing_rank(memory, size, rank, number - 1, spins)
    if missing >= 0:
        return missing
    write_slot(memory, size, rank, number, slot_bytes, what, total, x, 4 * count)
    publish(memory, rank, number)
    missing = missing_rank(memory, size, rank, number, spins)
    if missing >= 0:
        return size + missing
    for other in range(size):
        header = int64_array(slot_of(memory, size, other, number, slot_bytes), (2,))
        if header[0] != what or header[1] != total:
            return 2 * size + other
    add_slots(memory, size, number, slot_bytes, 0, x, count)
    return -1


@kernel(parallel=False, nogil=True)
def exchange_wait(memory, size, rank, only, target, spins, limit):
    """Wait until every other rank, or only one, has put round `target`. Returns -1, or a rank that
    has not when the time is over. limit: address of a timespec, the longest sleep."""
    for other in range(size):
        if other == rank or (only >= 0 and other != only):
            continue
        flag = memory + other * FLAG_BYTES
        for _ in range(spins):
            if load(flag) >= target:
                break
            pause()
        tries = 0
        while True:
            seen = load(flag)
            if seen >= target:
                break
            if tries == 3:  # a rank may come one round before the awaited one, and wake us then
                return other
            if FUTEX:
                add(flag + SLEEPERS, 1)
                _syscall(FUTEX, flag, FUTEX_WAIT, seen & 0xFFFFFFFF, limit, 0, 0)
                add(flag + SLEEPERS, -1)
            else:
                _usleep(100)
            tries += 1
    return -1
