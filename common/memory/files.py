"""A file without a name, on a disk: what is in it takes no memory that the system cannot have back."""

import os
import tempfile
from pathlib import Path

from common.models.embedded import cache_dir

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
MOUNTS = Path("/proc/self/mountinfo")
SPARE = 64 << 20  # bytes that are left free


def open_unnamed(num_bytes: int) -> int:
    """The descriptor of an empty file that ends with it, with room for so many bytes. No other user can
    read it. Raises OSError."""
    reasons = []
    for folder in (Path(tempfile.gettempdir()), Path("/var/tmp"), cache_dir()):
        if (reason := problem(folder, num_bytes)) is None:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                descriptor = os.dup(file.fileno())
            try:
                if num_bytes:
                    os.posix_fallocate(descriptor, 0, num_bytes)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor
        reasons.append(f"{folder} {reason}")
    raise OSError(f"no folder for {num_bytes} bytes of weights: {'; '.join(reasons)}")


def problem(folder: Path, num_bytes: int) -> str | None:
    """Why a folder cannot have such a file; None when it can."""
    try:
        kind, found = file_system(folder), os.statvfs(folder)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    if kind in IN_MEMORY:
        return f"lies in memory ({kind})"
    if not os.access(folder, os.W_OK):
        return "cannot be written to"
    free = found.f_bavail * found.f_frsize
    return f"has {free} bytes free" if free < num_bytes + SPARE else None


def file_system(folder: Path) -> str:
    """The kind of the file system that a folder lies in, as Linux names it; "" where that is not known.
    Raises OSError."""
    number = os.stat(folder).st_dev
    place = f"{os.major(number)}:{os.minor(number)}"
    for line in MOUNTS.read_text().splitlines() if MOUNTS.exists() else []:
        fields = line.split()
        if fields[2] == place:
            return fields[fields.index("-") + 1]
    return ""
