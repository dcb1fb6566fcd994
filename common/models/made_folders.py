"""Folders that are made once and kept: converted models, and weights quantised on load.

A folder appears under its final name by one rename, under a lock: two processes may start at once, and
one may be killed half-way, and there is either a whole folder or none.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

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
    """Held while a folder is made, used for the first time, or removed."""
    return FileLock(folder.parent / f"{folder.name}.lock")


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
