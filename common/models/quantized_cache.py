"""Weights quantised on load, kept: the next start maps them.

What is kept belongs to a checkpoint (its place, and its files' names, sizes, times and samples), to a
recipe (how it was quantised, in words), and to this module's version. It is written one weight at a time, so that the peak
of a start stays far below the full-precision model.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.kernels.quantized import QuantizedWeight
from common.models.embedded import cache_dir
from common.models.errors import ModelError
from common.models.fingerprint import checkpoint_fingerprint
from common.models.made_folders import lock_of, made_folder, prune, used
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
    place = cache_dir() / "quantized"
    about = {"recipe": recipe, "model": str(folder)}
    try:
        place = place / _key(folder, recipe)
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
    used(made)
    with contextlib.suppress(OSError):
        prune(place.parent, "", KEPT)
    return weights


def _key(folder: Path, recipe: str) -> str:
    """A name that is another one when the checkpoint, where it is, the recipe or the version is.
    Raises OSError."""
    times = [(file.name, file.stat().st_mtime_ns) for file in weight_files(folder)]
    identity = [VERSION, recipe, str(folder.resolve()), checkpoint_fingerprint(folder), times]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
