"""The folder of KV blocks: nothing but what was written comes back, whatever happens to the files."""

import errno
import hashlib
import inspect
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.kv_store import DiskStore, block_file
from common.testing.leaks import open_files

KEYS = [b"%d" % number * 8 for number in range(6)]
SIZES = [[3000], [1000, 700], [5000]]  # of a block's pieces
LAYOUTS = ["model A float32 16", "model B float32 16"]
LARGE = 1 << 20


def pieces_of(key: bytes, sizes: list[int], layout: str = LAYOUTS[0]) -> list[np.ndarray]:
    random = np.random.default_rng([*key, *layout.encode(), *sizes])
    return [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def room(sizes: list[int]) -> list[np.ndarray]:
    return [np.zeros(size, np.uint8) for size in sizes]


def is_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def bytes_in(folder: Path) -> int:
    """Of all files, temporary ones too."""
    return sum(path.lstat().st_size for path in folder.iterdir() if path.name != "lock")


def write(store: DiskStore, key: bytes, sizes: list[int] = SIZES[0]) -> bool:
    return store.write(key, pieces_of(key, sizes))


def read(store: DiskStore, key: bytes, sizes: list[int] = SIZES[0]) -> bool:
    """Whether it comes back; what comes back must be right."""
    into = room(sizes)
    found = store.read(key, into)
    assert not found or is_equal(into, pieces_of(key, sizes))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


# Against a model.


class Store(RuleBasedStateMachine):
    """The model: what was written in which layout, in the order of last use, and whether its file
    was tampered with since."""

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.folder = self.top / "kv"
        self.store: DiskStore | None = None
        self.files: OrderedDict[tuple[str, bytes], list[Any]] = OrderedDict()  # sizes, is damaged

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.top)

    def size(self, key: bytes, sizes: list[int]) -> int:
        pieces = room(sizes)
        return block_file.size_of(block_file.header_of(bytes(32), key, pieces), pieces)

    def path(self, layout: str, key: bytes) -> Path:
        other = DiskStore.__new__(DiskStore)  # a name needs no folder
        other.layout = hashlib.sha256(f"{block_file.VERSION} {layout}".encode()).digest()
        return self.folder / other.name(key)

    def make_room(self, size: int) -> None:
        held = {name: self.size(name[1], entry[0]) for name, entry in self.files.items()}
        while sum(held.values()) + size > self.capacity:
            name = next(iter(self.files))
            del self.files[name], held[name]

    @initialize(
        capacity=st.sampled_from([4000, 9000, 20000, LARGE]), layout=st.sampled_from(LAYOUTS)
    )
    def begin(self, capacity: int, layout: str) -> None:
        self.open(capacity, layout)

    def open(self, capacity: int, layout: str) -> None:
        self.capacity, self.layout = capacity, layout
        self.store = DiskStore(self.folder, capacity, layout)
        for name in [name for name in self.files if name[0] != layout][::-1]:
            self.files.move_to_end(name, last=False)
        for name in list(self.files):
            if self.size(name[1], self.files[name][0]) > capacity:
                del self.files[name]
        self.make_room(0)

    @rule(capacity=st.sampled_from([4000, 9000, 20000, LARGE]), layout=st.sampled_from(LAYOUTS))
    def restart(self, capacity: int, layout: str) -> None:
        self.store.close()
        assert read(self.store, KEYS[0]) is write(self.store, KEYS[0]) is (KEYS[0] in self.store)
        for name in [name for name, entry in self.files.items() if entry[1]]:
            del self.files[name]  # a scan finds other sizes of them: begin without
            path = self.path(*name)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(
                missing_ok=True
            )
        (self.folder / "77-1.tmp").write_bytes(b"left by a killed process")
        (self.folder / "notes.txt").write_text("not ours")
        self.open(capacity, layout)
        assert not list(self.folder.glob("*.tmp"))
        assert (self.folder / "notes.txt").read_text() == "not ours"
        (self.folder / "notes.txt").unlink()

    @rule(key=st.sampled_from(KEYS), sizes=st.sampled_from(SIZES))
    def write(self, key: bytes, sizes: list[int]) -> None:
        name = (self.layout, key)
        size = self.size(key, sizes)
        is_kept = self.store.write(key, pieces_of(key, sizes, self.layout))
        assert is_kept == (name in self.files or size <= self.capacity)
        if is_kept and name not in self.files:
            self.make_room(size)
            self.files[name] = [sizes, False]

    @rule(key=st.sampled_from(KEYS), sizes=st.sampled_from(SIZES))
    def read(self, key: bytes, sizes: list[int]) -> None:
        """Other sizes than it was written with are another layout: damage, that is, and it goes."""
        name, into = (self.layout, key), room(sizes)
        entry = self.files.get(name)
        is_right = entry is not None and entry == [sizes, False]
        assert self.store.read(key, into) == is_right
        if is_right:
            assert is_equal(into, pieces_of(key, sizes, self.layout))
            self.files.move_to_end(name)
        elif entry is not None:
            del self.files[name]

    @precondition(lambda self: any(not entry[1] for entry in self.files.values()))
    @rule(data=st.data())
    def tamper(self, data: Any) -> None:
        names = [name for name, entry in self.files.items() if not entry[1]]
        name = data.draw(st.sampled_from(names))
        how = data.draw(st.sampled_from(sorted(TAMPER)))
        path = self.path(*name)
        TAMPER[how](path, data.draw(st.integers(0, path.stat().st_size - 1)), self.top)
        self.files[name][1] = True

    @precondition(lambda self: len(self.files) > 1)
    @rule(data=st.data())
    def swap(self, data: Any) -> None:
        names = st.sampled_from(list(self.files))
        one, two = data.draw(names), data.draw(names)
        if one != two and not self.files[one][1] and not self.files[two][1]:
            paths = self.path(*one), self.path(*two)
            os.rename(paths[0], self.top / "between")
            os.rename(paths[1], paths[0])
            os.rename(self.top / "between", paths[1])
            self.files[one][1] = self.files[two][1] = True

    @invariant()
    def is_like_the_model(self) -> None:
        if self.store is None:
            return
        for key in KEYS:
            assert (key in self.store) == ((self.layout, key) in self.files), key
        expected = sum(self.size(name[1], entry[0]) for name, entry in self.files.items())
        stats = self.store.stats()
        assert (stats["num_blocks"], stats["num_bytes"]) == (len(self.files), expected)
        assert expected <= self.capacity
        if not any(entry[1] for entry in self.files.values()):
            assert bytes_in(self.folder) == expected
            assert {path.name for path in blocks_in(self.folder)} == {
                self.path(*name).name for name in self.files
            }


