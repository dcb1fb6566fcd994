"""What a request may ask for, the errors that say what is wrong, and the noise it is drawn with."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKENS,
    SamplingBatch,
    SamplingParams,
    as_int64,
    gumbel_noise,
    philox,
    uniforms,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed", "max_tokens", "n", "logprobs")
NO_NUMBER = (math.nan, math.inf, -math.inf, True, "1", [1], {}, 1j, np.True_)
BAD = {
    "temperature": (-0.001, 100.001, -1, 10**400, -(10**400), None),
    "top_p": (0, 0.0, -0.5, 1.0000001, 2, None),
    "min_p": (-1e-9, 1.5, None),
    "presence_penalty": (-2.01, 2.01, 3, None),
    "frequency_penalty": (-2.01, 2.01, 3, None),
    "top_k": (-2, MAX_TOKENS + 1, 10**400, None),
    "seed": (-(2**63) - 1, 2**64, 10**400),
    "max_tokens": (0, -1, MAX_TOKENS + 1),
    "n": (0, -1, MAX_N + 1, None),
    "logprobs": (-1, MAX_LOGPROBS + 1),
    "prompt_logprobs": (-1, MAX_LOGPROBS + 1),
    "min_tokens": (-1, MAX_TOKENS + 1, None),
    "ignore_eos": (0, 1, "true", None),
    "include_stop_str_in_output": (0, 1, "true", None),
    "logit_bias": (5, [5], "5", True),
}
WRONG = [
    *itertools.product(NUMBERS, NO_NUMBER),
    *itertools.product(INTEGERS, (*NO_NUMBER, 1.0, Fraction(1))),
    *((name, value) for name, values in BAD.items() for value in values),
]


class TestParams:
    def test_defaults(self) -> None:
        """vLLM's, and so OpenAI's completions."""
        assert dataclasses.asdict(SamplingParams()) == {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "seed": None,
            "max_tokens": 16,
            "stop": (),
            "stop_token_ids": (),
            "ignore_eos": False,
            "n": 1,
            "logprobs": None,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "include_stop_str_in_output": False,
            "prompt_logprobs": None,
            "logit_bias": None,
        }

    @pytest.mark.parametrize(
        ("biases", "wrong"),
        [
            ({-1: 1.0}, "-1"),
            ({1.5: 1.0}, "1.5"),
            ({True: 1.0}, "True"),
            ({MAX_TOKENS + 1: 1.0}, str(MAX_TOKENS + 1)),
            ({5: 100.01}, "100.01"),
            ({5: 1, 6: -101}, "-101"),
            ({5: math.nan}, "nan"),
            ({5: "1"}, "'1'"),
            ({5: None}, "None"),
            (dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0), str(MAX_LOGIT_BIAS + 1)),
        ],
    )
    def test_a_bad_bias_is_named(self, biases: dict[Any, Any], wrong: str) -> None:
        with pytest.raises(ValueError, match=r"^logit_bias must") as caught:
            SamplingParams(logit_bias=biases)
        assert str(caught.value).endswith(f"not {wrong}")
        assert SamplingParams(logit_bias={}).logit_bias is None
        assert SamplingParams(logit_bias={5: -100, 6: 100}).logit_bias == {5: -100.0, 6: 100.0}

    @pytest.mark.parametrize(("name", "value"), WRONG)
    def test_a_bad_value_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} must be ")
        if isinstance(value, int) and value.bit_length() > 256:
            assert "bits" in message
        else:
            assert message.endswith(f"not {value!r}")

    @pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
    def test_an_integer_without_a_decimal_form_is_an_error_of_the_field(self, name: str) -> None:
        """Python refuses to print more than 4300 digits; the message must not try."""
        with pytest.raises(ValueError, match=f"^{name} must be .* bits$"):
            SamplingParams(**{name: 10**5000})

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (5, "5"),
            (0, "0"),
            (False, "False"),
            (b"ab", "b'ab'"),
            ({"a": 1}, "{'a': 1}"),
            (["a", ""], "''"),
            ("", "''"),
            (["a", 3], "3"),
            (["a", None], "None"),
            (["x" * (MAX_STOP_LENGTH + 1)], "'xxxx"),
            (["a"] * (MAX_STOPS + 1), str(MAX_STOPS + 1)),
        ],
    )
    def test_bad_stop(self, value: Any, shown: str) -> None:
        with pytest.raises(ValueError, match=r"^stop must") as caught:
            SamplingParams(stop=value)
        assert shown in str(caught.value)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (5, "5"),
            (0, "0"),
            ("12", "'12'"),
            ([-1], "-1"),
            ([True], "True"),
            ([1.0], "1.0"),
            ([2**70], str(2**70)),
            ([0] * (MAX_STOPS + 1), str(MAX_STOPS + 1)),
        ],
    )
    def test_bad_stop_token_ids(self, value: Any, shown: str) -> None:
        with pytest.raises(ValueError, match=r"^stop_token_ids must") as caught:
            SamplingParams(stop_token_ids=value)
        assert shown in str(caught.value)

    def test_unknown_fields_are_errors(self) -> None:
        with pytest.raises(TypeError, match="best_of"):
            SamplingParams(best_of=2)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("given", "kept"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ()), (None, ())]
    )
    def test_stop_takes_one_or_many(self, given: Any, kept: tuple[str, ...]) -> None:
        assert SamplingParams(stop=given).stop == kept

    def test_limits_themselves_are_allowed(self) -> None:
        for name, values in {
            "temperature": (0, 100),
            "top_p": (5e-324, 1),
            "min_p": (0, 1),
            "presence_penalty": (-2, 2),
            "top_k": (-1, 0, MAX_TOKENS),
            "seed": (-(2**63), 2**64 - 1, None),
            "max_tokens": (1, MAX_TOKENS, None),
            "n": (1, MAX_N),
            "logprobs": (0, MAX_LOGPROBS, None),
        }.items():
            for value in values:
                assert getattr(SamplingParams(**{name: value}), name) == value

    def test_never_changes(self) -> None:
        """Also not through a list that the caller still holds."""
        stops, ids = ["a"], [3]
        params = SamplingParams(stop=stops, stop_token_ids=ids)  # type: ignore[arg-type]
        stops.append("b")
        ids.append(4)
        assert (params.stop, params.stop_token_ids) == (("a",), (3,))
        with pytest.raises(dataclasses.FrozenInstanceError):
            params.temperature = 0.0  # type: ignore[misc]
        assert hash(params) == hash(SamplingParams(stop="a", stop_token_ids=(3,)))

    def test_numpy_numbers_become_pythons(self) -> None:
        """A numpy seed would overflow where 64 bits are taken as signed ones."""
        params = SamplingParams(
            temperature=np.float32(0.5),
            top_k=np.int32(3),
            seed=np.uint64(2**64 - 1),
            max_tokens=np.int64(7),
            stop_token_ids=[np.int16(4)],
        )
        values = (params.temperature, params.top_k, params.seed, params.max_tokens)
        assert values == (0.5, 3, 2**64 - 1, 7)
        assert [type(v) for v in (*values, *params.stop_token_ids)] == [float, *[int] * 4]
        assert as_int64(params.seed) == -1


def philox_of_integers(key: tuple[int, int], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, written from the paper and not from our code."""
    low, high = key
    x0, x1, x2, x3 = counter
    for _ in range(10):
        left, right = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = right // 2**32 ^ x1 ^ low, right % 2**32
        x2, x3 = left // 2**32 ^ x3 ^ high, left % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def philox_words(key: tuple[int, ...], counter: tuple[int, ...]) -> list[int]:
    def words(values: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([value]) for value in values)

    k0, k1 = words(key)
    return [int(word) for word in philox((k0, k1), words(counter))]


