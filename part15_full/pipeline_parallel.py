"""Stages of layers on different ranks, and as many steps in flight as stages: pipeline parallelism.

(Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", arXiv
1811.06965.) A stage has some consecutive layers, their weights, and their keys and values; the first
has the embedding, the last the final norm and the head. What goes from stage to stage is one row of
numbers a token, once: a tensor-parallel layer sums such rows twice.

    stage 0   step 1   step 2   step 3   step 4   step 5
    stage 1            step 1   step 2   step 3   step 4
    rank 0                   samples 1  samples 2  ...

One step at a time would leave all stages but one idle. So steps in flight have different sequences,
and each begins when the first stage is done with the one before (`Scheduler.can_run`). A token comes
no sooner than on one rank; per rank there are fewer weights, so more blocks fit.

Each stage does its steps in order, and a block is the same block on all of them. Behind rank 0 the
batch's packed input goes from stage to stage with the hidden states, so no stage waits for another in
a collective of all ranks.

Logits of the sampled rows go back to rank 0, [num_sampled, vocab] in the model's format: counts,
masks, drafts and log probabilities are there. For 256 rows of 128k tokens these are 64 MiB a step in
bfloat16, where vLLM samples on the last stage and returns 2 KiB of token ids. They are received and
sampled beside the first stage's next forward, in a queue of their own.
"""

import re
from dataclasses import dataclass, replace

import torch

from common.distributed.group import even_split
from common.distributed.stages import Stages
from common.models.architecture import ModelConfig

LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """The part of the model that one stage has."""

    layers: range
    num_layers: int  # of all stages

    @classmethod
    def of(cls, config: ModelConfig, number: int = 0, size: int = 1) -> "Stage":
        """Raises ValueError where there are more stages than layers."""
        if size > (most := config.num_layers):
            raise ValueError(f"pipeline_parallel_size is {size}: the model's num_layers is {most}")
        return cls(even_split(config.num_layers, size)[number], config.num_layers)

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model's shape as this stage's KV cache sees it."""
        return replace(config, num_layers=len(self.layers))

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to other stages alone."""
        if (match := LAYER.match(name)) is not None:
            return int(match[1]) < self.num_layers and int(match[1]) not in self.layers
        if name.startswith("model.embed_tokens."):
            return not self.is_first
        return name.startswith(("model.norm.", "lm_head.")) and not self.is_last


class Pipeline:
    """How a step's tensors come to this rank's stage and leave it."""

    def __init__(self, stages: Stages, dtype: torch.dtype, device: torch.device) -> None:
        self.stages, self.dtype, self.device = stages, dtype, device
        self.is_last = stages.number == stages.size - 1

    def share(self, packed: torch.Tensor) -> None:
        """A batch's packed input, from rank 0 to all ranks of its stage, and on to the next stage."""
        if self.stages.before is None:
            self.stages.group.broadcast(packed)
        else:
            self.stages.before.receive(packed)
        if self.stages.after is not None:
            self.give(packed.clone())  # the buffer may be written anew before it is sent

    def take(self, num_tokens: int, hidden_size: int) -> torch.Tensor | None:
        """The stage before's hidden states, [num_tokens, hidden]; None in the first stage."""
        if self.stages.before is None:
            return None
        hidden = torch.empty(num_tokens, hidden_size, dtype=self.dtype, device=self.device)
        self.stages.before.receive(hidden)
        return hidden

    def give(self, x: torch.Tensor) -> None:
        """To the next stage, if there is one."""
        if self.stages.after is not None:
            self.stages.after.send(x)

    def give_back(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """The last stage's logits to rank 0, which has them already where there is one stage."""
        if self.stages.size == 1:
            return logits
        if logits is not None and len(logits):
            assert self.stages.back is not None, "logits on a rank that is not its stage's first"
            self.stages.back.send(logits.to(self.dtype).contiguous())
        return None

    def fetch(self, num_rows: int, vocab_size: int) -> torch.Tensor:
        """On rank 0: what `give_back` sends, [num_rows, vocab]."""
        logits = torch.empty(num_rows, vocab_size, dtype=self.dtype, device=self.device)
        if num_rows:
            self.stages.back.receive(logits)
        return logits
