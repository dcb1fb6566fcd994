"""Compiling the CPU kernels: once for a user, in processes side by side, and saying how far it is.

`python -m common.kernels.cpu.compile` does it ahead of time; otherwise the first `CpuOps` does.

numba compiles under one lock, so threads would take turns. Each process here takes one kernel after
another, the dearest first, and what it has compiled reaches the others through the cache alone. With
`--child` this module is such a process: it reads names of kernels from its standard input, and
writes each to its standard output when it is done. It runs nothing of what it compiles, and so may
leave out what only running needs (see `skip_helpers`): that halves the work.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout
from numba.core import codegen

import common
from common.device import usable_cores

# Every module that defines kernels, so that KERNELS has them all.
from common.kernels.cpu import (  # noqa: F401
    attention,
    copies,
    elementwise,
    exchange,
    experts,
    integer_embedding,
    integer_linear,
    launches,
    linear,
    pool,
    quantized_experts,
    quantized_linear,
    sampler,
)
from common.kernels.cpu.cache import cache_folder, mark_complete
from common.kernels.cpu.jit import KERNELS

# What only spreads the work over cores, or is all that each of them does.
WRAPPERS = ("spread", "work", "sample_rows", "filter_rows")
DEAREST = (
    "attention",
    "sample",
    "quantized_experts",
    "quantized_linear",
    "experts",
    "integer_linear",
    "linear",
)


def missing() -> list[str]:
    """The kernels that the cache does not hold, the dearest first."""
    names = [name for name in KERNELS if not KERNELS[name]._cache.path.exists()]
    return sorted(names, key=lambda name: DEAREST.index(name) if name in DEAREST else len(DEAREST))


def compile_missing() -> None:
    """Fill the cache; one process at a time does, others wait for it."""
    if not missing():
        return
    lock = FileLock(cache_folder() / "lock")
    try:
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            say("waiting for another process, which is compiling them")
            lock.acquire()
    except OSError as error:  # a file system without locks: at worst the work is done twice
        say(f"no lock in {cache_folder()} ({error})")
    try:
        names = missing()
        if names:
            Progress(names).compile_all()
            mark_complete()
    finally:
        lock.release()


def say(text: str) -> None:
    print(f"CPU kernels: {text}", file=sys.stderr, flush=True)


class Progress:
    """The kernels still to be compiled, and how many are."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.left = deque(names)
        self.num_done = 0
        self.lock = threading.Lock()
        self.start = time.perf_counter()

    def compile_all(self) -> None:
        """In processes; whatever they could not, here and now."""
        num_processes = min(usable_cores(), len(self.names))
        say(
            f"compiling {len(self.names)} in {num_processes} processes, once (one or two minutes) …"
        )
        children: list[subprocess.Popen] = []
        try:
            with ThreadPoolExecutor(num_processes) as pool:
                list(pool.map(self.run_child, [children] * num_processes))
        finally:
            for child in children:
                child.kill()  # only after an interrupt: otherwise it has ended
        for name in missing():
            compile_kernel(name)
            self.report(name)

    def run_child(self, children: list[subprocess.Popen]) -> None:
        """Have one process compile kernel after kernel. What goes wrong there is printed."""
        root = str(Path(common.__file__).parents[1])
        paths = filter(None, [root, os.environ.get("PYTHONPATH")])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "NUMBA_CACHE_DIR": str(cache_folder().parent),
        }
        command = [sys.executable, "-m", "common.kernels.cpu.compile", "--child"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            with subprocess.Popen(command, env=environment, **pipes) as child:
                children.append(child)
                while self.left:
                    name = self.left.popleft()
                    child.stdin.write(f"{name}\n")
                    child.stdin.flush()
                    if child.stdout.readline().strip() != name:
                        break  # it has died
                    self.report(name)
        except (OSError, IndexError) as error:  # no process to be had, or nothing left
            say(f"a compiling process: {error!r}")

    def report(self, name: str) -> None:
        with self.lock:
            self.num_done += 1
            seconds = time.perf_counter() - self.start
            say(f"{self.num_done} of {len(self.names)} compiled ({name}, {seconds:.0f} s)")


def compile_kernel(name: str) -> None:
    """Load a kernel from the cache, or compile it and put it there."""
    KERNELS[name].compile(KERNELS[name]._cache.signature)


def skip_helpers(kernels: set[str]) -> None:
    """From now on, make machine code of these kernels only: nothing compiled here can be run.

    numba links a helper's code into each caller, optimises it there again, and at every level makes
    machine code of all that lies below: eight times over for attention's inner loops. Only the
    outermost level's is used. And what merely wraps a parallel loop, or is all that a kernel calls,
    is optimised where it is linked in. Kernels run as fast (measured one by one).

    A numba whose insides have changed is left as it is, and takes its time.
    """
    library = codegen.JITCodeLibrary
    hooks = ("_finalize_final_module", "_optimize_final_module", "_finalize_dynamic_globals")
    if not all(hasattr(library, hook) for hook in hooks):
        return
    finalize, optimize = library._finalize_final_module, library._optimize_final_module
    set_environment = codegen.JITCPUCodegen.set_env

    def finalize_kernels(self: codegen.JITCodeLibrary) -> None:
        if self.name in kernels:
            return finalize(self)
        self._finalize_dynamic_globals()
        self._finalized = True

    def optimize_all_but_wrappers(self: codegen.JITCodeLibrary) -> None:
        if not self.name.startswith(WRAPPERS):
            optimize(self)

    def set_environment_of_kernels(self: codegen.JITCPUCodegen, name: str, value: object) -> None:
        if self._engine.is_symbol_defined(name):
            set_environment(self, name, value)

    library._finalize_final_module = finalize_kernels
    library._optimize_final_module = optimize_all_but_wrappers
    codegen.JITCPUCodegen.set_env = set_environment_of_kernels


def compile_what_is_asked_for() -> None:
    """Compile the kernels that standard input names. Ends with it, as when its parent has died."""
    skip_helpers(set(KERNELS))
    for line in sys.stdin:
        compile_kernel(line.strip())
        print(line.strip(), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        compile_what_is_asked_for() if sys.argv[1:] == ["--child"] else compile_missing()