def flip(path: Path, at: int, top: Path) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 + at % 255
    path.write_bytes(data)


def truncate(path: Path, at: int, top: Path) -> None:
    os.truncate(path, at)


def extend(path: Path, at: int, top: Path) -> None:
    os.truncate(path, path.stat().st_size + 1 + at)


def delete(path: Path, at: int, top: Path) -> None:
    path.unlink()


def link(path: Path, at: int, top: Path) -> None:
    """To the very file that it was."""
    target = Path(tempfile.mkdtemp(dir=top)) / "target"
    os.rename(path, target)
    path.symlink_to(target)


def pipe(path: Path, at: int, top: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TAMPER = {f.__name__: f for f in (flip, truncate, extend, delete, link, pipe)}
Store.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestStore = Store.TestCase


# Single damages.


@pytest.mark.parametrize("how", sorted(TAMPER))
@pytest.mark.parametrize("at", [0, 40, 3000])
def test_a_file_that_was_tampered_with(folder: Path, how: str, at: int) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0]) and write(store, KEYS[1])
    TAMPER[how](folder / store.name(KEYS[0]), at, folder.parent)
    assert not read(store, KEYS[0]) and read(store, KEYS[1])
    assert KEYS[0] not in store and blocks_in(folder) == [folder / store.name(KEYS[1])]
    assert write(store, KEYS[0]) and read(store, KEYS[0])
    store.close()


