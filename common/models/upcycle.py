"""A mixture of experts from a dense model, that says the same: each expert begins as the dense MLP.

The weights of a token's experts add up to 1, so whichever are chosen, the layer gives what the dense
MLP gave. (Sparse upcycling, arXiv 2212.05055, begins training there.) The router is random, so that
loads differ as in a real model, and real text comes out of a mixture that nobody had to train.

With noise experts come in pairs, one with the noise added to its weights and one with it taken away:
experts then differ, and their mean is still the dense MLP.

One tensor is in memory at a time. The folder appears under its name by one rename, when all is there.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.models.checkpoint import READ_WHOLE, empty_model, iter_weights, load_config, resolve
from common.models.errors import ModelError
from common.models.expert_names import plain_name, split_shapes
from common.models.weight_writer import WeightWriter
from common.models.weights import HEAD, NotRead, report_unused

DENSE = {  # family: of its mixture, and that one's class
    "llama": ("mixtral", "MixtralForCausalLM"),
    "mistral": ("mixtral", "MixtralForCausalLM"),
    "qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # of the dense model's config
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
NOT_COPIED = ("config.json", "manifest.json", "random_weights.json", "shapes.json")
SHARD_BYTES = 2 << 30
ROOM = 64 << 20  # bytes for what is not weights


@dataclass(frozen=True)
class Mixture:
    """What is made: how many experts, and how they are drawn."""

    experts: int = 8
    top_k: int = 2
    noise: float = 0.0  # of a weight's own standard deviation
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ModelError(f"top_k is {self.top_k}: a number from 1 to experts, {self.experts}")
        if not 0 <= self.seed < 1 << 32:
            raise ModelError(f"seed is {self.seed}: a number from 0 to 2^32 - 1")
        if not 0 <= self.noise <= 1:
            raise ModelError(f"noise is {self.noise}: a number from 0 to 1")
        if self.noise and self.experts % 2:
            raise ModelError(f"experts is {self.experts}: with noise they come in pairs")


def upcycle(
    name: str,
    out: Path,
    mixture: Mixture,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the mixture of a model into the new folder `out`.

    name: as `resolve` takes it. progress: called with tensors written, and of how many. Raises
    ModelError.
    """
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} exists; give the name of a folder to be made")
    folder = resolve(name)
    config = config_of(folder, mixture)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            (temporary / "config.json").write_text(json.dumps(config, indent=2))
            copy_others(folder, temporary)
            write_weights(folder, temporary, mixture, shard_bytes, progress)
            temporary.chmod(0o755)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror or error}") from error


def config_of(folder: Path, mixture: Mixture) -> dict[str, Any]:
    """config.json of the mixture. Raises ModelError for a model that is not dense, and for one with
    what its mixture would not have."""
    config = load_config(folder)
    family, kinds = config.model_type, getattr(config, "layer_types", None) or []
    if family not in DENSE:
        raise ModelError(f"model_type is {family!r}; can be upcycled: {', '.join(DENSE)}")
    kind, architecture = DENSE[family]
    is_mixtral = kind == "mixtral"
    for name, is_there in (
        ("attention_bias", is_mixtral and getattr(config, "attention_bias", False)),
        ("mlp_bias", getattr(config, "mlp_bias", False)),
        ("use_sliding_window", not is_mixtral and "sliding_attention" in kinds),
    ):
        if is_there:
            raise ModelError(
                f"{name} is set in {folder}: models of type {kind!r} have no such thing"
            )
    fields = {name: getattr(config, name) for name in KEPT}
    heads = config.num_attention_heads
    fields |= {
        "model_type": kind,
        "architectures": [architecture],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "num_experts_per_tok": mixture.top_k,
        "dtype": str(mixture.dtype).removeprefix("torch."),
    }
    if is_mixtral:
        window = config.sliding_window if family == "mistral" else None
        return fields | {"num_local_experts": mixture.experts, "sliding_window": window}
    return fields | {
        "num_experts": mixture.experts,
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "attention_bias": config.attention_bias,
    }


