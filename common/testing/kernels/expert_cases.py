"""Cases of a mixture of experts: few tokens and many, choices that are even, lopsided or absent."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.testing.kernels.case import REFERENCE, Case, Target, error_of, wide


@dataclass(frozen=True)
class Spec:
    num_tokens: int
    k: int
    num_experts: int
    hidden: int
    size: int
    choice: str = "even"  # even, one, absent or repeated


SPECS = {
    "no tokens": Spec(0, 2, 4, 32, 16),
    "one token": Spec(1, 2, 8, 64, 40),
    "one expert": Spec(5, 1, 1, 33, 20),
    "a few tokens": Spec(7, 3, 8, 64, 32),
    "all choose one": Spec(40, 2, 5, 48, 24, "one"),
    "no expert is here": Spec(3, 2, 4, 32, 16, "absent"),
    "an expert twice": Spec(9, 4, 3, 40, 16, "repeated"),
    "many experts": Spec(9, 3, 33, 40, 16),
    "odd sizes": Spec(6, 2, 3, 70, 37),
    "prompt": Spec(100, 2, 4, 96, 48),
    "long prompt": Spec(150, 2, 2, 64, 32),
}

# What these are about does not depend on the number format: they run in float32 alone.
ONCE = ("no tokens", "one expert", "no expert is here", "an expert twice", "many experts", "prompt")


def expert_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, spec in SPECS.items():
        if dtype != torch.float32 and name in ONCE:
            continue
        yield Case("experts", name, lambda t, spec=spec: experts_error(t, spec))
    yield Case("experts", "one replaced", replaced_error)


def make_experts(t: Target, spec: Spec) -> tuple[list[Tensor], list[Tensor]]:
    """Of each expert gate_up and down; outputs are about as large as inputs."""
    hidden, size, numbers = spec.hidden, spec.size, range(spec.num_experts)
    gate_up = [t.randn(2 * size, hidden, seed=2 * i) * hidden**-0.5 for i in numbers]
    return gate_up, [t.randn(hidden, size, seed=2 * i + 1) * size**-0.5 for i in numbers]


def make_choices(t: Target, spec: Spec, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights. Some are absent: -1, as on a rank with few experts."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.num_tokens, spec.k)
    if spec.choice == "repeated":
        ids = torch.randint(spec.num_experts, shape, generator=generator)
    else:
        scores = torch.rand(spec.num_tokens, spec.num_experts, generator=generator)
        ids = scores.topk(spec.k).indices
    if spec.choice == "one":
        ids[:, 0] = spec.num_experts - 1
        ids[:, 1:] = -1
    absent = torch.rand(shape, generator=generator) < 0.2
    ids[absent if spec.choice != "absent" else ...] = -1
    return ids.to(t.device), torch.rand(shape, generator=generator).to(t.device)


def expected_of(x: Tensor, choices: tuple[Tensor, Tensor], *experts: list[Tensor]) -> Tensor:
    """A token after the other, and not an expert after the other as the reference."""
    gate_ups, downs = ([wide(weight) for weight in weights] for weights in experts)
    ids, weights = (wide(tensor) for tensor in choices)
    out = torch.zeros_like(wide(x))
    for token, row in enumerate(wide(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert >= 0:
                inner = REFERENCE.silu_and_mul((gate_ups[expert] @ row)[None])[0]
                out[token] += weight * (downs[expert] @ inner)
    return out


def experts_error(t: Target, spec: Spec) -> float:
    x, choices = t.randn(spec.num_tokens, spec.hidden, seed=99), make_choices(t, spec)
    gate_up, down = make_experts(t, spec)
    prepared = t.ops.prepare_experts(iter(gate_up), iter(down))
    actual = t.ops.experts(x, *choices, prepared)
    return error_of(actual, expected_of(x, choices, gate_up, down), t.dtype)


def replaced_error(t: Target) -> float:
    """The last expert becomes another; the others, and what was given for them, stay."""
    spec = SPECS["a few tokens"]
    x, choices = t.randn(spec.num_tokens, spec.hidden, seed=99), make_choices(t, spec)
    gate_up, down = make_experts(t, spec)
    prepared = t.ops.prepare_experts(gate_up, down)
    other = t.randn(2 * spec.size, spec.hidden, seed=50), t.randn(spec.hidden, spec.size, seed=51)
    other = other[0] * spec.hidden**-0.5, other[1] * spec.size**-0.5
    t.ops.replace_expert(prepared, spec.num_experts - 1, *other)
    actual = t.ops.experts(x, *choices, prepared)
    expected = expected_of(x, choices, [*gate_up[:-1], other[0]], [*down[:-1], other[1]])
    return error_of(actual, expected, t.dtype)
