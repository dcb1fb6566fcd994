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

from common.kernels.cpu.atomics import (
    FUTEX,
    load,
    pause,
    sleep_while,
    store,
    usleep,
    wake_sleepers,
)
from common.kernels.cpu.jit import byte_array, float32_array, helper, int64_array, kernel

FLAG_BYTES, SLEEPERS = 128, 64
HEADER = 1024  # bytes: what, bytes in all, then the table
MAX_RANKS = HEADER // 8 - 2


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
    wake_sleepers(flag, flag + SLEEPERS)


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


@kernel
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


@kernel
def exchange_sum(memory, size, number, slot_bytes, offset, out, count):
    """See `add_slots`."""
    add_slots(memory, size, number, slot_bytes, offset, out, count)


@kernel
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


@kernel(nogil=True)
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
                sleep_while(flag, seen, flag + SLEEPERS, limit)
            else:
                usleep(100)
            tries += 1
    return -1
