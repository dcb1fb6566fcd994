"""Each distinct sampler.py: its distribution is exact, and a row does not depend on its batch."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from common.completions import TokenLogprobs
from common.kernels import select_ops
from common.kernels.reference import ReferenceOps
from common.logprobs import SampledLogprobs
from common.sampling import SamplingBatch, SamplingParams
from common.testing.oracle import kept_sets, seeded_gap
from common.testing.parts import distinct_files, module_of

SAMPLERS = distinct_files("sampler.py")
pytestmark = pytest.mark.parametrize("part", SAMPLERS)

TOY = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def sample_rows(
    part: int, logits: torch.Tensor, batch: SamplingBatch
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens and log probabilities of each row; from part 03 on by this machine's own kernels."""
    sampler = module_of(part, "sampler")
    if part < 3:
        return sampler.sample(logits, batch)
    batch = replace(batch, choices=torch.zeros_like(batch.positions))
    drawn = sampler.sample(select_ops(), logits, batch)
    found = SampledLogprobs.of(logits, drawn, batch.num_logprobs)
    if part < 5:
        token_ids = drawn.tolist()
        return token_ids, found.lists(token_ids)
    tokens, logprobs = sampler.Sampled(drawn, found).lists()
    return [token_id for [token_id] in tokens], [logprob for [logprob] in logprobs]


def draw_many(
    part: int, logits: torch.Tensor, count: int, outputs: list[int] | None = None, **fields: Any
) -> torch.Tensor:
    """`count` draws from one row of logits, each with a seed of its own; returns the counts."""
    params = SamplingParams(**fields)
    batch = SamplingBatch.build(
        logits.expand(count, -1),
        [params] * count,
        list(range(count)),
        [5] * count,
        [outputs or []] * count,
    )
    token_ids, _ = sample_rows(part, logits.expand(count, -1), batch)
    return torch.bincount(torch.tensor(token_ids), minlength=logits.shape[-1])


def exact_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution that a row should be drawn from, by the oracle's plain filters."""
    scaled = logits.double() / params.temperature
    _, kept = kept_sets(scaled, params, 1e-9)
    return scaled.masked_fill(~kept, -torch.inf).softmax(-1)


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.35},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.15, "temperature": 1.3},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_distribution_is_exact(part: int, fields: dict[str, Any]) -> None:
    """Chi-square of 50,000 draws against the exact distribution; nothing outside the filter."""
    counts = draw_many(part, TOY, 50_000, **fields)
    probs = exact_probs(TOY, SamplingParams(**fields))
    assert counts[probs == 0].sum() == 0, f"drew a filtered token: {counts}"
    kept = probs > 0
    if kept.sum() > 1:
        p_value = chisquare(counts[kept], probs[kept] * 50_000).pvalue
        assert p_value > 1e-4, f"{counts.tolist()} against {(probs * 50_000).tolist()}"


def test_chi_square_can_fail(part: int) -> None:
    """The same check against a slightly wrong temperature must not pass."""
    counts = draw_many(part, TOY, 50_000, temperature=1.0)
    wrong = exact_probs(TOY, SamplingParams(temperature=1.05))
    assert chisquare(counts, wrong * 50_000).pvalue < 1e-4


def test_positions_and_seeds_give_independent_draws(part: int) -> None:
    """One seed over many positions is as good as many seeds, and neighbours do not agree."""
    count = 20_000
    rows = TOY.expand(count, -1)
    params = [SamplingParams()] * count
    batch = SamplingBatch.build(rows, params, [7] * count, list(range(count)), [[]] * count)
    token_ids, _ = sample_rows(part, rows, batch)
    tokens = torch.tensor(token_ids)
    probs = exact_probs(TOY, params[0])
    assert chisquare(torch.bincount(tokens, minlength=8), probs * count).pvalue > 1e-4
    agree = (tokens[1:] == tokens[:-1]).double().mean().item()
    expected = (probs**2).sum().item()
    assert abs(agree - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_top_p_keeps_the_token_that_crosses(part: int) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draw_many(part, logits, 2000, top_p=0.6).nonzero().flatten().tolist() == [0, 1]
    assert draw_many(part, logits, 2000, top_p=0.45).nonzero().flatten().tolist() == [0]
    assert draw_many(part, logits, 2000, top_p=1e-9).nonzero().flatten().tolist() == [0]


def test_equal_logits_stay_or_go_together(part: int) -> None:
    """Which of several equal tokens a sort puts first must not decide what can be drawn."""
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0])
    assert (draw_many(part, logits, 4000, top_k=2)[1:4] > 500).all()
    assert draw_many(part, logits, 4000, top_k=2)[4] == 0


def test_greedy_below_a_temperature(part: int) -> None:
    for temperature in (0.0, 1e-6):
        counts = draw_many(part, TOY, 50, temperature=temperature)
        assert counts[0] == 50


