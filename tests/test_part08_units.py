"""Part 08's pieces by themselves: what the rejection sampler emits is distributed as the target's own,
n-gram drafts are those of a search through the whole text, drafts end where they do not pay."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part08 import draft_length as lengths_module
from part08.config import EngineConfig
from part08.draft_length import DraftLength, StepTime, expected_tokens
from part08.proposer import Draft, NgramIndex, NgramProposer
from part08.rejection_sampler import (
    RejectionRows,
    Verified,
    rejection_sample,
    sample_and_match,
    target_probs,
    verification_noise,
    verify,
)
from part08.sequence import Sequence
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import weighted_draw
from common.kernels import Ops, reference, select_ops
from common.requests import Request
from common.sampling import SamplingParams, uniforms


def last_token_ids(verified: Verified) -> Tensor:
    """The last token of each row, [num_seqs] int64: the next step's input."""
    return verified.token_ids.gather(1, verified.num_accepted.unsqueeze(1)).squeeze(1)


def lists(verified: Verified) -> tuple[list[list[int]], list[int]]:
    """Each row's tokens to emit, and how many of them are drafts."""
    num_accepted = verified.num_accepted.tolist()
    rows = zip(verified.token_ids.tolist(), num_accepted, strict=True)
    return [token_ids[: count + 1] for token_ids, count in rows], num_accepted


COUNT = 50_000
VOCAB = 8
OPS = select_ops("reference")
GENERATOR = torch.Generator().manual_seed(8)
P = (
    torch.randn(VOCAB, VOCAB, generator=GENERATOR).double().mul(1.5).softmax(dim=1)
)  # [previous, next]
NEAR = (P.log() + 0.3 * torch.randn(VOCAB, VOCAB, generator=GENERATOR)).softmax(dim=1)
FAR = torch.randn(VOCAB, VOCAB, generator=GENERATOR).double().mul(1.5).softmax(dim=1)
P[2, 5] = P[2, 6] = 0  # tokens that the target never draws, but the draft does
P /= P.sum(dim=1, keepdim=True)
DISJOINT = torch.where(P < 0.05, 1.0, 0.0).double()
DISJOINT /= DISJOINT.sum(dim=1, keepdim=True)
DRAFTS = {"far": FAR, "near": NEAR, "equal": P, "disjoint": DISJOINT}


def fits(counts: Tensor, probs: Tensor) -> bool:
    """Whether chi-square lets counts pass as draws from probs; none may be where probs is 0."""
    counts, probs = counts.flatten(), probs.double().flatten()
    probs = probs / probs.sum()  # of float32 they miss 1 by more than chisquare lets pass
    if counts[probs == 0].sum() > 0:
        return False
    kept = probs > 0
    return bool(chisquare(counts[kept], probs[kept] * counts.sum()).pvalue > 1e-4)