def test_the_least_used_goes_first_also_after_a_restart(folder: Path, monkeypatch: Any) -> None:
    """Also where a clock was set back, and where files come from the future."""
    now = time.time_ns()
    times = iter([now + 10**18, *[now] * 100])
    monkeypatch.setattr("common.kv_store.disk.time.time_ns", lambda: next(times))
    store = DiskStore(folder, 3 * 3200, LAYOUTS[0])
    assert all(write(store, key) for key in KEYS[:3]) and read(store, KEYS[0])
    assert write(store, KEYS[3]) and [key in store for key in KEYS[:4]] == [True, False, True, True]
    assert read(store, KEYS[2])
    store.close()  # by last use now: 0, 3, 2
    store = DiskStore(folder, 3 * 3200, LAYOUTS[0])
    assert write(store, KEYS[4]) and KEYS[0] not in store
    store.close()
    store = DiskStore(folder, 3 * 3200, LAYOUTS[0])
    assert write(store, KEYS[5]) and [key in store for key in KEYS[2:]] == [True, False, True, True]
    store.close()
    for path in blocks_in(folder):
        assert path.stat().st_mtime_ns > now + 10**18 - 1000, "the future is behind the clock"


def test_use_is_kept_by_the_clock(folder: Path) -> None:
    """Times of last use are times, for whoever looks at the folder."""
    before = time.time_ns()
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0])
    assert before <= blocks_in(folder)[0].stat().st_mtime_ns <= time.time_ns()
    store.close()


def test_every_byte_of_a_file_counts(folder: Path) -> None:
    """A flipped bit anywhere, and every length but the right one."""
    sizes = [40, 9]
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0], sizes)
    [path] = blocks_in(folder)
    good = path.read_bytes()
    assert read(store, KEYS[0], sizes)
    bad = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(len(good))]
    bad += [good[:length] for length in range(len(good))]
    bad += [good + b"\0", good + good, bytes(len(good)), b"\xff" * len(good)]
    for data in bad:
        path.write_bytes(data)
        assert not read(store, KEYS[0], sizes)
        assert KEYS[0] not in store and not path.exists() and store.stats()["num_bytes"] == 0
        assert write(store, KEYS[0], sizes)
    assert path.read_bytes() == good
    assert store.stats()["num_damaged"] == len(bad)
    store.close()


@pytest.mark.parametrize("number", [0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_huge_sizes_in_a_header_are_not_believed(folder: Path, number: int) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    for at in range(5):
        assert write(store, KEYS[0], SIZES[1])
        [path] = blocks_in(folder)
        data = bytearray(path.read_bytes())
        data[8 + 8 * at : 16 + 8 * at] = number.to_bytes(8, "little")
        is_same = path.read_bytes() == data
        path.write_bytes(data)
        assert read(store, KEYS[0], SIZES[1]) == is_same
    store.close()


@pytest.mark.parametrize("huge", [1 << 33, 1 << 42])
def test_a_sparse_file_displaces_nothing(folder: Path, huge: int) -> None:
    """A file larger than all there may be is removed at the start, however new it is."""
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0]) and write(store, KEYS[1])
    store.close()
    os.truncate(blocks_in(folder)[0], huge)
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert len(blocks_in(folder)) == 1 and read(store, KEYS[0]) + read(store, KEYS[1]) == 1
    store.close()


@pytest.mark.parametrize("make", ["symlink", "fifo", "dir"])
def test_what_is_no_file_is_never_used(folder: Path, make: str) -> None:
    """Before the start, or in the place of a block that is to be written."""
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    path = folder / store.name(KEYS[0])
    outside = folder.parent / "outside"
    outside.write_bytes(b"untouched")
    {
        "symlink": lambda: path.symlink_to(outside),
        "fifo": lambda: os.mkfifo(path),
        "dir": path.mkdir,
    }[make]()
    assert write(store, KEYS[0]) == (make != "dir") == read(store, KEYS[0])
    store.close()
    if make != "dir":
        path.unlink()
        path.symlink_to(outside) if make == "symlink" else os.mkfifo(path)
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert KEYS[0] not in store and not read(store, KEYS[0])
    assert outside.read_bytes() == b"untouched"
    store.close()


def test_a_folder_in_a_blocks_place_is_forgotten(folder: Path) -> None:
    """It cannot be removed as a file can. It is looked at once, and blocks nothing but its name."""
    store = DiskStore(folder, 2 * 3200, LAYOUTS[0])
    assert write(store, KEYS[0]) and write(store, KEYS[1])
    for key in KEYS[:2]:
        (folder / store.name(key)).unlink()
        (folder / store.name(key)).mkdir()
    assert not read(store, KEYS[0]) and KEYS[0] not in store
    assert write(store, KEYS[2]) and write(store, KEYS[3]), "the other is evicted"
    assert not write(store, KEYS[0]) and store.stats()["num_failures"] == 1
    assert read(store, KEYS[3])
    store.close()