def test_penalties(part: int) -> None:
    """Presence counts once, frequency each time; greedy rows have them too."""
    logits = torch.tensor([1.0, 0.9, 0.5, 0.0])
    outputs = [0, 0, 1]

    def greedy(**fields: float) -> int:
        return int(draw_many(part, logits, 1, outputs, temperature=0.0, **fields).argmax())

    assert greedy() == 0
    assert greedy(frequency_penalty=0.09) == 0  # 0.82 against 0.81
    assert greedy(frequency_penalty=0.11) == 1  # 0.78 against 0.79
    assert greedy(presence_penalty=0.05) == 0
    assert greedy(presence_penalty=0.6) == 2
    counts = draw_many(part, TOY, 50_000, [0, 0, 3], presence_penalty=0.5, frequency_penalty=0.4)
    penalised = TOY - torch.tensor([1.3, 0, 0, 0.9, 0, 0, 0, 0])
    expected = penalised.double().softmax(-1) * 50_000
    assert chisquare(counts, expected).pvalue > 1e-4


def test_logprobs_are_the_models_own(part: int) -> None:
    """log_softmax of the raw logits, whatever temperature, filters and penalties do."""
    rows = TOY.expand(3, -1)
    params = [
        SamplingParams(temperature=0.5, top_k=2, logprobs=3, presence_penalty=1.0),
        SamplingParams(logprobs=0),
        SamplingParams(),
    ]
    batch = SamplingBatch.build(rows, params, [1, 2, 3], [4, 4, 4], [[0], [], []])
    token_ids, logprobs = sample_rows(part, rows, batch)
    expected = TOY.log_softmax(-1)
    assert logprobs[0].token_id == token_ids[0]
    assert logprobs[0].logprob == pytest.approx(expected[token_ids[0]].item(), abs=1e-6)
    assert [token for token, _ in logprobs[0].top] == [0, 1, 2]
    assert [value for _, value in logprobs[0].top] == pytest.approx(expected[:3].tolist(), abs=1e-6)
    assert logprobs[1].top == () and logprobs[2] is None


FIELDS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0, 10.0]),
        "top_k": st.sampled_from([0, 1, 7, 300, 1999]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "seed": st.integers(-(2**63), 2**64 - 1),
    }
)


@settings(max_examples=40)
@given(rows=st.lists(FIELDS, min_size=1, max_size=6), scale=st.sampled_from([0.01, 1.0, 5.0]))
def test_a_row_does_not_depend_on_its_batch(
    part: int, rows: list[dict[str, Any]], scale: float
) -> None:
    """Over a vocabulary wider than the candidates, with flat and with peaked logits: each row of a
    batch is what it is alone, and what the oracle's plain sort says."""
    sample = partial(sample_rows, part)
    generator = torch.Generator().manual_seed(len(rows))
    logits = torch.randn(len(rows), 2000, generator=generator) * scale
    params = [SamplingParams(**row) for row in rows]
    outputs = [[1, 2, 2][: i % 4] for i in range(len(rows))]
    lengths = [3 + i for i in range(len(rows))]
    seeds = [p.seed for p in params]
    together, _ = sample(logits, SamplingBatch.build(logits, params, seeds, lengths, outputs))
    for i, p in enumerate(params):
        one = logits[i : i + 1]
        build = SamplingBatch.build(one, [p], [seeds[i]], [lengths[i]], [outputs[i]])
        assert sample(one, build)[0] == [together[i]], p
        if p.temperature > 0:
            row = logits[i].double()
            row[list(set(outputs[i]))] -= p.presence_penalty
            assert seeded_gap(row, together[i], p, lengths[i] + len(outputs[i])) < 1e-3, p


PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.3}


@pytest.mark.parametrize("fields", [{}, PENALTIES, {"logit_bias": {3: 2.0}}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_what_its_float32_values_give(
    part: int, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(24, 300, generator=generator) * 3).to(dtype)
    params = [SamplingParams(top_p=0.9, temperature=i % 3, **fields) for i in range(24)]
    numbers, outputs = list(range(24)), [[1, 3, 3, i] for i in range(24)]
    batch = SamplingBatch.build(logits, params, numbers, numbers, outputs)
    assert sample_rows(part, logits, batch)[0] == sample_rows(part, logits.float(), batch)[0]


def test_logits_are_not_copied_where_nothing_is_added(part: int) -> None:
    """In float32 those of 256 sequences and 150k tokens would be 150 MB a step."""
    if part < 3:
        pytest.skip("this part's sampler is plain PyTorch, in float32")
    given: list[torch.Tensor] = []

    class Spy(ReferenceOps):
        def sample(self, logits: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            given.append(logits)
            return super().sample(logits, *rest, **named)

    logits = torch.randn(2, 50).bfloat16()
    for fields in ({"top_k": 3}, PENALTIES):
        batch = SamplingBatch.build(
            logits, [SamplingParams(**fields)] * 2, [1, 2], [3] * 2, [[1]] * 2
        )
        module_of(part, "sampler").sample(Spy(), logits, batch)
    assert given[0].data_ptr() == logits.data_ptr() and given[0].dtype == torch.bfloat16
    assert given[1].dtype == torch.float32