def draw(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token of each row, by the ordinary noise of seed and position."""
    uniform = uniforms(seeds, positions, torch.zeros_like(positions))
    return (probs.cumsum(dim=1) < uniform[:, None]).sum(dim=1).clamp(max=probs.shape[1] - 1)


class MarkovModel:
    """COUNT sequences of a target whose next token depends on the last, and a draft model of its kind."""

    def __init__(self, draft: Tensor, max_drafts: int, mixed: bool = False) -> None:
        self.draft, self.max_drafts, self.mixed = draft, max_drafts, mixed
        self.seeds = torch.arange(COUNT)
        self.rng = torch.Generator().manual_seed(max_drafts)

    def step(
        self, last: Tensor, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(drafts [rows, max_drafts], lengths, q of all drafts, p of all places), q and p flat."""
        lengths = torch.full_like(last, self.max_drafts)
        if self.mixed:
            lengths = torch.randint(self.max_drafts + 1, lengths.shape, generator=self.rng)
        tokens = [last]
        for place in range(self.max_drafts):
            tokens.append(draw(self.draft[tokens[-1]], seeds, positions + place))
        before = torch.stack(tokens, dim=1)  # [rows, max_drafts + 1]: the token before each place
        place = torch.arange(self.max_drafts + 1)
        q = self.draft[before[place < lengths[:, None]]]
        p = P[before[place <= lengths[:, None]]]
        return before[:, 1:], lengths, q, p

    def generate(self, num_tokens: int, **changes: Tensor) -> Tensor:
        """The first num_tokens tokens of each, by as many steps as it takes: [COUNT, num_tokens]."""
        out = torch.zeros(COUNT, num_tokens + self.max_drafts + 1, dtype=torch.int64)
        done = torch.zeros(COUNT, dtype=torch.int64)
        places = torch.arange(self.max_drafts + 1)
        self.num_emitted: list[Tensor] = []
        while len(rows := (done < num_tokens).nonzero()[:, 0]) > 0:
            begins, seeds = done[rows], self.seeds[rows]
            last = torch.where(begins > 0, out[rows, begins - 1], 0)
            drafts, lengths, q, p = self.step(last, seeds, begins + 1)
            accept, residual = verification_noise(seeds, begins + 1, begins * 0, len(places))
            noise = {"accept_uniforms": accept, "residual_uniforms": residual}
            noise |= {name: values[rows] for name, values in changes.items()}
            verified = rejection_sample(drafts, lengths, q, p, **noise)
            # What lies beyond a row's own tokens is overwritten by its next step.
            out[rows[:, None], begins[:, None] + places] = verified.token_ids
            self.num_emitted.append(verified.num_accepted + 1)
            done[rows] += self.num_emitted[-1]
        return out[:, :num_tokens]


def joint(first: Tensor, second: Tensor) -> Tensor:
    """How often each pair occurs, [VOCAB, VOCAB]."""
    return torch.bincount(first * VOCAB + second, minlength=VOCAB**2).view(VOCAB, VOCAB)


def check_markov(tokens: Tensor) -> bool:
    """Each position's distribution, and the joint ones of neighbours, are the target's."""
    probs = P[0]
    good = True
    for position in range(tokens.shape[1]):
        good &= fits(torch.bincount(tokens[:, position], minlength=VOCAB), probs)
        if position + 1 < tokens.shape[1]:
            pairs = joint(tokens[:, position], tokens[:, position + 1])
            good &= fits(pairs, probs[:, None] * P)
        probs = probs @ P
    return good


class TestRejection:
    @pytest.mark.parametrize(
        ("draft", "max_drafts"),
        [
            *((draft, length) for draft in ("far", "near") for length in (1, 2, 3, 8)),
            *((draft, length) for draft in ("equal", "disjoint") for length in (1, 3)),
            *(
                pytest.param(draft, length, marks=pytest.mark.long)
                for draft in ("far", "near")
                for length in range(4, 8)
            ),
            *(pytest.param(draft, 8, marks=pytest.mark.long) for draft in ("equal", "disjoint")),
        ],
    )
    def test_the_distribution_is_the_targets(
        self, draft: str, max_drafts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every position, and neighbours together, across the borders of steps; 50,000 sequences.
        The vocabulary is one chunk, or three of which the last is shorter, or as many as tokens."""
        monkeypatch.setattr(weighted_draw, "CHUNK", (1024, 3, 1)[max_drafts % 3])
        tokens = MarkovModel(DRAFTS[draft], max_drafts).generate(3)
        assert check_markov(tokens)

    def test_the_distribution_over_a_large_vocabulary(self) -> None:
        """float32, as the engine has it; the tokens of which each kind is summed up, of 5000."""
        vocab, drafts = 5000, 2
        generator = torch.Generator().manual_seed(1)
        p, q = (torch.randn(1, vocab, generator=generator).mul(2).softmax(1) for _ in range(2))
        p[0, ::3] = 0
        kind = torch.arange(vocab) // 100
        seeds = torch.arange(4000)
        noise = verification_noise(seeds, seeds * 0, seeds * 0, drafts + 1)
        tokens = draw(q.expand(len(seeds), -1), seeds, seeds * 0 + 9)
        verified = rejection_sample(
            torch.stack([tokens, tokens], 1),
            seeds * 0 + drafts,
            q.expand(len(seeds) * drafts, -1),
            (p / p.sum()).expand(len(seeds) * (drafts + 1), -1),
            *noise,
        )
        first = verified.token_ids[:, 0]
        assert not (p[0, first] == 0).any()
        counts = torch.bincount(kind[first], minlength=50)
        assert fits(
            counts,
            torch.zeros(50, dtype=torch.float64).index_add(
                0, kind, p[0].double() / p.double().sum()
            ),
        )

    def test_drafts_of_different_lengths_in_one_batch(self) -> None:
        tokens = MarkovModel(NEAR, 5, mixed=True).generate(3)
        assert check_markov(tokens)

    def test_chi_square_finds_who_accepts_always(self) -> None:
        always = torch.full((COUNT, 4), 1e-12)
        always_near = MarkovModel(NEAR, 3).generate(3, accept_uniforms=always)
        assert not check_markov(always_near)

    def test_chi_square_finds_a_wrong_draft_distribution(self) -> None:
        """Drafts are drawn from one distribution, and another is told as theirs."""
        model = MarkovModel(NEAR, 2)
        drafts, lengths, q, p = model.step(model.seeds * 0, model.seeds, model.seeds * 0)
        noise = verification_noise(model.seeds, model.seeds * 0, model.seeds * 0, 3)
        told = q.sqrt() / q.sqrt().sum(dim=1, keepdim=True)
        right, wrong = (
            rejection_sample(drafts, lengths, x, p, *noise).token_ids[:, 0] for x in (q, told)
        )
        assert fits(torch.bincount(right, minlength=VOCAB), P[0])
        assert not fits(torch.bincount(wrong, minlength=VOCAB), P[0])

    def test_chi_square_finds_noise_that_also_drew_the_drafts(self) -> None:
        """Why what follows a rejected draft has a stream of its own: the draft's noise is spent."""
        model = MarkovModel(FAR, 1)
        spent = uniforms(model.seeds[:, None], torch.tensor([[1, 2]]), torch.zeros(1, 2).long())
        assert not check_markov(model.generate(1, residual_uniforms=spent))
        assert not check_markov(model.generate(1, accept_uniforms=spent))

    @pytest.mark.parametrize("max_drafts", (1, 3, 8))
    def test_tokens_of_a_step_are_as_the_formula_says(self, max_drafts: int) -> None:
        """Where a draft stays with the same probability at each place."""
        p, q = P[0], NEAR[0]
        acceptance = float(torch.minimum(p, q).sum())
        seeds = torch.arange(COUNT)
        zeros = torch.zeros_like(seeds)
        drafts = torch.stack(
            [draw(q.expand(COUNT, -1), seeds, zeros + i) for i in range(max_drafts)], 1
        )
        lengths = zeros + max_drafts
        noise = verification_noise(seeds, zeros, zeros, max_drafts + 1)
        all_q, all_p = q.expand(COUNT * max_drafts, -1), p.expand(COUNT * (max_drafts + 1), -1)
        verified = rejection_sample(drafts, lengths, all_q, all_p, *noise)
        mean = 1 + verified.num_accepted.double().mean().item()
        error = verified.num_accepted.double().std().item() / COUNT**0.5
        expected = (1 - acceptance ** (max_drafts + 1)) / (1 - acceptance)
        assert expected_tokens(acceptance, max_drafts) == pytest.approx(expected)
        assert abs(mean - expected) < 4 * error

    def test_results_repeat(self) -> None:
        first, second = (MarkovModel(NEAR, 3).generate(3) for _ in range(2))
        assert torch.equal(first, second)

    def test_equal_distributions_accept_all(self) -> None:
        model = MarkovModel(P, 4)
        model.generate(5)
        assert bool((model.num_emitted[0] == 5).all())

    def test_nothing_is_left_when_rounding_makes_q_the_larger(self) -> None:
        """p = 0.3, 0.7 and q the same and a little more: no residual, but a draft is rejected."""
        p = torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)
        q = p[:1] * (1 + 1e-9)
        just_above = torch.full((1, 2), 1 - 1e-12, dtype=torch.float64)
        drafts, lengths = torch.tensor([[0]]), torch.tensor([1])
        verified = rejection_sample(drafts, lengths, q, p, just_above, just_above * 0.5)
        assert lists(verified) == ([[1]], [0])

    def test_tokens_of_probability_0(self) -> None:
        """A draft that q could not draw stays if p can draw it; what p cannot draw never comes."""
        p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).repeat(2, 1)
        q = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2, 1)
        drafts, lengths = torch.tensor([[1], [2]]), torch.tensor([1, 1])
        half = torch.full((2, 2), 0.5, dtype=torch.float64)
        assert lists(rejection_sample(drafts, lengths, q, p, half, half)) == (
            [[1, 0], [1]],
            [1, 0],
        )

    @pytest.mark.parametrize("chunk", (1024, 1, 2, 3))
    @pytest.mark.parametrize("uniform", (2.0**-50, 1 - 2.0**-49))
    def test_the_ends_of_the_uniforms(
        self, uniform: float, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weighted_draw, "CHUNK", chunk)
        p = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
        q = torch.zeros(0, 4)
        noise = torch.full((1, 1), uniform, dtype=torch.float64)
        drafts, lengths = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
        tokens, _ = lists(rejection_sample(drafts, lengths, q, p, noise, noise))
        assert tokens == ([[1]] if uniform < 0.5 else [[2]])

    @settings(max_examples=200)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.floats(0, 1), st.integers(1, 5))
    def test_a_token_is_where_the_sum_passes_the_uniform(
        self, weights: list[int], uniform: float, chunk: int
    ) -> None:
        """By counting, whatever the chunks."""
        p = torch.tensor([[*weights, 1, 0]], dtype=torch.float32)
        u = min(max(uniform, 2.0**-50), 1 - 2.0**-49)
        target, expected, total = u * float(p.sum()), 0, 0.0
        while (total := total + float(p[0, expected])) <= target:
            expected += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weighted_draw, "CHUNK", chunk)
            is_residual, noise = torch.tensor([[False]]), torch.tensor([[u]], dtype=torch.float64)
            assert int(weighted_draw.draw(p, p * 0, is_residual, noise)) == expected

    def test_noise_has_streams_of_its_own(self) -> None:
        seeds = torch.arange(2000)
        zeros = torch.zeros_like(seeds)
        accept, residual = verification_noise(seeds, zeros, zeros, 2)
        ordinary = uniforms(seeds, zeros, zeros)
        columns = torch.stack(
            [accept[:, 0], accept[:, 1], residual[:, 0], residual[:, 1], ordinary]
        )
        correlations = torch.corrcoef(columns) - torch.eye(5)
        assert correlations.abs().max() < 0.1
        assert columns.min() > 0 and columns.max() < 1
        other_choice, _ = verification_noise(seeds, zeros, zeros + 1, 2)
        assert not torch.equal(accept, other_choice)