ONES = 0xFFFFFFFF


# Random123's known answers (kat_vectors, Salmon et al. 2011): key, counter, output.
VECTORS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES), (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


class TestPhilox:
    @pytest.mark.parametrize(("key", "counter", "answer"), VECTORS)
    def test_known_answers(self, key: Any, counter: Any, answer: Any) -> None:
        assert tuple(philox_words(key, counter)) == answer
        assert philox_of_integers(key, counter) == answer

    @settings(max_examples=100)
    @given(st.lists(st.integers(0, ONES), min_size=6, max_size=6))
    def test_any_input_as_in_integers(self, words: list[int]) -> None:
        key, counter = (words[0], words[1]), tuple(words[2:])
        assert tuple(philox_words(key, counter)) == philox_of_integers(key, counter)


def uniform(seed: int, position: int, token: int, choice: int = 0, stream: int = 0) -> float:
    tensors = (torch.tensor([value]) for value in (seed, position, token))
    return uniforms(*tensors, choices=choice, stream=stream).item()


class TestNoise:
    @settings(max_examples=50)
    @given(INT64, st.integers(0, 2**24), st.integers(0, 2**20), st.integers(0, 127))
    def test_uniforms_are_the_top_24_bits(
        self, seed: int, position: int, token: int, choice: int
    ) -> None:
        """The recipe of the documentation, in integers: any other implementation can follow it."""
        key = (seed % 2**32, (seed >> 32) % 2**32)
        word = philox_of_integers(key, (token, position, choice, 3))[0]
        assert uniform(seed, position, token, choice, 3) == ((word >> 8) + 0.5) / 2**24

    def test_never_0_and_never_1(self) -> None:
        """Even for the smallest and the largest word; so Gumbel noise is always finite."""
        extremes = torch.tensor([0, ONES])
        for u in (((extremes >> 8).double() + 0.5) / (1 << 24)).tolist():
            assert 0 < u < 1
            assert math.isfinite(-math.log(-math.log(u)))
        u = uniforms(torch.tensor([5]), torch.tensor([0]), torch.arange(500_000))
        assert 0 < u.min() < 1e-5 < 1 - 1e-5 < u.max() < 1
        assert u.dtype == torch.float64

    @pytest.mark.parametrize("along", ["seed", "position", "token", "choice"])
    def test_uniform_along_every_argument(self, along: str) -> None:
        """Kolmogorov-Smirnov, and chi-square for pairs of neighbours. The seeds are fixed."""
        steps, fixed = torch.arange(20_000), torch.tensor([77])
        arguments = [steps if along == name else fixed for name in ("seed", "position", "token")]
        u = uniforms(*arguments, choices=steps if along == "choice" else 0).numpy()
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        counts, _, _ = np.histogram2d(u[:-1], u[1:], bins=16, range=[[0, 1], [0, 1]])
        assert stats.chisquare(counts.ravel()).pvalue > 1e-3

    def test_every_argument_matters_and_changes_everything(self) -> None:
        """Noise that differs in one argument has no correlation: 20,000 pairs, |r| below 4 sigma."""
        tokens = torch.arange(20_000)
        base = {"seeds": 9, "positions": 4, "choices": 0, "stream": 0}
        variants = [base, *({**base, name: base[name] + 1} for name in base)]
        variants += [{**base, "seeds": 9 + 2**32}, {**base, "seeds": 9 - 2**63}]
        # Arguments must not be summed or swapped on their way into the counter.
        variants += [{**base, "positions": 0, "choices": 4}, {**base, "positions": 0, "stream": 4}]
        noise = [
            uniforms(
                torch.tensor([v["seeds"]]),
                torch.tensor([v["positions"]]),
                tokens,
                v["choices"],
                v["stream"],
            ).numpy()
            for v in variants
        ]
        for one, other in itertools.combinations(noise, 2):
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(len(tokens))

    @settings(max_examples=25)
    @given(st.lists(st.tuples(INT64, st.integers(0, 2**20)), min_size=1, max_size=6))
    def test_the_same_alone_and_in_a_batch(self, rows: list[tuple[int, int]]) -> None:
        tokens = torch.arange(50)
        seeds = torch.tensor([[seed] for seed, _ in rows])
        positions = torch.tensor([[position] for _, position in rows])
        batch = gumbel_noise(seeds, positions, tokens)
        assert batch.shape == (len(rows), 50)
        for row, (seed, position) in zip(batch, rows, strict=True):
            alone = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), tokens)
            assert torch.equal(row, alone)

    def test_gumbel_is_gumbel(self) -> None:
        noise = gumbel_noise(torch.tensor([3]), torch.tensor([11]), torch.arange(20_000))
        assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3

    @given(st.integers(-(2**63), 2**64 - 1))
    def test_a_seed_keeps_its_64_bits(self, seed: int) -> None:
        signed = as_int64(seed)
        assert signed % 2**64 == seed % 2**64
        assert torch.tensor([signed]).item() == signed