def test_another_version_is_another_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0])
    store.close()
    monkeypatch.setattr("common.kv_store.disk.VERSION", block_file.VERSION + 1)
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert KEYS[0] not in store and store.stats()["num_blocks"] == 1
    store.close()


def test_other_layouts_go_first_and_the_least_used_of_them(folder: Path) -> None:
    sizes = SIZES[0]
    for layout, keys in ((LAYOUTS[0], KEYS[:2]), (LAYOUTS[1], KEYS[2:4])):
        store = DiskStore(folder, LARGE, layout)
        assert all(store.write(key, pieces_of(key, sizes)) for key in keys)
        assert store.read(keys[0], room(sizes))
        store.close()
    one = blocks_in(folder)[0].stat().st_size
    store = DiskStore(folder, 4 * one, LAYOUTS[0])  # layout 1 is the newer and yet goes first
    names = {path.name for path in blocks_in(folder)}
    assert write(store, KEYS[4]) and write(store, KEYS[5])
    assert {path.name for path in blocks_in(folder)} < {
        *names,
        *(store.name(key) for key in KEYS),
    }
    assert all(key in store for key in (*KEYS[:2], *KEYS[4:6]))
    assert write(store, KEYS[2]), "now it is its own turn: the one that was not read"
    assert KEYS[1] not in store and KEYS[0] in store
    store.close()


# The folder.


def test_files_and_folder_are_closed_to_others(folder: Path) -> None:
    before = os.umask(0)
    try:
        store = DiskStore(folder / "deeper", LARGE, LAYOUTS[0])
        assert write(store, KEYS[0])
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "deeper").stat().st_mode) == 0o700
    for path in (folder / "deeper").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    store.close()


def test_an_empty_folder_is_closed_and_a_full_one_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    os.chmod(folder, 0o755)
    (folder / "mine.txt").write_text("a folder named by mistake")
    with pytest.raises(ValueError, match=r"^disk_kv \S+ is open to other users \(mode 0755\); "):
        DiskStore(folder, LARGE, LAYOUTS[0])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    (folder / "mine.txt").unlink()
    DiskStore(folder, LARGE, LAYOUTS[0]).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_users_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match=r"^disk_kv \S+ belongs to another user$"):
        DiskStore(folder, LARGE, LAYOUTS[0])


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300])
def test_no_folder(folder: Path, name: str) -> None:
    folder.mkdir(mode=0o700)
    (folder / "file").write_text("")
    before = open_files()
    with pytest.raises(ValueError, match=r"^disk_kv \S+ cannot be used: [A-Z][^\n]+$"):
        DiskStore(folder / name, LARGE, LAYOUTS[0])
    assert open_files() <= before


def test_a_link_or_pipe_for_a_lock_does_no_harm(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "lock").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="cannot be used"):
        DiskStore(folder, LARGE, LAYOUTS[0])
    assert not (folder.parent / "elsewhere").exists()


def test_one_process_at_a_time(folder: Path) -> None:
    """A second is refused in one line; a killed one has let go."""
    with child(folder, "print('open', flush=True); time.sleep(60)") as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=r"^disk_kv \S+ is in use by another process$"):
            DiskStore(folder, LARGE, LAYOUTS[0])
        process.kill()
        process.wait()
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    with pytest.raises(ValueError, match="in use"):
        DiskStore(folder, LARGE, LAYOUTS[0])
    store.close()
    store.close()
    before = open_files()
    DiskStore(folder, LARGE, LAYOUTS[0]).close()
    assert open_files() <= before


def test_a_folder_that_vanishes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0])
    shutil.rmtree(folder)
    assert not write(store, KEYS[1]) and not read(store, KEYS[0])
    assert store.stats()["num_bytes"] == 0
    store.close()
    assert len(caplog.messages) == 1


# A disk that fails.