class TestMatch:
    def sampled(self, before: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        ones = torch.ones(len(before))
        return OPS.sample(
            P[before].log(), ones, (ones * 0).long(), ones, ones * 0, seeds, positions
        )

    @pytest.mark.parametrize("max_drafts", (1, 4))
    def test_tokens_are_those_without_drafts(self, max_drafts: int) -> None:
        """Certain drafts (the likeliest next token): token for token the seeded result, and so its
        distribution."""
        seeds, num_tokens = torch.arange(COUNT), 3
        plain = [torch.zeros_like(seeds)]
        for position in range(1, num_tokens + 1):
            plain.append(self.sampled(plain[-1], seeds, torch.full_like(seeds, position)))
        expected = torch.stack(plain[1:], dim=1)
        assert check_markov(expected)

        out = torch.zeros(COUNT, num_tokens + max_drafts + 1, dtype=torch.int64)
        done, last = torch.zeros_like(seeds), torch.zeros_like(seeds)
        while bool((done < num_tokens).any()):
            tokens = [last]
            for _ in range(max_drafts):
                tokens.append(P[tokens[-1]].argmax(dim=1))
            before = torch.stack(tokens, dim=1)
            positions = done[:, None] + 1 + torch.arange(max_drafts + 1)
            targets = self.sampled(
                before.flatten(), seeds.repeat_interleave(max_drafts + 1), positions.flatten()
            )
            verified = verify(before[:, 1:], torch.full_like(seeds, max_drafts), targets)
            emitted = torch.arange(max_drafts + 1) <= verified.num_accepted[:, None]
            emitted &= (done < num_tokens)[:, None]
            rows, columns = emitted.nonzero(as_tuple=True)
            out[rows, done[rows] + columns] = verified.token_ids[rows, columns]
            last = torch.where(emitted.any(dim=1), last_token_ids(verified), last)
            done = done + emitted.sum(dim=1)
        assert torch.equal(out[:, :num_tokens], expected)

    def test_mismatch_first_middle_last_and_nowhere(self) -> None:
        drafts = torch.tensor([[9, 2, 3], [1, 9, 3], [1, 2, 9], [1, 2, 3], [1, 2, 7], [7, 7, 7]])
        targets = torch.tensor([[1, 2, 3, 4]] * 6)
        verified = sample_and_match(drafts, targets, torch.tensor([3, 3, 3, 3, 2, 0]))
        rows = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3], [1]]
        assert lists(verified) == (rows, [0, 1, 2, 3, 2, 0])
        assert last_token_ids(verified).tolist() == [row[-1] for row in rows]

    def test_a_match_after_a_mismatch_does_not_count(self) -> None:
        verified = sample_and_match(
            torch.tensor([[9, 2, 3]]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([3])
        )
        assert lists(verified) == ([[1]], [0])

    def test_a_batch_without_drafts(self) -> None:
        none = torch.zeros(3, 0, dtype=torch.int64)
        verified = verify(none, torch.zeros(3, dtype=torch.int64), torch.tensor([5, 6, 7]))
        assert lists(verified) == ([[5], [6], [7]], [0, 0, 0])


class TestMixedBatch:
    """Every second row is greedy; the others accept by rejection."""

    max_drafts = 4

    def verified(self, only_rejection: bool = False) -> tuple[Verified, Tensor, Tensor]:
        """(result, greedy rows' drafts, which rows are greedy)"""
        model = MarkovModel(NEAR, self.max_drafts, mixed=True)
        zeros = torch.zeros(COUNT, dtype=torch.int64)
        drafts, lengths, q, p = model.step(zeros, model.seeds, zeros)
        is_greedy = torch.arange(COUNT) % 2 == 0
        likeliest = [zeros]
        for _ in range(self.max_drafts):
            likeliest.append(P[likeliest[-1]].argmax(dim=1))
        drafts = torch.where(is_greedy[:, None], torch.stack(likeliest[1:], 1), drafts)
        drafts[::4, 2] = 7  # a quarter of all: greedy rows with a wrong third draft
        places = torch.arange(self.max_drafts + 1)
        before = torch.cat([zeros[:, None], drafts], dim=1)
        targets = P[before[places <= lengths[:, None]]].argmax(dim=1)
        rows = (~is_greedy).nonzero()[:, 0]
        q_mask = (~is_greedy).repeat_interleave(lengths)
        p_mask = (~is_greedy).repeat_interleave(lengths + 1)
        rejection = RejectionRows(rows, p[p_mask], q[q_mask], rows, rows * 0, rows * 0)
        if only_rejection:
            alone = replace(rejection, rows=torch.arange(len(rows)))
            some = torch.zeros(int((lengths[rows] + 1).sum()), dtype=torch.int64)
            return verify(drafts[rows], lengths[rows], some, alone), drafts, lengths
        return verify(drafts, lengths, targets, rejection), drafts, lengths

    def test_greedy_rows_are_exact(self) -> None:
        verified, _, lengths = self.verified()
        tokens, num_accepted = lists(verified)
        chain = [0]
        for _ in range(self.max_drafts + 1):
            chain.append(int(P[chain[-1]].argmax()))
        assert chain[3] != 7
        for row in range(0, 2000, 2):
            length = min(int(lengths[row]), 2) if row % 4 == 0 else int(lengths[row])
            assert num_accepted[row] == length
            assert tokens[row] == chain[1 : length + 2]

    def test_the_others_keep_their_distribution(self) -> None:
        verified, _, _ = self.verified()
        first = verified.token_ids[1::2, 0]
        assert fits(torch.bincount(first, minlength=VOCAB), P[0])
        has_two = verified.num_accepted[1::2] >= 1
        kept = verified.token_ids[1::2][has_two]
        for token in range(VOCAB):  # the second token, given the first
            second = kept[kept[:, 0] == token, 1]
            if len(second) > 500:
                assert fits(torch.bincount(second, minlength=VOCAB), P[token])

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        mixed, _, _ = self.verified()
        alone, _, _ = self.verified(only_rejection=True)
        tokens, num_accepted = lists(mixed)
        assert (tokens[1::2], num_accepted[1::2]) == lists(alone)


def test_verify_does_not_wait_for_the_device() -> None:
    """Tensors without data: whoever read one, or made one on another device, would raise."""
    ids = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    column, flat = ids[:, 0], torch.zeros(11, dtype=torch.int64, device="meta")
    p, q = torch.zeros(7, 3000, device="meta"), torch.zeros(5, 3000, device="meta")
    rejection = RejectionRows(column[:2], p, q, column[:2], column[:2], column[:2])
    verified = verify(ids, column, flat, rejection)
    assert verified.token_ids.shape == (3, 5) and verified.token_ids.is_meta
    assert last_token_ids(verified).shape == verified.num_accepted.shape == (3,)


def test_rejection_holds_no_row_of_float64() -> None:
    """[rows, vocab] in it would be as much memory again as both distributions."""
    logits = torch.randn(6, 4096)
    columns = torch.ones(6), torch.zeros(6, dtype=torch.int64), torch.ones(6), torch.zeros(6)
    drafts, lengths = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 2])
    noise = torch.full((2, 3), 0.5, dtype=torch.float64)
    with Sizes() as sizes:
        p = target_probs(OPS, logits, *columns)
        rejection_sample(drafts, lengths, p[:4], p, noise, noise)
    assert sizes.largest[torch.float32] >= p.numel()
    assert sizes.largest[torch.float64] <= 2 * weighted_draw.CHUNK


