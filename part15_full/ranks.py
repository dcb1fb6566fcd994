"""How the ranks run every step together.

Rank 0 has the engine: requests, scheduler, block pool, sampling. Before a forward it tells the other
ranks in a few plain numbers what comes, and broadcasts the batch's packed input, in which by then all
tokens are known. They run the same forward on their part of the model, and wait for the next. They
know no request and no sequence, and no Python object is sent.

What each rank does at the start, it does in the same order: loading, profiling, warm-up. So these
forwards meet without a word.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.device import resolve_device
from common.distributed import (
    Group,
    OneRank,
    RankError,
    Ranks,
    checkpoint_fingerprint,
    connect,
    join_engines,
    project_fingerprint,
)
from common.distributed.expert_placement import check_division
from common.kv_store import from_numbers
from common.memory import SLEEPS
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, load_config, resolve
from common.prompt_logprobs import PromptPiece

from .config import EngineConfig
from .input_batch import Batch, InputBatch
from .input_buffers import BatchShape
from .pipeline_parallel import Stage
from .quantized_layers import copy_that_drafts
from .tensor_parallel import Shard

if TYPE_CHECKING:
    from .model_runner import ModelRunner


COPIES = 2  # in a header, in the place of what runs


def start_ranks(config: EngineConfig, folder: Path) -> Ranks:
    """This process as rank 0, and the other ranks, connected. Raises ValueError."""
    size, num_stages = config.tensor_parallel_size, config.pipeline_parallel_size
    loaded = load_config(folder, quantized=True)
    max_model_len = context_length(loaded, config.max_model_len)
    shape = ModelConfig.from_transformers(loaded, max_model_len, moe=True)
    Shard.of(shape, 0, size)  # an error now, and not in every rank
    Stage.of(shape, 0, num_stages)
    check_experts(config, shape)
    device, _ = resolve_device(config.device, config.dtype)
    values, size = asdict(config), size * num_stages
    prints = fingerprint(values) if size > 1 else {}
    more = {"timeout": config.rank_timeout, "fingerprint": prints, "num_stages": num_stages}
    return connect(__package__, values, device, size=size, **more)


def check_experts(config: EngineConfig, shape: ModelConfig) -> None:
    """Raises ValueError where a model's experts cannot be divided so."""
    size = config.tensor_parallel_size
    if config.enable_expert_parallel:
        if not shape.num_experts:
            raise ValueError(f"enable_expert_parallel is on: {config.model} has no experts")
        num_ranks = size * config.data_parallel_size
        check_division(shape.num_experts, config.num_redundant_experts, num_ranks)
    elif 0 < shape.moe_intermediate_size < size:
        number = shape.moe_intermediate_size
        raise ValueError(f"tensor_parallel_size is {size}: moe_intermediate_size is {number}")


def meet_engines(ranks: Ranks, config: EngineConfig) -> tuple[Group, Group]:
    """All ranks that share experts, which are of one stage, and the first ones of their engines.
    Raises ValueError."""
    number, size = config.data_parallel_rank, config.data_parallel_size
    if size == 1:
        return ranks.stages.group, OneRank()
    settings = asdict(config)
    own = {"model", "draft_model", "device", "threads", "data_parallel_rank"}
    own |= {"engine_core", "api_server_count"}
    prints = {name: str(settings[name]) for name in settings.keys() - own} | fingerprint(settings)
    address, timeout = config.data_parallel_address, config.rank_timeout
    return join_engines(ranks, address, number, size, timeout=timeout, fingerprint=prints)


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all ranks: code, packages and weights. Raises ValueError."""
    prints = project_fingerprint(__package__) | checkpoint_fingerprint(resolve(config["model"]))
    draft = config["draft_model"]
    if draft is not None and copy_that_drafts(draft) is None:
        [prints["checkpoint of draft_model"]] = checkpoint_fingerprint(resolve(draft)).values()
    elif draft is not None:
        prints["draft_model"] = draft
    return prints


def header_of(batch: Batch, what: int, num_copied: int) -> list[int]:
    """What the other ranks must know before a batch's numbers come: sizes, bounds, what runs, and
    which places of prompts are scored. num_copied: the last copy that must be done by then."""
    shape, metadata = batch.shape, batch.metadata
    bounds = metadata.max_query_len, metadata.max_seq_len, metadata.max_decode_query_len
    scored = [number for piece in batch.prompts for number in (piece.place, len(piece.token_ids))]
    sizes = shape.num_tokens, shape.num_seqs, shape.num_sampled, shape.num_changes
    each = 0 if batch.bucket is None else batch.bucket.num_tokens_each
    return [what, num_copied, *sizes, *bounds, metadata.num_leading_decodes, each, *scored]


def batch_of(header: list[int], inputs: InputBatch) -> Batch:
    """A batch whose numbers will come into the buffers. Of its sampling nothing is known."""
    batch = inputs.received(BatchShape(*header[2:6]), header[6:10], header[10])
    places = zip(header[11::2], header[12::2], strict=True)
    batch.prompts.extend(PromptPiece(0, place, 0, [0] * count, 0) for place, count in places)
    return batch


def follow(runner: "ModelRunner") -> None:
    """Run what rank 0 runs, until it says that there is no more. Raises RankError."""
    num_engines = runner.config.data_parallel_size
    while message := runner.ranks.control.receive():
        counts, header = message[:num_engines], message[num_engines:]
        if len(header) == 1:  # this engine has nothing to run, and others have
            runner.queue.submit(partial(runner.run_idle, header[0]), 0, counts=counts)
        elif header[0] == COPIES:
            runner.transfer(from_numbers(header[1:]))
        elif header[0] == SLEEPS:  # or wakes up
            runner.connector.wait_until(header[2])
            runner.queue.aside(partial(runner.rank_sleep.follow, header[1]))
        else:
            runner.connector.wait_until(header[1])
            what = runner.drafter if header[0] else runner.target
            runner.launch(batch_of(header, runner.inputs), what, counts)


@contextlib.contextmanager
def together(ranks: Ranks, everyone: Group) -> Iterator[None]:
    """What fails in a forward on one rank has failed on all: the others wait for its part."""
    try:
        yield
    except Exception as error:
        if max(ranks.size, everyone.size) == 1:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        if ranks.rank > 0:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        if isinstance(error, (RankError, torch.AcceleratorError)):
            raise
        where = f"rank {everyone.rank} of {everyone.size * ranks.stages.size}"
        raise RankError(f"a forward failed on {where}: {reason}") from error
