"""KV blocks in a folder: they survive a restart, a killed process, and a damaged file.

One file a block, as in `block_file.py`. A process killed at any point leaves whole blocks and perhaps
a temporary file, which the next start removes. The page cache writes behind: a power cut may damage
files, and their checksums tell. Files are 0600 in a folder that is 0700. A checksum finds damage, not
malice: whoever can write there is this user.

The index is the folder. A file's name is a hash of the layout and one of the key; sizes and times of
last use are read at the start. All files together never exceed the capacity: room is made before a
block is written. The block unused for longest goes first, blocks of other layouts before all others.
Files with other names are left alone and do not count.
"""

import errno
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition

import numpy as np

from common.kv_store.block_file import VERSION, header_of, read_block, size_of, write_block
from common.kv_store.folder import open_folder

NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.kv")
TEMPORARY = re.compile(r"\d+-\d+\.tmp")  # process and count
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # say nothing of the file
COUNTS = (
    "num_read",
    "num_misses",
    "num_damaged",
    "num_written",
    "num_evicted",
    "num_failures",
    "num_bytes_read",
    "num_bytes_written",
)
logger = logging.getLogger(__name__)


class DiskStore:
    """Blocks by key, at most `capacity` bytes of files. Any thread may call anything.

    pieces, into: a block's parts as contiguous uint8 arrays, one of the target model's KV, say, and
    one of the draft model's. Their number and sizes belong to a block as its key does: it is found
    only by those that it was written with.
    """

    def __init__(self, folder: Path, capacity: int, layout: str) -> None:
        """layout: all that the bytes of a block depend on besides its tokens: model, dtype, block
        size. A store never gives back a block of another layout.

        Raises ValueError: the folder cannot be used, is another user's or open to others, or is in
        use by another process.
        """
        self.capacity = capacity
        self.layout = hashlib.sha256(f"{VERSION} {layout}".encode()).digest()
        self.changed = Condition()  # its lock guards all below
        self.num_active, self.is_closed = 0, False
        self.sizes: OrderedDict[str, int] = OrderedDict()  # by name, unused for longest first
        self.writing: set[str] = set()
        self.num_bytes = 0  # of both
        self.num_temporary = 0
        self.clock = 0  # of the last use
        self.counts = dict.fromkeys(COUNTS, 0)
        self.folder, self.lock = open_folder(folder, "disk_kv")
        try:
            self.scan()
        except OSError as error:
            self.close()
            raise ValueError(f"disk_kv {folder} cannot be read: {error.strerror}") from error

    def scan(self) -> None:
        """Make the index from the folder, remove leftovers, keep to the capacity. Raises OSError."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if TEMPORARY.fullmatch(entry.name):
                    with suppress(OSError):
                        os.unlink(entry.name, dir_fd=self.folder)
                elif NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    is_own = entry.name.startswith(self.prefix)
                    found.append((is_own, status.st_mtime_ns, entry.name, status.st_size))
        for _, used, name, size in sorted(found):
            self.sizes[name] = size
            self.num_bytes += size
            self.clock = max(self.clock, used)
        for name in [name for name, size in self.sizes.items() if size > self.capacity]:
            self.remove(name)
        self.make_room(0)

    @property
    def prefix(self) -> str:
        return self.layout[:8].hex() + "-"

    def name(self, key: bytes) -> str:
        return f"{self.prefix}{hashlib.sha256(key).hexdigest()}.kv"

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is there. Whether it is whole, only `read` can tell."""
        with self.changed:
            return not self.is_closed and self.name(key) in self.sizes

    def write(self, key: bytes, pieces: list[np.ndarray]) -> bool:
        """Keep a block; others may be evicted for it. False: it is not kept. Never raises OSError: a
        full or broken disk is counted, and said the first time."""
        name, header = self.name(key), header_of(self.layout, key, pieces)
        size = size_of(header, pieces)
        with self.active() as is_open:
            with self.changed:
                if not is_open or name in self.writing:
                    return False
                if name in self.sizes:
                    return True
                if size > self.capacity or not self.make_room(size):
                    return False
                self.writing.add(name)
                self.num_bytes += size
                self.num_temporary += 1
                temporary = f"{os.getpid()}-{self.num_temporary}.tmp"
            problem: OSError | None = None
            try:
                write_block(self.folder, temporary, name, header, pieces, self.tick)
            except OSError as error:
                problem = error
            with self.changed:
                self.writing.remove(name)
                if problem is None:
                    self.sizes[name] = size
                    self.count(num_written=1, num_bytes_written=size)
                else:
                    self.num_bytes -= size
                    self.count_failure(problem)
        return problem is None

    def read(self, key: bytes, into: list[np.ndarray]) -> bool:
        """Fetch a block. False: it is missing, or was damaged and is removed now; what is in `into`
        then has no meaning."""
        name, header = self.name(key), header_of(self.layout, key, into)
        with self.active() as is_open:
            with self.changed:
                if not is_open or name not in self.sizes:
                    self.count(num_misses=1)
                    return False
            problem, is_whole = None, False
            try:
                is_whole = read_block(self.folder, name, header, into, self.tick)
            except OSError as error:
                problem = error
            with self.changed:
                if is_whole:
                    self.count(num_read=1, num_bytes_read=size_of(header, into))
                    if name in self.sizes:  # not evicted meanwhile
                        self.sizes.move_to_end(name)
                elif problem is not None and problem.errno in PASSING:
                    self.count_failure(problem)
                elif name in self.sizes:
                    self.count(num_damaged=1)
                    if not self.remove(name):
                        del self.sizes[name]  # its bytes still count
        return is_whole

    def make_room(self, size: int) -> bool:
        """Evict until `size` bytes more fit. False: a file cannot be removed, or all are being
        written. Called with the lock."""
        while self.num_bytes + size > self.capacity:
            name = next(iter(self.sizes), None)
            if name is None or not self.remove(name):
                return False
            self.count(num_evicted=1)
        return True

    def remove(self, name: str) -> bool:
        """Remove a file, and from the index. False: it cannot be removed, and still counts. Called
        with the lock."""
        try:
            os.unlink(name, dir_fd=self.folder)
        except (FileNotFoundError, IsADirectoryError):
            pass  # the file is gone
        except OSError as error:
            self.count_failure(error)
            return False
        self.num_bytes -= self.sizes.pop(name)
        return True

    def count(self, **numbers: int) -> None:
        """Called with the lock."""
        for name, number in numbers.items():
            self.counts[name] += number

    def count_failure(self, error: OSError) -> None:
        """Called with the lock."""
        self.count(num_failures=1)
        if self.counts["num_failures"] == 1:
            logger.warning("disk_kv: a block's file could not be used: %s", error.strerror)

    def tick(self) -> int:
        """A time in nanoseconds, later than all before."""
        with self.changed:
            self.clock = max(self.clock + 1, time.time_ns())
            return self.clock

    @contextmanager
    def active(self) -> Iterator[bool]:
        """`close` waits for whatever is in here. Gives whether the store is open."""
        with self.changed:
            self.num_active += 1
            is_open = not self.is_closed
        try:
            yield is_open
        finally:
            with self.changed:
                self.num_active -= 1
                self.changed.notify_all()

    def stats(self) -> dict[str, int]:
        with self.changed:
            return {"num_blocks": len(self.sizes), "num_bytes": self.num_bytes, **self.counts}

    def close(self) -> None:
        """Wait for what is being read and written, and let another process have the folder. From
        then on nothing is found and nothing kept."""
        with self.changed:
            was_closed, self.is_closed = self.is_closed, True
            self.changed.wait_for(lambda: not self.num_active)
            if not was_closed:
                os.close(self.lock)
                os.close(self.folder)