class Sizes(TorchDispatchMode):
    """The most elements that any result has, by its format."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if isinstance(result, Tensor):
            before = self.largest.get(result.dtype, 0)
            self.largest[result.dtype] = max(before, result.numel())
        return result


class TestTargetProbs:
    FILTERS = (
        {},
        {"temperature": 0.4},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
        {"top_k": 2000, "top_p": 0.99},
    )

    def columns(self, settings: list[dict[str, float]]) -> list[Tensor]:
        defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        names = {name: [{**defaults, **row}[name] for row in settings] for name in defaults}
        return [torch.tensor(values) for values in names.values()]

    @pytest.mark.parametrize("ops", (OPS, select_ops()), ids=lambda ops: ops.name)
    @pytest.mark.parametrize("spread", (0.5, 2.0, 8.0))
    @pytest.mark.parametrize("vocab", (5, 1500, 6000))
    def test_filters_are_the_references(self, vocab: int, spread: float, ops: Ops) -> None:
        """All filters in one batch; also rows so flat that top_p needs the whole vocabulary."""
        rows = [row for row in self.FILTERS for _ in range(4)]
        generator = torch.Generator().manual_seed(vocab)
        logits = spread * torch.randn(len(rows), vocab, generator=generator)
        logits[::4, : vocab // 2] = logits[::4, vocab // 2 : vocab // 2 * 2]  # many equal ones
        temperature, top_k, top_p, min_p = self.columns(rows)
        probs = target_probs(ops, logits, temperature, top_k, top_p, min_p)
        scaled = logits / temperature[:, None]
        fewest, most = (
            scaled >= self.smallest_kept(scaled, top_k, mass, min_p)[:, None]
            for mass in (torch.where(top_p < 1, top_p + error, 1) for error in (-1e-5, 1e-5))
        )
        assert probs.dtype == torch.float32 and not probs[~most].any()
        expected = scaled.double().where((probs > 0) | fewest, -torch.inf).softmax(dim=1)
        # exp's error grows with its argument; the largest is 87 here. What is less likely than 1e-37
        # may be 0 in float32.
        torch.testing.assert_close(probs.double(), expected, rtol=2e-5, atol=1e-37)

    def smallest_kept(self, scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """In float64. A sum in float32, in whatever order a machine takes, may cross top_p a token
        earlier or later: so this is asked for a little less and a little more."""
        smallest = reference.smallest_kept(scaled.double(), top_k, top_p.double(), min_p)
        return torch.where(min_p > 0, smallest - 1e-6, smallest)

    def test_it_is_what_ops_sample_draws_from(self) -> None:
        logits = torch.randn(12, generator=torch.Generator().manual_seed(3)).expand(COUNT, -1)
        zeros = torch.zeros(COUNT, dtype=torch.int64)
        for row in self.FILTERS[:7]:
            columns = [column.expand(COUNT) for column in self.columns([row])]
            token_ids = OPS.sample(logits, *columns, torch.arange(COUNT), zeros)
            probs = target_probs(OPS, logits[:1], *self.columns([row]))
            assert fits(torch.bincount(token_ids, minlength=12), probs), row

    def test_the_crossing_token_stays(self) -> None:
        logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        for top_p, kept in ((0.6, 2), (0.45, 1), (1e-9, 1), (0.96, 4)):
            probs = target_probs(OPS, logits, *self.columns([{"top_p": top_p}]))
            assert int((probs > 0).sum()) == kept

    def test_temperature_0_is_the_largest(self) -> None:
        logits = torch.tensor([[1.0, 5.0, 4.999], [1.0, 2.0, 3.0]])
        probs = target_probs(OPS, logits, *self.columns([{"temperature": 0.0}, {}]))
        assert probs[0].tolist() == [0, 1, 0]
        torch.testing.assert_close(probs[1], logits[1].softmax(0))

    def test_broken_logits_give_numbers(self) -> None:
        broken = torch.full((4, 3), torch.nan)
        broken[1, 1], broken[2, 2], broken[3] = 1.0, torch.inf, -torch.inf
        probs = target_probs(OPS, broken, *self.columns([{"temperature": 0.5, "top_p": 0.9}] * 4))
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(4))
        assert probs[1].tolist() == [0, 1, 0] and probs[2].tolist() == [0, 0, 1]


def sequence_of(token_ids: list[int], num_output: int = 0) -> Sequence:
    cut = len(token_ids) - num_output
    request = Request("a", token_ids[:cut], SamplingParams())
    sequence = Sequence(request, 0, frozenset(), len(token_ids) + 1000)
    sequence.extend(token_ids[cut:])
    return sequence


def search(token_ids: list[int], min_n: int, max_n: int, max_length: int) -> list[int]:
    """What n-gram drafting is, by a search through the whole text."""
    for n in range(max_n, min_n - 1, -1):
        for begin in range(len(token_ids) - n):
            if token_ids[begin : begin + n] == token_ids[len(token_ids) - n :]:
                return token_ids[begin + n : begin + n + max_length]
    return []


class TestNgram:
    @settings(max_examples=300, deadline=None)
    @given(
        pieces=st.lists(
            st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8
        ),
        min_n=st.integers(1, 3),
        extra=st.integers(0, 3),
        max_length=st.integers(0, 6),
        rests=st.lists(st.booleans(), min_size=8, max_size=8),
    )
    def test_it_is_a_search(
        self, pieces: list[list[int]], min_n: int, extra: int, max_length: int, rests: list[bool]
    ) -> None:
        """Tokens come in pieces, and not after each is it asked: always what a search finds."""
        proposer = NgramProposer(min_n, min_n + extra)
        sequence = sequence_of(pieces[0])
        for piece, rests_now in zip([[], *pieces[1:]], rests, strict=False):
            sequence.extend(piece)
            [draft] = proposer.propose([sequence], [0 if rests_now else max_length])
            token_ids = sequence.prompt_token_ids + sequence.output_token_ids
            found = search(token_ids, min_n, min_n + extra, max_length)
            assert draft == Draft([] if rests_now else found)

    def test_the_earliest_of_equally_long_matches(self) -> None:
        text = [1, 2, 5, 5, 1, 2, 6, 6, 1, 2]
        assert NgramProposer(2, 4).draft(sequence_of(text), 3) == [5, 5, 1]

    def test_the_longest_match(self) -> None:
        text = [1, 2, 5, 5, 3, 1, 2, 6, 6, 3, 1, 2]
        assert NgramProposer(2, 4).draft(sequence_of(text), 2) == [6, 6]
        assert NgramProposer(2, 2).draft(sequence_of(text), 2) == [5, 5]

    def test_a_draft_ends_with_the_text(self) -> None:
        assert NgramProposer(2, 4).draft(sequence_of([7, 1, 2, 3, 1, 2]), 9) == [3, 1, 2]
        assert NgramProposer(2, 4).draft(sequence_of([4, 4, 4, 4]), 9) == [4]

    @pytest.mark.parametrize("text", ([1], [1, 2], [1, 2, 3, 4, 5], [2, 1, 3, 1]))
    def test_no_match(self, text: list[int]) -> None:
        assert NgramProposer(2, 4).draft(sequence_of(text), 5) == []

    def test_matches_reach_over_prompt_and_output(self) -> None:
        text = [1, 2, 3, 9, 1, 2]
        for num_output in range(len(text)):
            assert NgramProposer(2, 4).draft(sequence_of(text, num_output), 2) == [3, 9]

    def test_it_keeps_nothing_of_who_has_ended(self) -> None:
        proposer = NgramProposer(2, 4)
        first, second = sequence_of([1, 2, 1, 2]), sequence_of([3, 4, 3, 4])
        proposer.propose([first, second], [2, 2])
        proposer.forget(first)
        assert list(proposer.indexes) == [second]
        proposer.forget(first)  # one that is not known
        proposer.forget(second)
        assert not proposer.indexes

    def test_who_may_have_no_draft_costs_nothing(self) -> None:
        proposer = NgramProposer(2, 4)
        proposer.propose([sequence_of([1, 2, 1, 2])], [0])
        assert not proposer.indexes

    def test_an_index_holds_an_entry_a_token_and_length(self) -> None:
        index = NgramIndex(2, 4)
        for token_id in range(1000):
            index.extend([token_id % 97])
        assert len(index.first_ends) <= 3 * 1000
        assert index.first_ends == self.from_scratch(index.token_ids).first_ends

    def from_scratch(self, token_ids: list[int]) -> NgramIndex:
        index = NgramIndex(2, 4)
        index.extend(list(token_ids))
        return index

    @pytest.mark.parametrize("sizes", ((0, 2), (3, 2), (-1, 4), (5, None), (None, 1)))
    def test_bad_sizes(self, sizes: tuple[int | None, int | None]) -> None:
        with pytest.raises(ValueError, match="prompt_lookup_m"):
            EngineConfig(
                speculative="ngram", prompt_lookup_min=sizes[0], prompt_lookup_max=sizes[1]
            )


def cpu_seconds(num_tokens: int) -> float:
    """About what a step of SmolLM2 takes on two cores."""
    return 0.022 + 0.0009 * num_tokens


def gpu_seconds(num_tokens: int) -> float:
    return 0.005 + 0.00002 * max(0, num_tokens - 256)


class Drafter:
    """Drafts 0, 1, 2, … as long as they may be, in no time."""

    def __init__(self, is_free: bool) -> None:
        self.is_free = is_free

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        return [Draft(list(range(length))) for length in max_lengths]

    def forget(self, sequence: Sequence) -> None:
        pass


class Simulation:
    """Sequences whose drafts stay with a given probability, on a device with a given cost."""

    def __init__(
        self, num_sequences: int, acceptance: float, seconds=cpu_seconds, limit=8, is_free=False
    ) -> None:
        self.rng = random.Random(4)
        self.lengths = DraftLength()
        self.sequences = [sequence_of([i]) for i in range(num_sequences)]
        self.acceptance, self.seconds, self.limit = acceptance, seconds, limit
        self.drafter = Drafter(is_free)

    def run(self, num_steps: int) -> list[list[int]]:
        """Each step's draft lengths."""
        return [self.step() for _ in range(num_steps)]

    def step(self) -> list[int]:
        limits = [self.limit] * len(self.sequences)
        drafts, chosen = self.lengths.propose(
            self.drafter, self.sequences, limits, len(self.sequences)
        )
        for sequence, draft, length in zip(self.sequences, drafts, chosen, strict=True):
            hits = 0
            while hits < length and self.rng.random() < self.acceptance:
                hits += 1
            bonus = hits if hits == length and self.rng.random() < self.acceptance else -1
            self.lengths.observe(sequence, draft.token_ids, [*range(hits), bonus])
        num_tokens = len(self.sequences) + sum(chosen)
        noise = self.rng.lognormvariate(0, 0.05)
        self.lengths.observe_step(num_tokens, self.seconds(num_tokens) * noise)
        return chosen

    def mean(self, num_steps: int) -> float:
        steps = self.run(num_steps)
        return sum(map(sum, steps)) / num_steps / len(self.sequences)


