"""The embedded model with its first layers alone: the real tokenizer, sizes and kernels, a fraction of
the work. For what must run, whatever the text says."""

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from common.models.embedded import FOLDER, cache_dir, embedded_model
from common.models.made_folders import MANIFEST


def few_layers(cache: Path, num_layers: int) -> dict[str, str]:
    """Make a cache of models in a folder, with this one as the embedded model; returns the environment
    in which a process uses it. Compiled kernels stay in the user's cache."""
    source, folder = embedded_model(), cache / FOLDER
    assert source is not None, "the embedded model is not installed"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    assert 0 < num_layers < config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    with safe_open(source / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if layer_of(name) < num_layers}  # noqa: SIM118
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((source / MANIFEST).read_text())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": sizes}))
    kernels = os.environ.get("NUMBA_CACHE_DIR") or str(cache_dir())
    return {"FIFTEEN_ENGINES_CACHE": str(cache), "NUMBA_CACHE_DIR": kernels}


def layer_of(name: str) -> int:
    """A weight's layer by its name; -1 if it is in none."""
    words = name.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else -1
