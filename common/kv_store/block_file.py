"""A file with one block in it: how it is written, and what must be true before it is believed.

All that a file's header may say is known before it is read: magic and version, the layout's hash, the
key, the pieces' sizes. So a header is compared and never parsed, and no number in it can do harm. A
checksum (CRC-32) over header and pieces follows, then the pieces.
"""

import os
import stat
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np

MAGIC, VERSION = b"15EnKV\r\n", 1
CHECKSUM_BYTES = 4


def header_of(layout: bytes, key: bytes, pieces: list[np.ndarray]) -> bytes:
    """What the file of a block begins with. layout: a hash."""
    numbers = [VERSION, len(key), len(pieces), *(piece.nbytes for piece in pieces)]
    return MAGIC + struct.pack(f"<{len(numbers)}Q", *numbers) + layout + key


def size_of(header: bytes, pieces: list[np.ndarray]) -> int:
    """How many bytes the file of a block has."""
    return len(header) + CHECKSUM_BYTES + sum(piece.nbytes for piece in pieces)


def write_block(
    folder: int,
    temporary: str,
    name: str,
    header: bytes,
    pieces: list[np.ndarray],
    tick: Callable[[], int],
) -> None:
    """Write a block under a temporary name, and give it its own: it is there whole or not at all.

    folder: a descriptor. tick() gives the time of its last use, in nanoseconds. Raises OSError;
    nothing is left behind then.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        try:
            checksum = zlib.crc32(header)
            for piece in pieces:
                checksum = zlib.crc32(piece, checksum)
            for data in (header, checksum.to_bytes(CHECKSUM_BYTES, "little"), *pieces):
                write_all(file, memoryview(data))
            now = tick()
            os.utime(file, ns=(now, now))
        finally:
            os.close(file)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def read_block(
    folder: int, name: str, header: bytes, into: list[np.ndarray], tick: Callable[[], int]
) -> bool:
    """Read a block. False: the file holds anything else than exactly this block. Raises OSError.

    Links are not followed, pipes not waited for.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=folder)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_of(header, into):
            return False
        start = bytearray(len(header) + CHECKSUM_BYTES)
        if not read_all(file, memoryview(start)) or not start.startswith(header):
            return False
        checksum = zlib.crc32(header)
        for piece in into:
            if not read_all(file, memoryview(piece)):
                return False
            checksum = zlib.crc32(piece, checksum)
        if checksum.to_bytes(CHECKSUM_BYTES, "little") != start[len(header) :]:
            return False
        now = tick()
        with suppress(OSError):  # of a disk that is read-only by now
            os.utime(file, ns=(now, now))
        return True
    finally:
        os.close(file)


def write_all(file: int, data: memoryview) -> None:
    """Write all of it. Raises OSError."""
    data = data.cast("B")
    while data:
        data = data[os.write(file, data) :]


def read_all(file: int, into: memoryview) -> bool:
    """Whether the file had so many bytes. Raises OSError."""
    into = into.cast("B")
    while into:
        count = os.readv(file, [into])
        if not count:
            return False
        into = into[count:]
    return True
