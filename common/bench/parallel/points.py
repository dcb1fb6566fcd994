"""What `parallel engines` measures, and the steps that the cost model takes for it."""

from dataclasses import dataclass
from typing import Any

from common.bench.parallel.cost_model import Batch

BUDGET = 256  # tokens of a step, the parts' default on a CPU
LONG, SHORT, NUM_SHORT = 512, 128, 8  # prompts of the two prefills


@dataclass(frozen=True)
class Point:
    """Some prompts, and how many tokens each is answered with: one is a prefill."""

    name: str
    num_prompts: int
    prompt_len: int
    output_len: int

    @property
    def decodes(self) -> bool:
        return self.output_len > 1

    def seconds_of(self, run: dict[str, Any]) -> float:
        """Of a step that decodes, or of the whole prefill."""
        return run["seconds"] / (self.output_len - 1 if self.decodes else 1)

    def steps(self, dp: int = 1) -> list[Batch]:
        """What the cost model is asked about: a step that decodes, or all steps of the prefill, of
        dp replicas that have even parts of the prompts."""
        if self.decodes:
            return [Batch(self.num_prompts, 1, self.prompt_len + self.output_len // 2)]
        busy = min(dp, self.num_prompts)  # the others have nothing to do
        together = max(1, BUDGET // self.prompt_len)
        num_steps = -(-self.num_prompts // (busy * together))
        pieces = range(0, self.prompt_len, BUDGET)
        return [
            Batch(busy * together, min(BUDGET, self.prompt_len - past), past)
            for _ in range(num_steps)
            for past in pieces
        ]
