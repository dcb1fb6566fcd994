"""Where compiled CPU kernels are kept: with the user, not with the clone that compiled them.

A generation is a folder, `kernels-<hash>`, with one file a kernel. The hash is over all that the
machine code depends on: the kernels' sources, the versions of Python, numba and LLVM, and the CPU.
So a second clone finds what the first has compiled, and a changed source never finds old code.
(numba's own cache goes by the path and date of one source file: other clones would not find it, and
it would keep a kernel whose helpers in other files have changed.)

A file appears whole, by one rename: a process may be killed at any time, and two may compile at
once. A folder that is complete is only read.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import pickle
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from common.models.embedded import cache_dir
from common.sampling import _MULTIPLIERS, _WEYL

SOURCES = Path(__file__).parent
COMPLETE = "complete"  # a file that appears when every kernel is there
KEPT = 4  # generations: those of some branches, or of two versions of Python


def generation() -> str:
    """The folder's name: another one for every other code, compiler or CPU."""
    config = numba.config
    compiler = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__)
    target = (sys.platform, platform.machine(), config.CPU_NAME, config.CPU_FEATURES)
    host = (llvm.get_host_cpu_name(), sorted(llvm.get_host_cpu_features().items()))
    options = (str(config.OPT), config.LOOP_VECTORIZE, config.SLP_VECTORIZE)
    digest = hashlib.sha256(repr((compiler, target, host, options)).encode())
    digest.update(repr((_MULTIPLIERS, _WEYL)).encode())  # the constants that kernels import
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}"


@functools.cache
def cache_folder() -> Path:
    """This generation's folder: in $NUMBA_CACHE_DIR if set, else in the user's cache directory.

    Where neither can be written (and does not hold everything), a temporary folder, with a line.
    """
    bases = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    bases.append(cache_dir())
    problem: object = None
    for base in bases:
        folder = base / generation()
        if (folder / COMPLETE).exists():
            with contextlib.suppress(OSError):
                os.utime(folder)  # in use: not the one to be dropped
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            problem = error.strerror or error
            continue
        return folder
    print(
        f"CPU kernels are compiled anew at every start: cannot write {bases[-1]} ({problem};"
        " FIFTEEN_ENGINES_CACHE names another folder)",
        file=sys.stderr,
        flush=True,
    )
    try:
        base = Path(tempfile.mkdtemp(prefix="fifteen-engines-"))
        (base / generation()).mkdir()
    except OSError:
        return Path(os.devnull) / generation()  # nothing is kept, not even for this process
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    return base / generation()


def mark_complete() -> None:
    """Every kernel is there. Older generations go, but for the newest few."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        (folder / COMPLETE).touch()
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        others = [path for path in folder.parent.glob("kernels-*") if path != folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[KEPT - 1 :]:
            shutil.rmtree(path, ignore_errors=True)


class KernelCache:
    """One kernel's machine code on disk, in the form in which numba asks its dispatchers' caches.

    It holds one signature: kernels have one.
    """

    def __init__(self, name: str, signature: tuple[Any, ...]) -> None:
        self.name, self.signature = name, signature

    @property
    def path(self) -> Path:
        return cache_folder() / f"{self.name}.nbc"

    @property
    def cache_path(self) -> str:
        return str(self.path)

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        """The kernel, ready to run; None where there is none, or none that can be read."""
        if tuple(signature) != self.signature:
            return None
        target_context.refresh()
        try:
            payload = pickle.loads(self.path.read_bytes())
            return CompileResult._rebuild(target_context, *payload)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file may raise anything
            print(f"{self.path} cannot be read ({error!r}): compiling again", file=sys.stderr)
            return None

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        """Keep a kernel that has just been compiled; on a full disk it is merely not kept."""
        if tuple(signature) != self.signature:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(dumps(result._reduce()))
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)  # others may read a folder that is shared
                os.replace(temporary, self.path)
            except OSError:
                Path(temporary).unlink()
                raise

    def enable(self) -> None:
        """Always is."""

    def disable(self) -> None:
        raise NotImplementedError("a kernel's cache cannot be turned off")

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
