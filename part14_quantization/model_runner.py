"""From scheduled sequences to tensors, through the model, and back to sampled tokens.

The runner does not know prefill from decode: a sequence has so many new tokens, and their keys and
values go to such places in the cache.

The device is ahead of the host: a token that the host has not read yet is put into the input on the
device, from what its row has drawn last.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.device import release_openmp_workers, resolve_device, to_device
from common.distributed import RankError, Ranks
from common.distributed.expert_placement import ExpertPlacement
from common.distributed.lockstep import Counts, Lockstep
from common.kernels import select_ops
from common.kv_memory import choose_num_blocks, largest_counts, longest_sequence, peak_memory
from common.kv_store import to_numbers
from common.logprobs import SampledLogprobs
from common.memory import RankSleep
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, load_config, resolve_draft_model
from common.models.weight_slices import open_weights
from common.prompt_logprobs import PromptScores
from common.requests import Request
from common.sampling import NO_TOKEN, SamplingParams

from .config import EngineConfig
from .device_queue import Work, device_queue
from .disaggregation import make_workers_side
from .expert_parallel import ExpertParallel
from .input_batch import Batch, InputBatch
from .kv_cache import KVCache
from .model import CausalLM
from .quantized_layers import QuantizedSource, Recipe, copy_that_drafts, kv_dtype
from .ranks import COPIES, header_of, meet_engines, start_ranks, together
from .rejection_sampler import RejectionRows, target_probs, verify
from .sampler import Sampled, sample
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Runnable:
    """What a forward runs: the model, a smaller one, or some layers of the model."""

    model: CausalLM
    kv_data: torch.Tensor
    layers: list[int] | None = None  # None: all


class ModelRunner:
    """One rank's part of the model, its KV cache, and the way in and out of them."""

    def __init__(self, config: EngineConfig, folder: Path, ranks: Ranks) -> None:
        """Load the model and allocate the cache, side by side with the other ranks. Raises
        ValueError, and RankError when one of them is lost."""
        self.ranks, self.is_ready = ranks, False
        self.device, self.dtype = resolve_device(str(ranks.device), config.dtype)
        threads = config.threads or ranks.threads
        torch.set_num_threads(threads)
        self.ops = select_ops(config.kernels, self.device, threads)
        self.config = config = config.resolved(self.device, self.ops.default_block_size)
        self.everyone, leaders = meet_engines(ranks, config)
        max_model_len = context_length(load_config(folder, quantized=True), config.max_model_len)
        self.kv_dtype = kv_dtype(config.kv_cache_dtype, self.dtype)
        # What each model was loaded from.
        self.sources: dict[CausalLM, tuple[Path, int, Recipe]] = {}
        recipe = Recipe.of(config.quantization, config.quantize_embeddings, config.activations)
        copy = None
        if config.speculative == "draft":
            copy = copy_that_drafts(config.draft_model)
        if copy is not None:  # an error now, and not after the model is loaded
            copy.names(open_weights(folder, quantized=True))
        self.model = self.load_model(folder, max_model_len, recipe)
        if config.eplb:
            self.model.check_experts(self.everyone)
        shape = self.model.local
        self.num_weight_bytes = self.model.num_bytes
        smaller, draft_shape = None, None
        if config.speculative == "draft":
            if copy is None:
                folder = resolve_draft_model(
                    config.draft_model, max_model_len, shape.vocab_size, quantized=True
                )
            smaller = self.load_model(folder, max_model_len, copy or Recipe())
            draft_shape = smaller.local
            self.num_weight_bytes += smaller.num_bytes
        self.inputs = InputBatch(config, max_model_len, shape.vocab_size, self.device)
        queue, num_engines = device_queue(self.device), config.data_parallel_size
        self.queue = Lockstep(queue, leaders, num_engines, self.run_idle, ranks.health)
        # What follows belongs to the device: only work in the queue touches it.
        rows, vocab = config.max_num_seqs if ranks.rank == 0 else 0, shape.vocab_size
        # A row more than sequences: a batch's padding has the last one.
        self.last_token_ids = torch.zeros(rows + 1, dtype=torch.int64, device=self.device)
        # How often tokens were generated; kept where a sequence has penalties.
        self.counts = torch.zeros(rows, vocab, dtype=torch.int32, device=self.device)
        reserved = self.profile(shape)
        num_blocks = choose_num_blocks(
            config, shape, self.kv_dtype, self.device, reserved, draft_shape, ranks.size
        )
        num_blocks = self.everyone.minimum(num_blocks)  # the same on all ranks of all engines
        self.max_model_len = longest_sequence(config, shape, num_blocks)
        block_size = config.block_size
        self.kv = KVCache(num_blocks, block_size, shape, self.kv_dtype, self.device, draft_shape)
        self.connector = make_workers_side(config, self.kv, self.everyone.minimum, ranks.size)
        self.model.on_saved = self.connector.save_kv_layer
        self.target, self.drafter = Runnable(self.model, self.kv.data), None
        if smaller is not None:
            self.drafter = Runnable(smaller, self.kv.draft_data)
        elif config.speculative == "self":
            layers = layers_that_draft(config.draft_layers, shape.num_layers)
            self.drafter = Runnable(self.model, self.kv.data, layers)
        self.warm_up()
        for model in filter(None, (self.model, smaller)):
            if model.experts is not None:
                model.experts.forget()
        release_openmp_workers()  # from now on the queue's thread does the work
        held = torch.tensor([self.num_weight_bytes, self.kv.num_bytes], device=self.device)
        self.rank_bytes = ranks.group.gather(held, [held.shape] * ranks.size)
        self.rank_sleep = RankSleep(self)
        ranks.loaded()
        self.is_ready = True  # from now on other ranks are told what comes
        self.queue.start()

    def load_model(self, folder: Path, max_model_len: int, recipe: Recipe) -> CausalLM:
        """Load a model's weights. Raises ValueError."""
        shape = ModelConfig.from_transformers(
            load_config(folder, quantized=True), max_model_len, moe=True
        )
        self.ops.check_kv_cache(self.config.block_size, shape.head_dim, self.kv_dtype)
        source = open_weights(folder, self.device, quantized=True)
        weights = QuantizedSource(source, folder, recipe)
        group, experts = self.ranks.group, self.expert_parallel(shape)
        model = CausalLM(shape, self.ops, weights, self.dtype, self.device, group, experts)
        if self.ranks.rank == 0 and not self.is_ready:
            weights.report(self.device)
        self.sources[model] = folder, max_model_len, recipe
        return model

    def reload(self, model: CausalLM) -> None:
        """Read a model's weights again, in the place of those that it has. Raises ValueError."""
        fresh = self.load_model(*self.sources[model])
        del self.sources[fresh]
        vars(model).update(vars(fresh) | {"on_saved": model.on_saved})

    def expert_parallel(self, shape: ModelConfig) -> ExpertParallel | None:
        """This rank's part in a model's experts, where they are spread. Raises ValueError."""
        config, size = self.config, self.everyone.size
        if not (config.enable_expert_parallel and shape.num_experts):
            return None
        numbers = shape.num_layers, shape.num_experts, config.num_redundant_experts, size
        placement = ExpertPlacement(*numbers, self.device, config.data_parallel_rank)
        interval = config.eplb_interval if config.eplb else None
        group, backend = self.ranks.group, config.ep_backend
        return ExpertParallel(self.everyone, group, placement, backend, self.ops, interval)

    def profile(self, shape: ModelConfig) -> int:
        """Bytes that the largest step takes on a GPU beside weights and cache. Raises ValueError."""
        self.kv = KVCache(1, self.config.block_size, shape, self.kv_dtype, self.device)
        self.target = Runnable(self.model, self.kv.data)
        largest = self.largest_step(shape.max_model_len)
        return peak_memory(
            self.device, lambda: self.launch(self.prepare(largest)).result(), largest.num_tokens
        )

    def largest_step(self, max_model_len: int) -> SchedulerOutput:
        """As many tokens as one step may run, in max_num_seqs sequences."""
        most, drafts = self.config.max_num_batched_tokens, self.config.num_speculative_tokens or 0
        rows = min(self.config.max_num_seqs, most)
        counts = largest_counts(most, rows, max_model_len, min(1 + drafts, most // rows))
        params = SamplingParams(presence_penalty=1.0, top_p=0.9, prompt_logprobs=0)  # takes most
        return self.made_up([(count, count) for count in counts], params)

    def made_up(self, lengths: list[tuple[int, int]], params: SamplingParams) -> SchedulerOutput:
        """A step of sequences without a client, all in block 0, by their (new tokens, tokens); they
        have as many drafts as there is room for."""
        step, most = SchedulerOutput(), self.config.num_speculative_tokens or 0
        for i, (num_new, num_tokens) in enumerate(lengths):
            num_drafts = min(most, num_new - 1)
            request = Request(f"made-up-{i}", [0] * (num_tokens - num_drafts), params)
            sequence = Sequence(request, i, frozenset(), num_tokens, row=i)
            sequence.num_computed_tokens = num_tokens - num_new
            sequence.block_table = [0] * -(-num_tokens // self.config.block_size)
            sequence.draft_token_ids = [0] * num_drafts
            if self.config.speculative in ("draft", "self"):  # what rejection compares with
                shape = (num_drafts, self.model.config.vocab_size)
                sequence.draft_probs = torch.full(shape, 1 / shape[1], device=self.device)
            step.admitted.append(sequence)
            step.run(sequence, num_new)
        return step

    def warm_up(self) -> None:
        """Compile what steps will launch, where that is done at a kernel's first launch: a request
        would wait for it, and all that run beside it."""
        longest, decoded = self.max_model_len, 1 + (self.config.num_speculative_tokens or 0)
        most = min(longest, self.config.max_num_batched_tokens)
        for runs in filter(None, (self.target, self.drafter)):
            shape = runs.model.local
            group = shape.num_heads // shape.num_kv_heads
            for lengths in self.ops.warm_up_lengths(group, most, longest, decoded):
                for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=2, top_p=0.9)):
                    self.launch(self.prepare(self.made_up(lengths, params)), runs).result()

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        return self.inputs.prepare(scheduled)

    @property
    def num_buffer_bytes(self) -> int:
        """What a step's input takes, and the counts of tokens."""
        return self.inputs.num_bytes + self.last_token_ids.nbytes + self.counts.nbytes

    def expert_stats(self) -> dict[str, Any]:
        """Which experts were chosen how often, where they are spread."""
        experts = self.model.experts
        return experts.placement.stats(sorted(experts.replace)) if experts is not None else {}

    def launch(
        self, batch: Batch, what: Runnable | None = None, counts: Counts | None = None
    ) -> Work:
        """Give the device the batch; its tokens can be read from what this returns. counts: each
        engine's tokens, where rank 0 has said so."""
        is_draft = what is not None and what is self.drafter
        run = partial(self.run, batch, what)
        work = self.queue.submit(run, batch.shape.num_tokens, int(is_draft), counts)
        self.inputs.launched(work)
        return work

    def transfer(self, meta: list[Any]) -> None:
        """Begin transfers when the device has done all that it was given before."""
        if meta:
            self.queue.aside(partial(self.start_transfers, meta))

    def start_transfers(self, meta: list[Any]) -> Sampled:
        if self.ranks.size > 1 and self.ranks.rank == 0:
            self.ranks.control.send([*self.queue.counts, COPIES, *to_numbers(meta)])
        self.connector.start_load_kv(meta)
        return self.nothing()

    @torch.inference_mode()
    def run(self, batch: Batch, what: Runnable | None = None) -> Sampled:
        """All that the device does in a step. what: the model unless given. Rank 0 alone samples."""
        self.fill_in(batch, what)
        logits, scores = self.forward(batch, what)
        if logits is None:
            return self.nothing()
        return replace(self.sample(batch, logits), prompts=scores)

    def fill_in(self, batch: Batch, what: Runnable | None = None) -> None:
        """Put what the device keeps from step to step into the batch: block tables, and the tokens
        that were not known to the host. And count what the sequences that join have generated."""
        if self.ranks.rank == 0:
            if batch.joining is not None:
                batch.joining.write_to(self.counts)
            drawn = self.last_token_ids[(-1 - batch.token_ids).clamp(min=0)]
            batch.token_ids.copy_(torch.where(batch.token_ids < 0, drawn, batch.token_ids))
        with together(self.ranks, self.everyone):
            self.share(batch, what)
            self.inputs.tables.update(batch.table_changes, batch.table_rows)

    def share(self, batch: Batch, what: Runnable | None = None) -> None:
        """Rank 0's batch becomes every rank's."""
        if self.ranks.size > 1:
            if self.ranks.rank == 0 and self.is_ready:
                is_draft = what is not None and what is self.drafter
                header = header_of(batch, is_draft, self.connector.num_copied)
                self.ranks.control.send([*self.queue.counts, *header])
            self.ranks.group.broadcast(batch.packed)

    def forward(
        self, batch: Batch, what: Runnable | None = None
    ) -> tuple[torch.Tensor | None, list[PromptScores]]:
        """Logits after each sampled sequence's last token and its drafts, [num_sampled, vocab], on
        rank 0; and the scores of prompts that ask for them. what: the model unless given."""
        runs, scores = what or self.target, []
        with together(self.ranks, self.everyone):
            runs.model.start_step(self.queue.counts)
            hidden = runs.model.forward(
                batch.token_ids, batch.positions, runs.kv_data, batch.metadata, runs.layers
            )
            for piece in batch.prompts:
                if self.ranks.rank == 0:
                    scores.append(piece.score(hidden, runs.model.logits))
                else:
                    piece.bring(hidden, runs.model.logits)
            return runs.model.logits(hidden[batch.logits_indices]), scores

    @torch.inference_mode()
    def run_idle(self, kind: int) -> Sampled:
        """Serve the other engines' tokens in a forward in which this engine has none.
        kind: 1 where drafts are made."""
        runs = self.drafter if kind else self.target
        with together(self.ranks, self.everyone):
            if self.ranks.rank == 0:
                self.ranks.control.send([*self.queue.counts, kind])
            runs.model.start_step(self.queue.counts)
            runs.model.serve(runs.layers)
        return self.nothing()

    def nothing(self) -> Sampled:
        """What work gives that draws no token."""
        return Sampled(self.last_token_ids[:0], SampledLogprobs([]))

    def sample(self, batch: Batch, logits: torch.Tensor) -> Sampled:
        """The next tokens of each sampled sequence, and log probabilities if asked for."""
        sampling = batch.sampling
        if batch.has_penalties:
            sampling = replace(sampling, output_counts=self.counts[batch.rows])
        token_ids = sample(self.ops, logits, sampling)
        last = token_ids.clamp(min=0)  # NO_TOKEN is no input
        if batch.has_penalties:
            self.counts[batch.rows, last] += 1
        self.last_token_ids[batch.rows] = last
        num_accepted = None
        if any(batch.draft_lengths):
            token_ids, num_accepted = self.verify(batch, sampling.biased(logits), token_ids)
        logprobs = SampledLogprobs.of(logits, token_ids, sampling.num_logprobs)
        return Sampled(token_ids, logprobs, [], num_accepted, batch.draft_lengths)

    def verify(
        self, batch: Batch, logits: torch.Tensor, drawn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a batch with drafts emits at each sampled place, and how many drafts stay.

        drawn: the model's own draws. Returns [num_sampled] and [sampled sequences], int64.
        """
        lengths = batch.num_draft_tokens
        places = torch.arange(max(batch.draft_lengths) + 1, device=lengths.device)
        begins = (lengths + 1).cumsum(0) - (lengths + 1)
        first = batch.logits_indices[begins].unsqueeze(1)  # the place of each one's last token
        inside = (first + places[1:]).clamp(max=len(batch.token_ids) - 1)
        drafts = batch.token_ids[inside]
        verified = verify(drafts, lengths, drawn, self.rejection_rows(batch, logits))
        numbers = torch.arange(len(lengths), device=lengths.device)
        sequence = numbers.repeat_interleave(lengths + 1, output_size=len(drawn))
        place = torch.arange(len(drawn), device=lengths.device) - begins[sequence]
        token_ids = verified.token_ids[sequence, place].where(drawn != NO_TOKEN, NO_TOKEN)
        return token_ids, verified.num_accepted

    def rejection_rows(self, batch: Batch, logits: torch.Tensor) -> RejectionRows | None:
        """The sequences whose drafts were drawn from a known distribution, if any."""
        if not batch.rejecting:
            return None
        counts = [1 + length for length in batch.draft_lengths]
        begins = [end - count for end, count in zip(np.cumsum(counts), counts, strict=True)]
        places = [begins[i] + place for i in batch.rejecting for place in range(counts[i])]
        own = to_device(places, torch.int64, self.device)
        first = to_device([begins[i] for i in batch.rejecting], torch.int64, self.device)
        sampling = batch.sampling
        return RejectionRows(
            to_device(batch.rejecting, torch.int64, self.device),
            target_probs(self.ops, logits[own], **sampling.filters(own)),
            batch.draft_probs,
            sampling.seeds[first, 0],
            sampling.positions[first, 0],
            sampling.choices[first, 0],
        )


def load_runner(config: EngineConfig, folder: Path) -> ModelRunner:
    """The runner of rank 0, with the other ranks at its side. Raises ValueError."""
    ranks = start_ranks(config, folder)
    try:
        return ModelRunner(config, folder, ranks)
    except BaseException as error:
        ranks.close()
        if isinstance(error, RankError):
            raise ValueError(str(error)) from None
        raise


def layers_that_draft(count: int | None, num_layers: int) -> list[int]:
    """The first and the last layers, without some in between; two thirds of all by default.

    Raises ValueError.
    """
    count = count or max(1, round(num_layers * 2 / 3))
    if count > num_layers:
        raise ValueError(f"draft_layers is {count}: the model has {num_layers}")
    num_first = (count + 1) // 2
    return [*range(num_first), *range(num_layers - (count - num_first), num_layers)]