class TestBatch:
    def build(self, *params: SamplingParams, vocab: int = 10) -> SamplingBatch:
        outputs = [[1, 1, 4]] * len(params)
        logits = torch.zeros(len(params), vocab)
        return SamplingBatch.build(
            logits, params, [p.seed or 0 for p in params], [5] * len(params), outputs
        )

    def test_columns(self) -> None:
        batch = self.build(
            SamplingParams(temperature=0.5, seed=2**64 - 1, logprobs=2), SamplingParams(top_k=3)
        )
        assert batch.temperature.tolist() == [[0.5], [1.0]]
        assert batch.seeds.tolist() == [[-1], [0]]
        assert batch.positions.tolist() == [[8], [8]], "prompt and output tokens so far"
        assert batch.num_logprobs == [2, None]
        assert batch.output_counts is None, "nobody asked for penalties"

    def test_counts_when_one_row_has_penalties(self) -> None:
        batch = self.build(SamplingParams(), SamplingParams(presence_penalty=1.0))
        assert batch.output_counts.tolist() == [[0, 2, 0, 0, 1, 0, 0, 0, 0, 0]] * 2

    @pytest.mark.parametrize(("top_k", "kept"), [(-1, 0), (0, 0), (9, 9), (10, 0), (MAX_TOKENS, 0)])
    def test_top_k_beyond_the_vocabulary_keeps_all(self, top_k: int, kept: int) -> None:
        """A sampler that looked for the 1000th of 10 logits would fail the whole batch."""
        assert self.build(SamplingParams(top_k=top_k)).top_k.tolist() == [[kept]]

    def test_a_tiny_top_p_is_not_0_in_float32(self) -> None:
        """It means the most likely token; at 0 not even that one would stay."""
        assert self.build(SamplingParams(top_p=5e-324)).top_p.item() > 0
