"""The oracle: is an output what transformers would have said, token by token?

One teacher-forced forward of the reference over the tokens an engine produced gives the reference's
logits at every place. A greedy token must lie within `TOLERANCE` of the largest logit there, and at
most 1% of them may be other than the argmax. (Comparing with `generate` instead would blame an
engine for ties: transformers, cached against uncached, differs from itself by up to 8e-5.) A seeded
token must be the argmax of the reference's filtered logits plus the same noise, within the same
tolerance. Filters and penalties are written out here again, plainly and in float64, so that they
check the samplers and do not share their mistakes.

`damage` is for negative controls: an oracle that passes a wrong context is no oracle.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from common.models.checkpoint import load_transformers_model, resolve
from common.sampling import SamplingParams, as_int64, gumbel_noise

TOLERANCE = 1e-3  # of a logit
MASS_TOLERANCE = 1e-4  # of probability, at the border of top-p
MAX_OTHER = 0.01  # share of tokens that may differ from the reference's first choice

# (model, prompt, output, parameters, damage) -> the gap of each token. All parts give the same outputs
# for a request: the reference runs once for them, and again where one of them differs.
KNOWN_GAPS: dict[tuple[Any, ...], list[float]] = {}


@dataclass
class Verdict:
    """What the oracle found over some outputs.

    worst: how far below the reference's choice a token was, in logits (after temperature).
    """

    num_tokens: int = 0
    num_other: int = 0
    worst: float = 0.0
    where: str = ""

    def add(self, gap: float, place: str) -> None:
        self.num_tokens += 1
        self.num_other += gap > 0
        if gap > self.worst:
            self.worst, self.where = gap, place

    @property
    def is_right(self) -> bool:
        return self.worst <= TOLERANCE and self.num_other <= MAX_OTHER * self.num_tokens

    def __str__(self) -> str:
        share = f"{self.num_other} of {self.num_tokens} tokens are not the reference's choice"
        return f"{share}; the worst is {self.worst:.3g} below it, at {self.where or 'no place'}"


@cache
def reference_model(name: str) -> Any:
    """transformers' model in float32 on the CPU, loaded once."""
    return load_transformers_model(resolve(name), torch.float32)


@torch.inference_mode()
def reference_logits(
    name: str, prompt: list[int], output: list[int], damage: str | None = None
) -> torch.Tensor:
    """The reference's logits at each place of `output`, [len(output), vocab].

    damage: `cut` drops the first token of the context; `shift` moves the output's positions by one.
    """
    token_ids = torch.tensor([prompt + output[:-1]])
    positions = torch.arange(token_ids.shape[1]).unsqueeze(0)
    if damage == "cut":
        token_ids, positions = token_ids[:, 1:], positions[:, :-1]
    elif damage == "shift":
        positions = positions + (positions >= len(prompt) - 1)
    elif damage is not None:
        raise ValueError(f"damage must be cut or shift, not {damage!r}")
    model = reference_model(name)
    logits = model(token_ids, position_ids=positions, logits_to_keep=len(output)).logits
    return logits[0].double()


def check_greedy(
    name: str, pairs: list[tuple[list[int], list[int]]], damage: str | None = None
) -> Verdict:
    """Check greedy outputs: pairs of (prompt, output), token ids."""
    verdict = Verdict()
    for number, (prompt, output) in enumerate(pairs):
        gaps = greedy_gaps(name, prompt, output, damage)
        for place, gap in enumerate(gaps):
            verdict.add(gap, f"output {number}, token {place}")
    return verdict


def greedy_gaps(name: str, prompt: list[int], output: list[int], damage: str | None) -> list[float]:
    """How far each token of an output is below the reference's choice, in logits."""
    key = (name, tuple(prompt), tuple(output), "", damage)
    if key not in KNOWN_GAPS:
        logits = reference_logits(name, prompt, output, damage)
        chosen = logits.gather(1, torch.tensor([output]).T)[:, 0]
        KNOWN_GAPS[key] = (logits.amax(1) - chosen).tolist()
    return KNOWN_GAPS[key]


def check_seeded(
    name: str,
    triples: list[tuple[list[int], list[int], SamplingParams]],
    damage: str | None = None,
) -> Verdict:
    """Check sampled outputs that had a seed: (prompt, output, parameters)."""
    verdict = Verdict()
    for number, (prompt, output, params) in enumerate(triples):
        gaps = seeded_gaps(name, prompt, output, params, damage)
        for place, gap in enumerate(gaps):
            verdict.add(gap, f"output {number}, token {place} ({params})")
    return verdict


def seeded_gaps(
    name: str, prompt: list[int], output: list[int], params: SamplingParams, damage: str | None
) -> list[float]:
    """How far each token of an output is from the seeded draw, in logits."""
    key = (name, tuple(prompt), tuple(output), repr(params), damage)
    if key not in KNOWN_GAPS:
        logits = reference_logits(name, prompt, output, damage)
        KNOWN_GAPS[key] = [
            seeded_gap(
                penalised(logits[place], output[:place], params),
                token_id,
                params,
                len(prompt) + place,
            )
            for place, token_id in enumerate(output)
        ]
    return KNOWN_GAPS[key]


def penalised(logits: torch.Tensor, generated: list[int], params: SamplingParams) -> torch.Tensor:
    """Logits less presence and frequency penalties, [vocab]."""
    logits = logits.clone()
    for token_id in set(generated):
        logits[token_id] -= params.presence_penalty
        logits[token_id] -= params.frequency_penalty * generated.count(token_id)
    return logits


def seeded_gap(logits: torch.Tensor, token_id: int, params: SamplingParams, position: int) -> float:
    """How far `token_id` is from the seeded draw, 0 when it is the draw.

    logits: [vocab], float64. Infinite when the filters leave the token out.
    """
    scaled = logits / params.temperature
    tolerance = TOLERANCE / params.temperature
    surely, possibly = kept_sets(scaled, params, tolerance)
    if not possibly[token_id]:
        return float("inf")
    assert params.seed is not None
    seeds = torch.tensor([as_int64(params.seed)])
    noisy = scaled + gumbel_noise(seeds, torch.tensor([position]), torch.arange(len(scaled)))
    if not surely.any():  # all that stay lie at a border: any of them may be the only one
        return 0.0
    best = noisy[surely].max()
    gap = max((best - noisy[token_id]).item(), 0.0) * params.temperature
    return gap


def kept_sets(
    scaled: torch.Tensor, params: SamplingParams, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens top-k, top-p and min-p surely keep, and which they possibly keep.

    scaled: [vocab] after temperature. The two differ by tokens so near a border that rounding
    decides. A plain sort of the whole vocabulary.
    """
    top_k = params.top_k if 0 < params.top_k < len(scaled) else len(scaled)
    ordered, order = scaled.sort(descending=True)
    kth = ordered[top_k - 1] if top_k < len(scaled) else -torch.inf
    probs = ordered[:top_k].softmax(-1)
    before = torch.ones_like(scaled)  # the probability of the tokens before each, within top-k
    before[order[:top_k]] = probs.cumsum(-1) - probs
    least = scaled.max() + (math.log(params.min_p) if params.min_p > 0 else -torch.inf)
    surely = (scaled > kth + tolerance) & (scaled >= least + tolerance)
    possibly = (scaled >= kth - tolerance) & (scaled >= least - tolerance)
    if params.top_p < 1:
        surely &= before < params.top_p - MASS_TOLERANCE
        possibly &= before < params.top_p + MASS_TOLERANCE
    return surely, possibly
