"""Log probabilities of sampled tokens: the model's own, of the rows that asked, as many as each wants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.completions import TokenLogprobs
from common.logprobs import SampledLogprobs
from common.sampling import NO_TOKEN

WISHES = st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=6)
VOCAB = 9


def case(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, all different, and a token of each row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(num_rows)])
    token_ids = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    return order * 0.7 - 3.0, token_ids


def expected_of(row: list[float], token_id: int, count: int) -> TokenLogprobs:
    """In Python's numbers, from the definition."""
    total = math.log(sum(math.exp(value) for value in row))
    order = sorted(range(len(row)), key=lambda id: -row[id])
    top = tuple((id, row[id] - total) for id in order[:count])
    return TokenLogprobs(token_id, row[token_id] - total, top)


def assert_close(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert found.token_id == expected.token_id
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [id for id, _ in found.top] == [id for id, _ in expected.top]
    for (_, value), (_, right) in zip(found.top, expected.top, strict=True):
        assert value == pytest.approx(right, abs=1e-5)


@given(WISHES, st.integers(0, 1000))
def test_each_row_has_what_it_asked_for(wishes: list[int | None], seed: int) -> None:
    logits, token_ids = case(len(wishes), seed)
    found = SampledLogprobs.of(logits, token_ids, wishes).lists(token_ids.tolist())
    assert len(found) == len(wishes)
    for row, (item, count) in enumerate(zip(found, wishes, strict=True)):
        assert (item is None) == (count is None)
        if item is not None and count is not None:
            assert_close(item, expected_of(logits[row].tolist(), int(token_ids[row]), count))


@given(WISHES, st.integers(0, 1000))
def test_a_copy_is_the_same(wishes: list[int | None], seed: int) -> None:
    logits, token_ids = case(len(wishes), seed)
    sampled = SampledLogprobs.of(logits, token_ids, wishes)
    copied = sampled.to(torch.device("cpu"), non_blocking=True)
    assert copied.lists(token_ids.tolist()) == sampled.lists(token_ids.tolist())


def test_a_copy_goes_where_it_is_told() -> None:
    logits, token_ids = case(3, seed=0)
    copied = SampledLogprobs.of(logits, token_ids, [None, 2, 0]).to(torch.device("meta"))
    assert copied.logprobs is not None and copied.top_token_ids is not None
    assert copied.logprobs.device.type == copied.top_token_ids.device.type == "meta"
    assert copied.wishes == [None, 2, 0]


def test_only_rows_that_asked_are_computed() -> None:
    """And no more columns than the largest wish: a batch of 256 may hold one that asks."""
    logits, token_ids = case(5, seed=1)
    sampled = SampledLogprobs.of(logits, token_ids, [None, 3, None, 1, None])
    assert sampled.logprobs is not None and sampled.top_token_ids is not None
    assert (*sampled.logprobs.shape, *sampled.top_token_ids.shape) == (2, 4, 2, 3)
    nobody = SampledLogprobs.of(logits, token_ids, [None] * 5)
    assert nobody.logprobs is None and nobody.top_token_ids is None
    assert nobody.to(torch.device("cpu")).lists(token_ids.tolist()) == [None] * 5


def test_a_row_alone_has_what_it_has_in_a_batch() -> None:
    logits, token_ids = case(4, seed=2)
    together = SampledLogprobs.of(logits, token_ids, [2, None, 6, 0]).lists(token_ids.tolist())
    for row, count in ((0, 2), (2, 6), (3, 0)):
        [alone] = SampledLogprobs.of(
            logits[row : row + 1], token_ids[row : row + 1], [count]
        ).lists([int(token_ids[row])])
        assert alone is not None and together[row] is not None
        assert_close(alone, together[row])


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 3000, dtype=torch.bfloat16)
    [item] = SampledLogprobs.of(logits, torch.tensor([7]), [0]).lists([7])
    assert item is not None and item.logprob == pytest.approx(-math.log(3000), abs=1e-5)


def test_a_row_without_a_token_disturbs_no_other() -> None:
    """Its logits were NaN; its own entry is dropped with the NO_TOKEN that stands for it."""
    logits, token_ids = case(3, seed=3)
    logits[1] = math.nan
    token_ids[1] = NO_TOKEN
    found = SampledLogprobs.of(logits, token_ids, [2, 2, 2]).lists(token_ids.tolist())
    for row in (0, 2):
        item = found[row]
        assert item is not None
        assert_close(item, expected_of(logits[row].tolist(), int(token_ids[row]), 2))
    assert found[1] is not None and found[1].token_id == NO_TOKEN and math.isnan(found[1].logprob)


def test_a_token_that_is_ruled_out() -> None:
    logits, _ = case(1, seed=4)
    logits[0, 5] = -math.inf
    [item] = SampledLogprobs.of(logits, torch.tensor([5]), [1]).lists([5])
    assert item is not None and item.logprob == -math.inf
