"""The files that hold a model's weights: which they are, what their headers say, and the tensors.

All parts read the files that are chosen here, and transformers is given what was read: it would
choose the same, but then there would be two choices to keep alike. Names in an index, and the
config's, come from a stranger: each must be a plain name of a regular file inside the folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.models.errors import ModelError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 << 20
NUMBERS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Header:
    """What a file says of one of its tensors."""

    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    source: str = ""  # its name in the file, where that is another
    index: tuple[int | slice, ...] = ()  # of this one in a larger tensor: one expert's of a layer's

    @property
    def is_number(self) -> bool:
        """Whether it can be a weight. Integers and 8-bit floats are of a quantised model."""
        return self.dtype in NUMBERS


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises ModelError naming the file."""
    check_file(path.parent, path.name)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def check_file(folder: Path, name: str, parent: Path | None = None) -> None:
    """A file of a model: a plain name, a regular file, and inside the folder once links are followed.

    parent: where in the folder it lies, when not at its top.

    The hub's cache keeps its files as links into a `blobs` folder beside `snapshots`; that is the
    one place outside the folder that a link may lead to.
    """
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise ModelError(f"{folder} names the file {name!r:.100}, which is not a plain file name")
    path = (parent or folder) / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ModelError(f"{path} cannot be followed: {error}") from error
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelError(f"{path} leads outside the model's folder")
    if not target.exists():
        raise ModelError(f"{path} is missing")
    if not target.is_file():
        raise ModelError(f"{path} is not a regular file")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as transformers chooses them.

    The file that config.json names as `transformers_weights`, else `model.safetensors`, else the
    shards of its index. What lies beside the chosen is not read: an index may be left over from
    before the shards were merged. Raises ModelError for missing weights, pickled weights, and names
    that leave the folder.
    """
    name = _first_file(folder)
    names = _shards(folder / name) if name.endswith(".index.json") else [name]
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelError(f"{folder} names {name!r:.100} as weights, which is not safetensors")
        check_file(folder, name)
    return [folder / name for name in names]


def _first_file(folder: Path) -> str:
    """The name of the file to begin with: weights, or an index of files. Raises ModelError."""
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if named is not None:
        if not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"{config} has transformers_weights {named!r:.60}; expected a safetensors file or"
                " its index"
            )
        return str(named)
    for name in (WHOLE, INDEX):
        if (folder / name).is_file():
            return name
    for name in (WHOLE, INDEX):
        if (folder / name).is_symlink() or (folder / name).exists():
            return name  # the check of the file says what is wrong with it
    pickled = [file.name for file in folder.iterdir() if file.suffix in PICKLED]
    if pickled:
        raise ModelError(
            f"{folder} has pickled weights ({pickled[0]}), which can run code when loaded;"
            " convert them to safetensors"
        )
    raise ModelError(f"{folder} has no {WHOLE} and no {INDEX}")


def _shards(index: Path) -> list[str]:
    """The names of the files in an index, each once. Raises ModelError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    return sorted({str(name) for name in weight_map.values()})


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors of a folder by name, from the files' headers alone.

    Of two files with the same name in them the later counts, as with transformers. Raises
    ModelError.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, Header] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    header = file.get_slice(name)
                    headers[name] = Header(path, header.get_dtype(), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    return headers


def read_tensors(
    headers: dict[str, Header], device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of those that are numbers, one at a time, file by file.

    On the CPU a tensor is a view of the mapped file: no copy is made and its memory is the page
    cache's. Raises ModelError.
    """
    from safetensors import SafetensorError, safe_open

    names: dict[Path, list[str]] = {}
    for name, header in headers.items():
        if header.is_number:
            names.setdefault(header.path, []).append(name)
    for path in names:
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in names[path]:
                    source, index = headers[name].source or name, headers[name].index
                    yield name, file.get_slice(source)[index] if index else file.get_tensor(source)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
