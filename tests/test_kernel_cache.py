"""The CPU kernels are compiled once for a user: any clone finds them, and nothing half-done stays.

Compiling all of them takes a minute or two, so these tests compile the smallest, or none.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
from common.kernels.cpu import cache as cpu_cache
from common.kernels.cpu import compile as cpu_compile
from common.kernels.cpu.jit import KERNELS

ROOT = Path(common.__file__).parents[1]
SMALLEST, SMALL = "pool_stop", "exchange_wait"
COUNT = """
from common.distributed.shared_memory import load_kernels
from common.kernels.cpu import compile as cpu_compile
from common.kernels.cpu.ops import CpuOps
from common.kernels.cpu.pool import threads_of_pool
CpuOps(1)
load_kernels()
threads_of_pool(2)
for name in ("copy_pieces", "replay"):
    cpu_compile.compile_kernel(name)
stats = [k.stats for k in cpu_compile.KERNELS.values()]
print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""


def python(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run Python on the tree at `root`."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )


@pytest.fixture(scope="module")
def filled() -> Path:
    """The folder of this generation, with every kernel in it."""
    cpu_compile.compile_missing()
    return cpu_cache.cache_folder()


@pytest.fixture
def base(filled: Path, tmp_path: Path) -> Path:
    """A cache of one's own, with every kernel in it."""
    shutil.copytree(filled, tmp_path / "cache" / filled.name)
    return tmp_path / "cache"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that this process uses, too."""
    monkeypatch.setattr(cpu_cache.numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    cpu_cache.cache_folder.cache_clear()
    yield cpu_cache.cache_folder()
    cpu_cache.cache_folder.cache_clear()


def test_another_clone_finds_the_kernels(base: Path, tmp_path: Path) -> None:
    clone = tmp_path / "another" / "clone"
    shutil.copytree(ROOT / "common", clone / "common", ignore=shutil.ignore_patterns("__pycache__"))
    where = python("-c", "import common; print(common.__file__)", root=clone)
    assert where.stdout.startswith(str(clone)), where.stderr
    done = python("-c", COUNT, root=clone, NUMBA_CACHE_DIR=str(base))
    assert done.stdout.split() == [str(len(KERNELS)), "0"], done.stderr


def test_a_changed_source_is_another_generation(tmp_path: Path, monkeypatch) -> None:
    before = cpu_cache.generation()
    for path in cpu_cache.SOURCES.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(cpu_cache, "SOURCES", tmp_path)
    assert (
        cpu_cache.generation() == before
    )  # where they lie, and when they were written, is nothing
    with (tmp_path / "vector.py").open("a") as file:
        file.write("# another helper\n")
    changed = cpu_cache.generation()
    monkeypatch.setattr(cpu_cache.numba, "__version__", "0.0")
    assert len({before, changed, cpu_cache.generation()}) == 3


def test_says_which_kernel_of_how_many(empty: Path, monkeypatch, capfd) -> None:
    names = (SMALLEST, SMALL)
    monkeypatch.setattr(cpu_compile, "KERNELS", {name: KERNELS[name] for name in names})
    cpu_compile.compile_missing()
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"CPU kernels: compiling 2 in [12] processes, once .*", lines[0])
    assert [re.sub(r"\(.*", "", line) for line in lines[1:]] == [
        "CPU kernels: 1 of 2 compiled ",
        "CPU kernels: 2 of 2 compiled ",
    ]
    assert sorted(name for name in names if name in "\n".join(lines)) == sorted(names)
    assert {path.name for path in empty.iterdir()} - {"lock"} == {
        "complete", f"{SMALLEST}.nbc", f"{SMALL}.nbc",
    }  # fmt: skip
    cpu_compile.compile_missing()
    assert capfd.readouterr().err == ""


def test_what_processes_cannot_compile_is_compiled_here(empty: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(cpu_compile, "KERNELS", {SMALLEST: KERNELS[SMALLEST]})
    monkeypatch.setattr(cpu_compile.sys, "executable", "/nowhere/python")
    compiled = []
    monkeypatch.setattr(cpu_compile, "compile_kernel", compiled.append)
    cpu_compile.compile_missing()
    assert compiled == [SMALLEST]
    assert "No such file" in capfd.readouterr().err


def test_a_killed_compiler_leaves_nothing_broken(tmp_path: Path) -> None:
    """It is killed again and again, at other moments; what is there afterwards can be used."""
    code = f"""
from common.kernels.cpu import compile as cpu_compile
cpu_compile.KERNELS = {{"{SMALLEST}": cpu_compile.KERNELS["{SMALLEST}"]}}
print("ready", flush=True)
cpu_compile.compile_missing()
kernel = cpu_compile.KERNELS["{SMALLEST}"]
cpu_compile.compile_kernel("{SMALLEST}")
print(sum(kernel.stats.cache_misses.values()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    for delay in (0.0, 2.0):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    done = python("-c", code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout.split() == ["ready", "0"], done.stderr
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"cos\nnothing\n.", None])
def test_a_file_that_is_damaged_or_gone_is_not_used(
    filled: Path, empty: Path, content: bytes | None, capfd
) -> None:
    kernel = KERNELS[SMALLEST]
    cache, whole = kernel._cache, (filled / f"{SMALLEST}.nbc").read_bytes()
    cache.path.write_bytes(whole)
    assert cache.load_overload(cache.signature, kernel.targetctx) is not None
    if content is None:
        cache.path.unlink()
    else:
        cache.path.write_bytes(content)
    capfd.readouterr()
    assert cache.load_overload(cache.signature, kernel.targetctx) is None
    assert (str(cache.path) in capfd.readouterr().err) == (content is not None)


def test_a_damaged_file_is_compiled_again(empty: Path) -> None:
    code = (
        "from common.kernels.cpu.compile import KERNELS, compile_kernel\n"
        f"compile_kernel({SMALLEST!r})\n"
        f"print(sum(KERNELS[{SMALLEST!r}].stats.cache_misses.values()))\n"
    )
    kernel = KERNELS[SMALLEST]
    kernel._cache.path.write_bytes(b"half a file")
    done = python("-c", code, NUMBA_CACHE_DIR=str(empty.parent))
    assert done.stdout.strip() == "1", done.stderr
    assert kernel._cache.load_overload(kernel._cache.signature, kernel.targetctx) is not None
    assert [path.name for path in empty.iterdir()] == [kernel._cache.path.name]


def test_two_processes_compile_a_kernel_once(tmp_path: Path) -> None:
    code = f"""
from common.kernels.cpu import compile as cpu_compile
cpu_compile.KERNELS = {{"{SMALLEST}": cpu_compile.KERNELS["{SMALLEST}"]}}
cpu_compile.compile_missing()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], lines
    assert "".join(lines).count("1 of 1 compiled") == 1, lines


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "from common.kernels.cpu.cache import cache_folder\nprint(cache_folder().is_dir(), cache_folder())"
    place = tmp_path / "file" / "below"
    done = python("-c", code, NUMBA_CACHE_DIR="", FIFTEEN_ENGINES_CACHE=str(place))
    is_there, folder = done.stdout.split()
    assert is_there == "True" and not Path(folder).exists(), done.stderr
    assert re.fullmatch(rf"CPU kernels .*cannot write {place} .*\n", done.stderr), done.stderr


def test_a_complete_folder_is_only_read(base: Path) -> None:
    """As in a container's image that has them: each kernel is loaded, no line, nothing compiled."""
    code = (
        "import pathlib, tempfile\n"
        "def refuse(*args, **kwargs): raise PermissionError('read-only')\n"
        "pathlib.Path.mkdir = pathlib.Path.touch = tempfile.TemporaryFile = tempfile.mkstemp = refuse\n"
    )
    done = python("-c", code + COUNT, NUMBA_CACHE_DIR=str(base))
    assert done.stdout.split() == [str(len(KERNELS)), "0"], done.stderr
    assert done.stderr == ""


def test_only_the_newest_generations_stay(empty: Path) -> None:
    others = [empty.parent / f"kernels-{number}" for number in range(7)]
    for number, path in enumerate(others):
        path.mkdir()
        (path / "norm.nbc").touch()
        os.utime(path, (number, number))
    (empty.parent / "smollm2-135m-v1").mkdir()
    (empty / "half.tmp").touch()
    cpu_cache.mark_complete()
    left = {path.name for path in empty.parent.iterdir()}
    assert left == {empty.name, "smollm2-135m-v1", "kernels-4", "kernels-5", "kernels-6"}
    assert [path.name for path in empty.iterdir()] == ["complete"]