def copy_others(folder: Path, target: Path) -> None:
    """Tokenizer, chat template, sampling defaults. Raises OSError."""
    for place in (Path("."), Path("additional_chat_templates")):
        for file in sorted((folder / place).glob("*")):
            is_weights = file.name.endswith(".index.json") or file.suffix not in READ_WHOLE
            if file.is_file() and not is_weights and file.name not in NOT_COPIED:
                (target / place).mkdir(exist_ok=True)
                shutil.copyfile(file, target / place / file.name)


def write_weights(
    folder: Path,
    target: Path,
    mixture: Mixture,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Raises OSError, and ModelError where weights are missing or of other shapes."""
    config = load_config(target)
    expected = split_shapes(empty_model(config).state_dict())
    total = sum(torch.Size(shape).numel() for shape in expected.values()) * mixture.dtype.itemsize
    free = shutil.disk_usage(target).free
    if free < total + ROOM:
        raise ModelError(
            f"the mixture needs {total / 1e9:.1f} GB in {target.parent}, which has {free / 1e9:.1f}"
        )
    num_tensors, unused = len(expected) - config.tie_word_embeddings, []
    with WeightWriter(target, shard_bytes) as writer:
        for name, tensor in tensors_of(folder, config, mixture):
            shape = expected.pop(plain_name(name), None)
            if shape is None:
                unused.append(name)
                continue
            if shape != tensor.shape:
                raise ModelError(f"{folder} has {name} as {list(tensor.shape)}, not {shape}")
            writer.write(name, tensor)
            progress(num_tensors - len(expected), num_tensors)
        report_unused(unused)
        if config.tie_word_embeddings:  # then a head of its own need not be there
            expected.pop(HEAD, None)
        if expected:
            raise ModelError(f"{folder} lacks {len(expected)} weights, such as {min(expected)}")


def tensors_of(folder: Path, config: Any, mixture: Mixture) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the file, tensor) of the mixture, one at a time. Raises ModelError."""
    is_mixtral = config.model_type == "mixtral"
    block = "block_sparse_moe" if is_mixtral else "mlp"
    for name, tensor in iter_weights(folder):
        if isinstance(tensor, NotRead):
            raise ModelError(f"{folder} has {name} as {tensor.dtype}, not floating-point numbers")
        prefix, is_mlp, projection = name.removesuffix(".weight").partition(".mlp.")
        if not is_mlp:
            yield name, tensor.to(mixture.dtype)
            continue
        written = MIXTRAL.get(projection, projection) if is_mixtral else projection
        for expert in range(mixture.experts):
            expert_name = f"{prefix}.{block}.experts.{expert}.{written}.weight"
            yield expert_name, noisy(tensor, name, expert, mixture)
        if projection == "gate_proj":
            yield f"{prefix}.{block}.gate.weight", router(prefix, config.hidden_size, mixture)


def router(prefix: str, hidden: int, mixture: Mixture) -> torch.Tensor:
    """[experts, hidden]; the scores of a normalised token scatter by about 1, so that its first
    expert weighs more than its second."""
    weight = drawn((mixture.experts, hidden), f"{prefix}.gate", mixture.seed)
    return (weight * hidden**-0.5).to(mixture.dtype)


def noisy(tensor: torch.Tensor, name: str, expert: int, mixture: Mixture) -> torch.Tensor:
    """An expert's copy: experts 0 and 1 are a pair, 2 and 3, and so on."""
    if not mixture.noise:
        return tensor.to(mixture.dtype)
    noise = drawn(tuple(tensor.shape), f"{name}, pair {expert // 2}", mixture.seed)
    noise *= mixture.noise * tensor.float().std()
    return (tensor.float() + (noise if expert % 2 == 0 else -noise)).to(mixture.dtype)


def drawn(shape: tuple[int, ...], name: str, seed: int) -> torch.Tensor:
    """Normal numbers that follow from name and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    return torch.randn(shape, generator=generator)