class TestDraftLength:
    def test_expected_tokens(self) -> None:
        assert expected_tokens(0.5, 5) == pytest.approx(1.97, abs=0.005)
        assert expected_tokens(0.75, 5) == pytest.approx(3.29, abs=0.005)
        assert expected_tokens(0.0, 5) == 1 and expected_tokens(1.0, 5) == 6
        assert expected_tokens(0.9, 0) == 1

    def test_all_accepted_grows_to_the_limit(self) -> None:
        simulation = Simulation(1, 1.0)
        simulation.run(30)
        assert simulation.mean(50) > 7.5

    def test_all_rejected_stops_and_probes_rarely(self) -> None:
        simulation = Simulation(1, 0.0)
        simulation.run(200)
        steps = simulation.run(2000)
        num_drafts = sum(map(sum, steps))
        assert 1 <= num_drafts <= 40, num_drafts
        assert max(map(max, steps)) <= 3

    def test_probes_fall_into_the_same_steps(self) -> None:
        simulation = Simulation(16, 0.0)
        simulation.run(200)
        steps = simulation.run(1000)
        assert sum(any(step) for step in steps) <= 20
        assert sum(map(sum, steps)) / 1000 < 0.25

    def test_it_comes_back(self) -> None:
        """The text becomes easy to guess: the next probe notices."""
        simulation = Simulation(1, 0.0)
        simulation.run(150)
        simulation.acceptance = 1.0
        simulation.run(160)
        assert simulation.mean(50) > 6

    def test_it_comes_back_at_once_when_drafts_are_free(self) -> None:
        """Drafts that are not verified are compared with what came anyway."""
        simulation = Simulation(1, 0.0, is_free=True)
        simulation.run(150)
        simulation.acceptance = 1.0
        simulation.run(20)
        assert simulation.mean(50) > 6

    def test_load_makes_drafts_shorter(self) -> None:
        means = []
        for num_sequences in (1, 8, 32):
            simulation = Simulation(num_sequences, 0.6)
            simulation.run(100)
            means.append(simulation.mean(200))
        assert means[0] > means[1] + 0.3 > means[2] + 0.6, means
        assert means[2] < 1, means

    def test_a_gpu_with_room_drafts_under_load(self) -> None:
        simulation = Simulation(16, 0.6, gpu_seconds)
        simulation.run(100)
        assert simulation.mean(100) > 4

    def test_good_sequences_draft_beside_bad_ones(self) -> None:
        draft_length = DraftLength()
        good, bad = sequence_of([1]), sequence_of([2])
        for step in range(200):
            draft_length.observe_step(1 + step % 12, cpu_seconds(1 + step % 12))
            draft_length.observe(good, [1, 2, 3, 4], [1, 2, 3, 4, 5])
            draft_length.observe(bad, [1, 2, 3, 4], [9])
        good_length, bad_length = draft_length.choose([good, bad], [4, 4], 2)
        assert good_length == 4 and bad_length == 0

    @settings(max_examples=100, deadline=None)
    @given(
        limits=st.lists(st.integers(0, 9), min_size=1, max_size=40),
        num_prompt_tokens=st.integers(0, 300),
        seed=st.integers(0, 99),
    )
    def test_limits_hold(self, limits: list[int], num_prompt_tokens: int, seed: int) -> None:
        rng, draft_length = random.Random(seed), DraftLength()
        sequences = [sequence_of([i]) for i in range(len(limits))]
        for _ in range(40):
            num_tokens = rng.choice((1, 2, 5, 16, 100))
            draft_length.observe_step(num_tokens, rng.random())
            lengths = draft_length.choose(sequences, limits, len(limits) + num_prompt_tokens)
            assert all(0 <= n <= limit for n, limit in zip(lengths, limits, strict=True))
            for sequence, length in zip(sequences, lengths, strict=True):
                draft_length.observe(sequence, [1] * length, [rng.randint(0, 1)])

    def test_drafting_has_its_price(self) -> None:
        """A draft model that is as slow as the model drafts nothing, for all it is right."""
        lengths = []
        for seconds in (0.0001, 0.5):
            simulation = Simulation(1, 0.95)
            simulation.run(30)
            simulation.lengths.place_seconds.extend([seconds] * lengths_module.NUM_SAMPLES)
            lengths.append(simulation.step()[0])
        assert lengths[0] > 4 and lengths[1] == 0

    @pytest.mark.parametrize(
        ("num_drafting", "dearer", "least", "most"),
        [(1, 0.01, 1, 3), (1, 0.05, 0, 0), (3, 0.05, 4, 8), (4, 0.05, 4, 8), (1, 0.0, 8, 8)],
    )
    def test_most_do_not_lose_for_the_few(
        self, num_drafting: int, dearer: float, least: int, most: int
    ) -> None:
        """Of six sequences some are easy to guess; each token makes a step so much longer."""
        draft_length = DraftLength()
        sequences = [sequence_of([i]) for i in range(6)]
        for num_tokens in (4, 6, 8, 16, 32, 64) * 5:
            draft_length.observe_step(num_tokens, 0.02 * (1 + dearer * (num_tokens - 6)))
        for sequence in sequences[:num_drafting]:
            for _ in range(20):
                draft_length.observe(sequence, [1] * 8, [1] * 9)
        limits = [8] * num_drafting + [0] * (6 - num_drafting)
        lengths = draft_length.choose(sequences, limits, 6)
        assert least <= max(lengths) <= most
        assert lengths[num_drafting:] == [0] * (6 - num_drafting)

    def test_catching_up_is_not_the_price_of_drafting(self) -> None:
        """A prompt that a draft model runs, in slices and slowly, does not end the drafts."""

        class Model:
            is_free = False
            num_slices = 12

            def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
                self.num_slices -= 1
                time.sleep(0.02 if self.num_slices >= 0 else 0.0001)
                return [Draft([] if self.num_slices > 0 else [7] * max_lengths[0])]

            def forget(self, sequence: Sequence) -> None:
                pass

        model, draft_length, [sequence] = Model(), DraftLength(), [sequence_of([1])]
        given = []
        for _ in range(40):
            [draft], [length] = draft_length.propose(model, [sequence], [4], 1)
            given.append(length)
            draft_length.observe(sequence, draft.token_ids, [*draft.token_ids, 3])
            draft_length.observe_step(1 + length, 0.01)
        assert given[:11] == [0] * 11 and sum(given[-20:]) > 40

    def test_a_free_proposer_is_asked_first_and_its_drafts_cut(self) -> None:
        proposer, draft_length = NgramProposer(2, 4), DraftLength()
        [repeats, new] = sequence_of([1, 2, 3, 4, 5, 6, 1, 2]), sequence_of([1, 2, 3])
        for _ in range(3):
            draft_length.observe_step(2, 0.01)
            draft_length.observe_step(4, 0.0101)
            draft_length.observe_step(8, 1.0)
        drafts, lengths = draft_length.propose(proposer, [repeats, new], [4, 4], 2)
        assert [draft.token_ids for draft in drafts] == [[3, 4, 5, 6], []]
        assert lengths == [2, 0]

    def test_a_proposer_with_a_model_is_asked_for_what_is_worth_it(self) -> None:
        class Model:
            is_free = False
            asked: list[list[int]] = []  # noqa: RUF012

            def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
                self.asked.append(max_lengths)
                return [Draft([7] * length) for length in max_lengths]

            def forget(self, sequence: Sequence) -> None:
                pass

        model, draft_length = Model(), DraftLength()
        sequences = [sequence_of([1]), sequence_of([2])]
        for _ in range(100):
            drafts, lengths = draft_length.propose(model, sequences, [3, 0], 2)
            assert lengths == [len(draft.token_ids) for draft in drafts]
            assert lengths[1] == 0
            draft_length.observe(sequences[0], drafts[0].token_ids, [8])
            draft_length.observe_step(2 + sum(lengths), cpu_seconds(2 + sum(lengths)))
        assert sum(map(any, model.asked)) < 60
        assert all(seconds > 0 for seconds in draft_length.place_seconds)

    def test_it_keeps_nothing_of_who_has_ended(self) -> None:
        simulation = Simulation(3, 0.5)
        simulation.run(3)
        for sequence in simulation.sequences:
            simulation.lengths.forget(sequence)
        assert not simulation.lengths.acceptances


