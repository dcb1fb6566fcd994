"""Many pieces of memory copied in one call, without the interpreter's lock.

A C library's memcpy writes past the caches only when a copy is larger than most of them; a smaller
one first reads each line that it is going to overwrite, which costs a third of the memory's rate.
Pieces of a KV cache are small, but many, and nobody needs them in the caches: here they are written
past them.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import byte_array, int64_array, kernel

VECTOR = 32  # bytes
UNROLLED = 4  # vectors in a round
ROUND = VECTOR * UNROLLED


@intrinsic
def stream(typing_context, source, target, num_bytes):
    """Copy a multiple of ROUND bytes between addresses that are multiples of VECTOR."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(64), VECTOR // 8)
        past = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        number = args[2].type

        def place(address, offset, i):
            address = builder.add(builder.add(address, offset), ir.Constant(number, i * VECTOR))
            return builder.inttoptr(address, vector.as_pointer())

        rounds = builder.udiv(args[2], ir.Constant(number, ROUND))
        with cgutils.for_range(builder, rounds) as loop:
            offset = builder.mul(loop.index, ir.Constant(number, ROUND))
            values = [
                builder.load(place(args[0], offset, i), align=VECTOR) for i in range(UNROLLED)
            ]
            for i, value in enumerate(values):
                written = builder.store(value, place(args[1], offset, i), align=VECTOR)
                written.set_metadata("nontemporal", past)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def fence(typing_context):
    """What was written past the caches is there before anything that is written after."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@kernel(nogil=True)
def copy_pieces(sources, targets, count, num_bytes):
    """From each of `count` addresses (int64 at `sources`) to that at the same place of `targets`."""
    from_, to = int64_array(sources, (count,)), int64_array(targets, (count,))
    for i in range(count):
        if from_[i] % VECTOR == 0 and to[i] % VECTOR == 0 and num_bytes % ROUND == 0:
            stream(from_[i], to[i], num_bytes)
        else:
            byte_array(to[i], (num_bytes,))[:] = byte_array(from_[i], (num_bytes,))
    fence()
