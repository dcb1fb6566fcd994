"""Weights quantised on load, kept: the next start maps them.

What is kept belongs to a checkpoint (its files' names, sizes and times), to a recipe (how it was
quantised, in words), and to this module's version. It is written one weight at a time, so that the peak
of a start stays far below the full-precision model.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import Timeout

from common.kernels.quantized import QuantizedWeight
from common.models.checkpoint import RANDOM_MARK, is_random
from common.models.embedded import cache_dir
from common.models.errors import ModelError
from common.models.made_folders import MANIFEST, lock_of, made_folder
from common.models.quantized_stored import read_all, write_weights
from common.models.weight_files import read_headers, weight_files
from common.models.weight_slices import Files

VERSION = 1  # changes when the same recipe gives other weights, or the files' layout does
KEPT = 4  # models, the last used

Build = Callable[[], Iterator[tuple[str, QuantizedWeight]]]


def cached_weights(folder: Path, recipe: str, build: Build) -> dict[str, QuantizedWeight]:
    """The weights that `build` yields, as views of a mapped file on the CPU.

    build: called where they are not kept yet, one weight at a time; again where they cannot be
    written, and then they are in memory. folder: the checkpoint's. Raises what `build` raises.
    """
    place = cache_dir() / "quantized" / _key(folder, recipe)
    about = {"recipe": recipe, "model": str(folder)}
    try:
        for attempt in range(2):
            made = made_folder(place, lambda temporary: write_weights(temporary, build()), about)
            try:
                weights = read_all(made, read_headers(made), Files("cpu").read)
                break
            except (ModelError, KeyError, IndexError) as error:
                if attempt:
                    raise OSError(f"it cannot be read back: {error}") from error
                print(f"{place} is damaged ({error!s:.200}); quantising again", file=sys.stderr)
                with lock_of(place):
                    shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        print(f"warning: quantised weights are not kept in {place}: {reason}", file=sys.stderr)
        return dict(build())
    with contextlib.suppress(OSError):
        os.utime(made / MANIFEST)
        _prune(place.parent)
    return weights


def _key(folder: Path, recipe: str) -> str:
    """A name that is another one when the checkpoint, the recipe or the version is."""
    files = [folder / "config.json", folder / MANIFEST]
    files += [folder / RANDOM_MARK] if is_random(folder) else weight_files(folder)
    identity: list[object] = [VERSION, recipe]
    for file in files:
        with contextlib.suppress(OSError):
            found = file.stat()
            is_small = file.suffix == ".json"
            identity.append([file.name, found.st_size, 0 if is_small else found.st_mtime_ns])
            identity.append(file.read_text() if is_small else "")
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _prune(place: Path) -> None:
    """Remove all but the last used. One that another process has just locked stays. Raises OSError."""

    def last_use(folder: Path) -> float:
        with contextlib.suppress(OSError):
            return (folder / MANIFEST).stat().st_mtime
        return 0.0

    folders = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for folder in sorted(folders, key=last_use)[:-KEPT]:
        with contextlib.suppress(Timeout), lock_of(folder).acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