class Fails:
    """Stands for a function of `os` that fails from its `after`-th call on."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, number: int, after: int = 0) -> None:
        self.left, self.real = after, getattr(os, name)
        self.number = number
        patch.setattr(os, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "after"),
    [("open", 0), ("write", 0), ("write", 1), ("write", 3), ("utime", 0), ("replace", 0)],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, after: int, number: int
) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0])
    before, descriptors = bytes_in(folder), open_files()
    with pytest.MonkeyPatch.context() as patch:
        Fails(patch, name, number, after)
        assert not write(store, KEYS[1], SIZES[1]) and not write(store, KEYS[2], SIZES[1])
    assert bytes_in(folder) == before == store.stats()["num_bytes"]
    assert open_files() <= descriptors
    assert KEYS[1] not in store and not read(store, KEYS[1], SIZES[1])
    assert store.stats()["num_failures"] == 2
    reason = os.strerror(number)
    assert caplog.messages == [f"disk_kv: a block's file could not be used: {reason}"]
    assert (
        write(store, KEYS[1], SIZES[1]) and read(store, KEYS[0]) and read(store, KEYS[1], SIZES[1])
    )
    store.close()


def test_files_that_cannot_be_removed_still_count(folder: Path) -> None:
    """A disk that has become read-only: nothing is evicted, nothing written, what is there is read."""
    store = DiskStore(folder, 8000, LAYOUTS[0])
    assert write(store, KEYS[0]) and write(store, KEYS[1])
    with pytest.MonkeyPatch.context() as patch:
        Fails(patch, "unlink", errno.EROFS)
        Fails(patch, "utime", errno.EROFS)
        assert not write(store, KEYS[2])
        assert read(store, KEYS[0]) and read(store, KEYS[1])
        for path in blocks_in(folder):
            path.write_bytes(b"damaged")
        assert not read(store, KEYS[0]) and KEYS[0] not in store
        assert store.stats()["num_bytes"] > 3000 * 2
    store.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_is_no_damage(folder: Path, number: int) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0])
    with pytest.MonkeyPatch.context() as patch:
        Fails(patch, "open", number)
        assert not read(store, KEYS[0])
    assert KEYS[0] in store and read(store, KEYS[0])
    store.close()


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_and_writes(folder: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The system may do less than it was asked for."""
    real_write, real_read = os.write, os.readv
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, data[:most]))
    monkeypatch.setattr(os, "readv", lambda file, into: real_read(file, [into[0][:most]]))
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0], SIZES[1]) and read(store, KEYS[0], SIZES[1])
    store.close()


# Killed processes.

PROGRAM = """
import os, random, signal, threading, time
from pathlib import Path
import numpy as np
from common.kv_store import DiskStore
KEYS, SIZES, LAYOUTS = {constants}
{helpers}
store = DiskStore(Path({folder!r}), {capacity}, LAYOUTS[0])
"""
HELPERS = "".join(map(inspect.getsource, (pieces_of, room, is_equal, write, read)))


