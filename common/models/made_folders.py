"""Folders that are made once and kept: converted models, and weights quantised on load.

A folder appears under its final name by one rename, under a lock: two processes may start at once, and
one may be killed half-way, and there is either a whole folder or none.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

NUM_LOCKS = 16  # files of a cache, however many folders come and go
MANIFEST = "manifest.json"  # written last: a folder without it is not whole


def damage(folder: Path) -> str | None:
    """What is wrong with a made folder, or None when it is whole."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} or a file it lists is missing or unreadable"
    return None


def lock_of(folder: Path) -> FileLock:
    """Held while a folder is made or removed. Some folders share one: a lock's file cannot be removed
    without a race, and so there are only a few."""
    return FileLock(folder.parent / f"made-{zlib.crc32(folder.name.encode()) % NUM_LOCKS}.lock")


def made_folder(folder: Path, make: Callable[[Path], None], about: dict[str, Any]) -> Path:
    """The folder, made now if need be by `make` in a temporary one beside it.

    about: what its manifest says besides the files' sizes. Raises OSError, and what `make` raises.
    """
    if folder.is_dir() and damage(folder) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(folder):
        if folder.is_dir():
            problem = damage(folder)
            if problem is None:
                return folder  # another process has just made it
            print(f"{folder} is damaged ({problem}); converting again", file=sys.stderr)
            shutil.rmtree(folder)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent)
        )
        try:
            make(temporary)
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(json.dumps({**about, "files": sizes}, indent=1))
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def prune(parent: Path, prefix: str, kept: int) -> None:
    """Remove the made folders of a prefix but for so many that were used last, and what is left of
    makers that were killed. What another process has just locked stays. Raises OSError.

    A folder's last use is the time of its manifest (`used`).
    """

    def last_use(folder: Path) -> float:
        with contextlib.suppress(OSError):
            return (folder / MANIFEST).stat().st_mtime
        return 0.0

    whole = [path for path in parent.glob(f"{prefix}[!.]*") if path.is_dir()]
    old = {folder: folder for folder in sorted(whole, key=last_use)[:-kept]}
    for leftover in parent.glob(f".{prefix}*.tmp"):
        old[leftover] = parent / leftover.name[1:].rsplit(".", 2)[0]
    for path, folder in old.items():
        with contextlib.suppress(Timeout), lock_of(folder).acquire(timeout=0):
            shutil.rmtree(path, ignore_errors=True)


def used(folder: Path) -> None:
    """Note that a made folder is used now."""
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)
