"""A GGUF file as a folder that can be run: its codes and scales as they are, beside config and tokenizer.

Made once. The weights are written in the order of a QuantizedWeight, so that a start maps them; no
value changes. The file is checked by our own reader before transformers, which reads the config and
the words of the tokenizer, sees it.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common.models.config_json import is_whole
from common.models.embedded import FOLDER, cache_dir, check_source, gguf_path, write_words
from common.models.errors import ModelError
from common.models.gguf_header import GGUFHeader, read_gguf_header
from common.models.gguf_weights import check_tensors, gguf_weights
from common.models.made_folders import MANIFEST, damage, made_folder, prune, used
from common.models.quantized_stored import write_weights

EMBEDDED = "smollm2-135m-q4_1"
VERSION = 1  # changes when the conversion does
PREFIX, KEPT = "gguf-", 4  # folders of files that users have: the last used


def embedded_gguf() -> Path | None:
    """The embedded model with its file's own Q4_1 weights; None where its package is not there.

    Raises ModelError.
    """
    source = gguf_path()
    return None if source is None else _made(source, f"{EMBEDDED}-v{VERSION}", is_embedded=True)


def gguf_model(source: Path) -> Path:
    """The folder of a Llama in a GGUF file. Raises ModelError."""
    try:
        found = source.resolve().stat()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{source} cannot be read: {error}") from error
    identity = f"{VERSION} {source.resolve()} {found.st_size} {found.st_mtime_ns}"
    name = f"{PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder = _made(source.resolve(), name, is_embedded=False)
    used(folder)
    with contextlib.suppress(OSError):
        prune(folder.parent, PREFIX, KEPT)
    return folder


def _made(source: Path, name: str, is_embedded: bool) -> Path:
    folder = cache_dir() / name

    def make(temporary: Path) -> None:
        print(f"Reading {source.name} into {folder} (once) …", file=sys.stderr)
        if is_embedded:
            check_source(source)
        converted = cache_dir() / FOLDER
        if is_embedded and converted.is_dir() and damage(converted) is None:
            _copy_words(converted, source, temporary)
        else:
            _write_words(source, temporary)
        header = read_gguf_header(source)
        write_weights(temporary, gguf_weights(header, *_heads(header)))

    try:
        return made_folder(folder, make, {"source": str(source)})
    except OSError as error:
        raise ModelError(
            f"cannot write {folder}: {error.strerror or error} (FIFTEEN_ENGINES_CACHE names another"
            " folder)"
        ) from error


def _copy_words(converted: Path, source: Path, folder: Path) -> None:
    """Config and tokenizer from the folder that the same file was converted into. Raises OSError."""
    for file in converted.iterdir():
        if file.suffix != ".safetensors" and file.name != MANIFEST:
            shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": _quantization(source)}
    path.write_text(json.dumps(config, indent=2))


def _quantization(source: Path) -> dict[str, str]:
    return {"quant_method": "gguf", "file": source.name}


def _write_words(source: Path, folder: Path) -> None:
    """Config and tokenizer as transformers reads them. Raises ModelError and OSError."""
    from transformers import AutoConfig

    header = read_gguf_header(source)
    check_tensors(header)
    _heads(header)
    try:
        loaded = AutoConfig.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        write_words(
            source,
            folder,
            loaded,
            splits_digits=header.values.get("tokenizer.ggml.pre") == "smollm",
            tie_word_embeddings="output.weight" not in header.tensors,
            quantization_config=_quantization(source),
        )
    except OSError:
        raise
    except Exception as error:  # a file can be wrong in any way, and so fail in any way
        reason = " ".join(str(error).split())
        raise ModelError(f"{source} has no usable config or tokenizer: {reason:.200}") from error


def _heads(header: GGUFHeader) -> tuple[int, int]:
    """Numbers of heads and of key-value heads of a Llama. Raises ModelError, also for what would make
    it another model and is not read."""
    values, path = header.values, header.path
    kind = values.get("general.architecture")
    if kind != "llama":
        raise ModelError(f"{path} has general.architecture {kind!r:.60}; expected 'llama'")
    if values.get("llama.expert_count"):
        raise ModelError(
            f"{path} has llama.expert_count {values['llama.expert_count']!r:.60}: experts"
        )
    scaling = [name for name in values if name.startswith("llama.rope.scal")]
    if scaling and values.get("llama.rope.scaling.type") != "none":
        raise ModelError(
            f"{path} has {scaling[0]} {values[scaling[0]]!r:.60}: scaled positions are not read"
        )

    def count(name: str, default: Any = None) -> int:
        value = values.get(f"llama.{name}", default)
        if not is_whole(value) or not 1 <= value <= 1 << 12:
            raise ModelError(f"{path} has llama.{name} {value!r:.60}; expected a number of heads")
        return value

    heads = count("attention.head_count")
    return heads, count("attention.head_count_kv", heads)