class TestStepTime:
    def estimate(self, times: StepTime, *num_tokens: int) -> list[float]:
        return times.estimate(np.array(num_tokens)).tolist()

    def test_it_finds_the_line(self) -> None:
        times, rng = StepTime(), random.Random(0)
        for _ in range(300):
            num_tokens = rng.choice((1, 2, 4, 9, 16, 30))
            disturbed = 5.0 if rng.random() < 0.1 else 1.0
            times.observe(num_tokens, cpu_seconds(num_tokens) * disturbed)
        for num_tokens, seconds in enumerate(self.estimate(times, *range(1, 60)), start=1):
            assert seconds == pytest.approx(cpu_seconds(num_tokens), rel=0.1)

    def test_it_does_not_look_far_beyond_what_it_knows(self) -> None:
        times = StepTime()
        assert self.estimate(times, 1, 8, 9) == [1.0, 1.0, math.inf]
        for _ in range(3):
            times.observe(32, 0.05)
        assert self.estimate(times, 16, 32, 64, 65) == [0.025, 0.05, 0.05, math.inf]

    def test_larger_steps_are_never_faster_than_the_largest_known(self) -> None:
        """A small step that was disturbed does not make the line beyond the large one fall."""
        times = StepTime()
        for num_tokens, seconds in ((2, 0.09), (16, 0.03)) * 3:
            times.observe(num_tokens, seconds)
        assert self.estimate(times, 2, 9, 16, 32) == [0.03, 0.03, 0.03, 0.03]

    def test_a_disturbed_small_step_does_not_make_bad_drafts_pay(self) -> None:
        """Else they would be verified until it is forgotten: while there are drafts no step is small."""
        lengths, sequence = DraftLength(), sequence_of([1])
        for num_tokens, seconds in ((1, 0.09), (4, 0.03)) * 3:
            lengths.observe_step(num_tokens, seconds)
        for _ in range(20):
            lengths.observe(sequence, [1, 1, 1], [2])
        assert lengths.choose([sequence], [3], 1) == [0]

    def test_one_slow_step_is_not_believed(self) -> None:
        times = StepTime()
        for _ in range(5):
            times.observe(1, 0.02)
        times.observe(5, 1.0)
        assert self.estimate(times, 2) == [pytest.approx(0.02)]

    def test_a_size_that_was_not_run_for_long_is_forgotten(self) -> None:
        times = StepTime()
        for _ in range(3):
            times.observe(5, 1.0)
        for _ in range(lengths_module.RETRY_AFTER):
            times.observe(1, 0.02)
        assert self.estimate(times, 2) == [pytest.approx(0.02)]
        assert len(times.buckets) == 1
