"""Words of memory that several threads, or processes, read and write, and sleeping until one changes."""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import helper

# The system call's number. Elsewhere one who waits sleeps for a while and looks again.
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0)
FUTEX_WAIT, FUTEX_WAKE, ALL_SLEEPERS = 0, 1, 2**31 - 1
IS_X86 = platform.machine() in ("x86_64", "AMD64")

syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
usleep = types.ExternalFunction("usleep", types.int32(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())


def place_of(context, builder, address):
    return builder.inttoptr(address, context.get_value_type(types.int64).as_pointer())


@intrinsic
def load(typing_context, address):
    """The int64 at an address; what was written before it was stored there is seen after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(place_of(context, builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def store(typing_context, address, value):
    """Store an int64 after all that was written before, and before all that is loaded after."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], place_of(context, builder, args[0]), "seq_cst", 8)
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def add(typing_context, address, value):
    """Add to the int64 at an address, atomically, and return what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", place_of(context, builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def replace(typing_context, address, old, new):
    """Store `new` at an address if `old` is there, atomically. Whether it was."""

    def codegen(context, builder, signature, args):
        place = place_of(context, builder, args[0])
        result = builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.intp, types.int64, types.int64), codegen


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
def sleep_while(address, seen, sleepers, limit):
    """Sleep until the int64 at an address is no longer `seen` in its lower half, and somebody wakes us.

    sleepers: address of how many sleep. limit: address of a timespec, the longest sleep, or 0.
    """
    add(sleepers, 1)
    if load(address) == seen:
        syscall(FUTEX, address, FUTEX_WAIT, seen & 0xFFFFFFFF, limit, 0, 0)
    add(sleepers, -1)


@helper
def wake_sleepers(address, sleepers):
    """Wake all that sleep until the word changes, where there are any."""
    if FUTEX and load(sleepers) != 0:
        syscall(FUTEX, address, FUTEX_WAKE, ALL_SLEEPERS, 0, 0, 0)
