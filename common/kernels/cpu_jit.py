"""How the CPU kernels are compiled, cached and given their memory.

Kernels take addresses and sizes, all plain numbers: marshalling a tensor as an array costs about a
microsecond, an address a tenth of it, and a decode step makes some 270 calls. So there is one
signature a kernel, and it is compiled once for good: the code is kept beside the package, or in the
user's cache where that folder is read-only, under a hash of the kernels' sources (numba itself
looks at one file only, and would keep a kernel whose helpers in other files have changed).

Kernels hold the interpreter's lock: they are short, and a lock let go 270 times a step is waited
for 270 times when another Python thread is busy.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# How often an idle worker of GNU's OpenMP looks for work before it sleeps: some 70 microseconds, so
# that workers stay awake within a step. Asleep at once, a parallel region costs 90 microseconds
# more on a quiet machine; awake for longer, one costs milliseconds when other processes (or the
# workers of PyTorch's own pool) want the cores. Read when that library is loaded, so set before.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import llvmlite.binding as llvm
import numba
from numba import carray, types
from numba.extending import intrinsic

SOURCES = Path(__file__).parent
FEATURES = llvm.get_host_cpu_features() if not numba.config.CPU_NAME else {}


def source_hash() -> str:
    """Changes whenever the source of a CPU kernel does."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("cpu*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def find_cache_folder() -> Path | None:
    """The first folder that can be written: $NUMBA_CACHE_DIR, the package's, the user's; or None."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = [SOURCES / "__pycache__", user / "fifteen-engines"]
    if numba.config.CACHE_DIR:
        candidates.insert(0, Path(numba.config.CACHE_DIR))
    for folder in candidates:
        folder = folder / f"kernels-{source_hash()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


CACHE_FOLDER = find_cache_folder()


@contextmanager
def _caching_in(folder: Path | None) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def kernel(function: Callable | None = None, *, exact: bool = False) -> Callable:
    """Compile a function that Python calls; it may hold parallel loops, and is cached on disk.

    exact: keep to IEEE arithmetic (infinities, NaN, order of operations).
    """
    if function is None:
        return lambda function: kernel(function, exact=exact)
    options = {"parallel": True, "fastmath": not exact, "error_model": "numpy"}
    with _caching_in(CACHE_FOLDER):
        return numba.njit(function, cache=CACHE_FOLDER is not None, **options)


def helper(function: Callable | None = None, *, exact: bool = False) -> Callable:
    """Compile a function that kernels call; its code becomes part of theirs."""
    if function is None:
        return lambda function: helper(function, exact=exact)
    return numba.njit(function, fastmath=not exact, error_model="numpy")


def _pointer(element: types.Type) -> Callable:
    @intrinsic
    def pointer(typing_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.intp), codegen

    return pointer


_float32_pointer = _pointer(types.float32)
_int32_pointer = _pointer(types.int32)
_int64_pointer = _pointer(types.int64)


@helper
def float32_array(address, shape):
    """A C-contiguous float32 array of that shape, at that address."""
    return carray(_float32_pointer(address), shape)


@helper
def int32_array(address, shape):
    return carray(_int32_pointer(address), shape)


@helper
def int64_array(address, shape):
    return carray(_int64_pointer(address), shape)


@intrinsic
def next_index(typing_context, address):
    """Add one to the int64 at an address, atomically, and return what was there.

    Threads draw their next piece of work with it, so that one slowed by another process gets less.
    """

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", place, one, "monotonic")

    return types.int64(types.intp), codegen
