"""Stages of layers on different ranks, and as many steps in flight as stages: pipeline parallelism.

(Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", arXiv
1811.06965.) A stage has some consecutive layers, their weights, and their keys and values; the first
has the embedding, the last the final norm and the head. For each token one hidden state goes from stage
to stage; a tensor-parallel model sums such a row twice in every layer.

    stage 0   step 1   step 2   step 3   step 4   step 5
    stage 1            step 1   step 2   step 3   step 4
    rank 0                   samples 1  samples 2  ...

With one step at a time all stages but one would be idle. So several steps are in flight, each with other
sequences, and the next begins when the first stage has finished the one before (`Scheduler.can_run`). A
token comes no sooner than on one rank. But each rank holds fewer weights, so more blocks fit.

Each stage runs the steps in order, and a block has the same number on all stages. The batch's packed
input goes from stage to stage with the hidden states, so no step has a collective of all ranks.

Logits of the sampled rows go back to rank 0, [num_sampled, vocab] in the model's dtype, because token
counts, masks, drafts and log probabilities are there. For 256 rows of 128k tokens they are 64 MiB a step
in bfloat16; vLLM samples on the last stage and returns 2 KiB of token ids. Rank 0 receives and samples
them in a queue of their own, beside the first stage's next forward.
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
    """The layers of the model that one stage has."""

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
        """Whether a tensor of the checkpoint belongs only to other stages."""
        if (match := LAYER.match(name)) is not None:
            return int(match[1]) < self.num_layers and int(match[1]) not in self.layers
        if name.startswith("model.embed_tokens."):
            return not self.is_first
        return name.startswith(("model.norm.", "lm_head.")) and not self.is_last


class Pipeline:
    """Brings a step's tensors to this rank's stage, and takes them on to the next."""

    def __init__(self, stages: Stages, dtype: torch.dtype, device: torch.device) -> None:
        self.stages, self.dtype, self.device = stages, dtype, device
        self.is_last = stages.number == stages.size - 1

    def share(self, packed: torch.Tensor) -> None:
        """Distribute a batch's packed input: rank 0 to its stage's ranks, each stage to the next."""
        if self.stages.before is None:
            self.stages.group.broadcast(packed)
        else:
            self.stages.before.receive(packed)
        if self.stages.after is not None:
            self.give(packed.clone())  # the buffer may be overwritten before it is sent

    def take(self, num_tokens: int, hidden_size: int) -> torch.Tensor | None:
        """The previous stage's hidden states, [num_tokens, hidden]; None in the first stage."""
        if self.stages.before is None:
            return None
        hidden = torch.empty(num_tokens, hidden_size, dtype=self.dtype, device=self.device)
        self.stages.before.receive(hidden)
        return hidden

    def give(self, x: torch.Tensor) -> None:
        """Send a tensor to the next stage, if there is one."""
        if self.stages.after is not None:
            self.stages.after.send(x)

    def give_back(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """Send the last stage's logits to rank 0. With one stage they are there already: returns them."""
        if self.stages.size == 1:
            return logits
        if logits is not None and len(logits):
            assert self.stages.back is not None, "logits on a rank that is not its stage's first"
            self.stages.back.send(logits.to(self.dtype).contiguous())
        return None

    def fetch(self, num_rows: int, vocab_size: int) -> torch.Tensor:
        """On rank 0: receive the logits that `give_back` sends, [num_rows, vocab]."""
        logits = torch.empty(num_rows, vocab_size, dtype=self.dtype, device=self.device)
        if num_rows:
            self.stages.back.receive(logits)
        return logits