def child(folder: Path, code: str, capacity: int = LARGE) -> "subprocess.Popen[str]":
    """A process of its own that has opened the store, and then runs `code`."""
    program = PROGRAM.format(
        constants=(KEYS, SIZES, LAYOUTS), helpers=HELPERS, folder=str(folder), capacity=capacity
    )
    command = [sys.executable, "-c", program + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


DIE = """
left = {point}
def dying(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            if name == "write" and len(arguments[1]) > 1:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("open", "write", "utime", "close", "replace", "unlink"):
    setattr(os, name, dying(name))
write(store, KEYS[3])
os._exit(0)
"""


def test_killed_at_every_point_of_a_write(folder: Path) -> None:
    """Before each call to the system, and in the middle of each that writes. Room is for three."""
    capacity = 3 * 3200
    for point in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        store = DiskStore(folder, capacity, LAYOUTS[0])
        assert all(write(store, key) for key in KEYS[:3])
        store.close()
        with child(folder, DIE.format(point=point), capacity) as process:
            code = process.wait(60)
        assert code in (0, -signal.SIGKILL)
        assert bytes_in(folder) <= capacity
        store = DiskStore(folder, capacity, LAYOUTS[0])
        assert not list(folder.glob("*.tmp"))
        assert bytes_in(folder) == store.stats()["num_bytes"]
        kept = [read(store, key) for key in KEYS[:4]]
        assert kept == [key in store for key in KEYS[:4]], "none is damaged"
        assert kept[1:3] == [True, True] and not (kept[0] and kept[3])
        assert write(store, KEYS[3]) and read(store, KEYS[3])
        store.close()
        if code == 0:
            break
    assert code == 0 and kept[3] and point >= 8, "each point once, and then none is left"


def test_killed_at_any_time(folder: Path) -> None:
    """Four threads write and read; the process is killed in the midst of it."""
    code = """
def run(number):
    draw = random.Random(number * 1000 + os.getpid())
    while True:
        key = b"%d" % draw.randrange(50)
        read(store, key) or write(store, key)
for number in range(4):
    threading.Thread(target=run, args=[number]).start()
print("running", flush=True)
"""
    for _ in range(3):
        with child(folder, code, 20 * 3200) as process:
            assert process.stdout.readline() == "running\n"
            time.sleep(random.uniform(0.05, 0.4))
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
        assert bytes_in(folder) <= 20 * 3200
        store = DiskStore(folder, 20 * 3200, LAYOUTS[0])
        assert not list(folder.glob("*.tmp"))
        keys = [b"%d" % number for number in range(50)]
        known = [key for key in keys if key in store]
        assert known and all(read(store, key) for key in known)
        assert store.stats()["num_damaged"] == 0
        store.close()


# Threads.


def test_many_threads(folder: Path) -> None:
    """Twice the keys that there is room for; another thread looks on."""
    capacity = 10 * 3200
    store = DiskStore(folder, capacity, LAYOUTS[0])
    keys, problems, done = [b"%d" % number for number in range(20)], [], threading.Event()

    def run(number: int) -> None:
        draw = random.Random(number)
        try:
            for _ in range(200):
                key = draw.choice(keys)
                if not read(store, key):
                    write(store, key)
        except BaseException as error:
            problems.append(error)

    def watch() -> None:
        while not done.is_set():
            if store.stats()["num_bytes"] > capacity:
                problems.append(store.stats())

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    stats = store.stats()
    assert stats["num_bytes"] == bytes_in(folder) <= capacity
    assert stats["num_blocks"] == len(blocks_in(folder))
    assert stats["num_evicted"] > 0 and stats["num_damaged"] == stats["num_failures"] == 0
    assert stats["num_written"] - stats["num_evicted"] == stats["num_blocks"]
    assert not problems
    store.close()


def test_close_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor is not closed under a write that uses it."""
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    began, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    real = os.replace

    def slow(*arguments: Any, **options: Any) -> None:
        began.set()
        go_on.wait(10)
        real(*arguments, **options)

    monkeypatch.setattr(os, "replace", slow)
    results: list[bool] = []
    writer = threading.Thread(target=lambda: results.append(write(store, KEYS[0])))
    writer.start()
    assert began.wait(10)
    closer = threading.Thread(target=lambda: (store.close(), closed.set()))
    closer.start()
    assert not closed.wait(0.1)
    assert not write(store, KEYS[1]), "it is closed for all that comes later"
    go_on.set()
    writer.join()
    closer.join()
    assert results == [True] and len(blocks_in(folder)) == 1


def test_counts(folder: Path) -> None:
    store = DiskStore(folder, LARGE, LAYOUTS[0])
    assert write(store, KEYS[0]) and write(store, KEYS[0]) and read(store, KEYS[0])
    assert not read(store, KEYS[1])
    size = blocks_in(folder)[0].stat().st_size
    expected = {
        "num_blocks": 1,
        "num_bytes": size,
        "num_read": 1,
        "num_misses": 1,
        "num_damaged": 0,
    }
    expected |= {"num_written": 1, "num_evicted": 0, "num_failures": 0}
    assert store.stats() == expected | {"num_bytes_read": size, "num_bytes_written": size}
    store.close()


def test_names_tell_nothing() -> None:
    """A block's tokens are not to be read from a folder's listing."""
    store = DiskStore.__new__(DiskStore)
    store.layout = bytes(range(32))
    assert re.fullmatch(r"0001020304050607-[0-9a-f]{64}\.kv", store.name(b"secret"))
    assert b"secret".hex() not in store.name(b"secret")
