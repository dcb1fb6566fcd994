"""Structured output: an output follows its grammar, because no other token can be drawn.

After each token the grammar says which tokens may come next. A thread makes these masks beside the
forward whose logits they are for, and sampling waits for them. A mask depends on all tokens before it,
but a step is launched before the last of these tokens is read. So the thread works in the order of the
steps: the masks of a step, then the tokens that the step has drawn, then the masks of the next. Only
the sampling of a batch that has a sequence with a grammar waits for it; a forward never does.

Each draft token advances its sequence in the grammar, so each place of a draft has a mask of its own.
A draft token that the grammar forbids cannot be drawn, and so is rejected.

A grammar is compiled in another thread before its sequence joins the queue.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.device import to_device
from common.requests import Request
from common.sampling import SamplingBatch, TokenMasks
from common.structured.compiler import GrammarCompiler
from common.structured.grammar import Grammar
from common.structured.matcher import Matcher, num_words

from .device_queue import Work
from .sequence import Sequence

if TYPE_CHECKING:
    from .input_batch import Batch

Masks = tuple[np.ndarray, np.ndarray]  # rows of logits, [num_masked]; a mask for each


@dataclass(frozen=True)
class Constrained:
    """A sampled sequence that has a grammar. Only the mask thread may use its matcher."""

    number: int  # its place among the sampled sequences
    matcher: Matcher
    draft_token_ids: list[int]

    @staticmethod
    def of(sampled: Iterable[Sequence]) -> "list[Constrained]":
        """The sampled sequences that have a grammar."""
        return [
            Constrained(number, sequence.matcher, list(sequence.draft_token_ids))
            for number, sequence in enumerate(sampled)
            if sequence.matcher is not None
        ]


class MaskThread:
    """Makes masks and advances matchers by what was drawn, in the order of the steps."""

    def __init__(self, vocab_size: int) -> None:
        self.num_words = num_words(vocab_size)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, batch: "Batch") -> "Batch":
        """The batch, with its masks begun where sequences have a grammar."""
        if not batch.constrained:
            return batch
        lengths = np.array(batch.draft_lengths) + 1
        begins = lengths.cumsum() - lengths
        return replace(batch, masks=self.thread.submit(self.fill, batch.constrained, begins))

    def fill(self, constrained: list[Constrained], begins: np.ndarray) -> Masks:
        """A mask for each row of logits of these sequences. begins: each sampled sequence's first row."""
        counts = [1 + len(row.draft_token_ids) for row in constrained]
        pairs = zip(constrained, counts, strict=True)
        places = [begins[row.number] + np.arange(count) for row, count in pairs]
        masks = np.empty((sum(counts), self.num_words), np.int32)
        end = 0
        for row, count in zip(constrained, counts, strict=True):
            row.matcher.fill(masks[end : end + count], row.draft_token_ids)
            end += count
        return np.concatenate(places), masks

    @staticmethod
    def join(batch: "Batch", device: torch.device) -> SamplingBatch:
        """The batch's sampling parameters, with its masks. Waits until they are made; called in the
        device's queue, after the forward is launched."""
        if batch.masks is None:
            return batch.sampling
        rows, masks = batch.masks.result()
        masks = TokenMasks(
            to_device(rows, torch.int64, device), to_device(masks, torch.int32, device)
        )
        return replace(batch.sampling, masks=masks)

    def follow(self, batch: "Batch", work: Work) -> None:
        """Advance the matchers by the tokens that `work` draws, before the next masks are made."""
        if batch.constrained:
            self.thread.submit(self.advance, batch.constrained, work)

    def advance(self, constrained: list[Constrained], work: Work) -> None:
        token_ids = work.result().runs()
        for row in constrained:
            row.matcher.advance(token_ids[row.number])

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


class Grammars:
    """The engine's grammars, and the sequences that wait for theirs to be compiled."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        tokenizer, vocab_size = engine.tokenizer, engine.vocab_size
        self.compiler = GrammarCompiler(tokenizer, vocab_size, engine.eos_token_ids)
        self.waiting: dict[Sequence, Future[Any]] = {}

    def check(self, grammar: Grammar | None) -> None:
        """Compile a grammar now. Raises ValueError where it cannot be compiled."""
        if grammar is not None:
            self.compiler.compile(grammar).result()

    def ending_token_ids(self, request: Request) -> frozenset[int]:
        """The tokens that end a request's output. Where a grammar is complete, only the model's end
        token can be drawn, so that token ends the output even with `ignore_eos`."""
        eos = self.engine.eos_token_ids
        ends = request.params.ending_token_ids(eos)
        return ends if request.grammar is None else ends | frozenset(eos)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue, or let it wait for its grammar first. Raises ValueError
        where the model has no tokeniser."""
        if sequence.request.grammar is None:
            self.engine.scheduler.add(sequence)
        else:
            self.waiting[sequence] = self.compiler.compile(sequence.request.grammar)

    def admit(self) -> None:
        """Put sequences whose grammars are compiled into the queue; end those whose grammars failed."""
        for sequence in [s for s, compiled in self.waiting.items() if compiled.done()]:
            try:
                state = self.waiting[sequence].result()
            except Exception as error:  # also a library that is not there
                self.engine.finish(sequence)
                self.engine.emit(sequence, [], [], "error", f"the grammar {error}")
                continue
            del self.waiting[sequence]
            sequence.matcher = self.compiler.matcher(state, sequence.params.ignore_eos)
            self.engine.scheduler.add(sequence)

    def forget(self, sequence: Sequence) -> bool:
        """Drop a sequence that ends. Returns whether it was still waiting for its grammar."""
        return self.waiting.pop(sequence, None) is not None

    @staticmethod
    def error_of(sequence: Sequence) -> str | None:
        """Why a grammar let no token be drawn; None where the grammar is not the reason."""
        least, matcher = sequence.params.min_tokens, sequence.matcher
        if matcher is None or matcher.error is not None or len(sequence.output_token_ids) > least:
            return matcher and matcher.error
        return f"the grammar admits no longer output, and min_tokens is {least}"
