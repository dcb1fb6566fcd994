"""What a request may ask of the sampler, and the noise it is sampled with.

`SamplingParams` is validated once, at the boundary, and never changes. The noise is a pure function
of (seed, position, choice, token id), so a seeded result is the same alone or in a batch, in this part or
in any other, today or after a restart.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from common.device import to_device

MAX_TOKENS = 1 << 24  # far above any context; keeps sums of counts within an int64
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # tokens of one request
MAX_N = 128
NO_TOKEN = -1  # drawn where the logits are not finite: the request ends with an error

# (field, smallest, largest); fields whose default is None may also be that.
NUMBERS = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
INTEGERS = (
    ("top_k", -1, MAX_TOKENS),
    ("n", 1, MAX_N),
    ("seed", -(2**63), 2**64 - 1),
    ("max_tokens", 1, MAX_TOKENS),
    ("min_tokens", 0, MAX_TOKENS),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
BOOLEANS = ("ignore_eos", "include_stop_str_in_output")
SMALLEST_TOP_P = torch.finfo(torch.float32).tiny  # below it float32 may have 0: no token would stay


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Field names and defaults are vLLM's, and where it has them OpenAI's.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
    top_k: keep the top_k most likely tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one.
    seed: 64 bits; None, or -1, draws them at admission.
    max_tokens: number of tokens to generate at most; None means up to the model's context.
    min_tokens: number of tokens before which nothing but max_tokens ends the output: tokens that
        would are not drawn, and stop strings are not looked for.
    stop: strings that end the text and are cut from it.
    stop_token_ids: tokens that end the output.
    include_stop_str_in_output: leave the stop string, or the text of the stop token, in the text.
    ignore_eos: go on past the model's end-of-sequence token.
    n: completions for each prompt.
    logprobs: report this many most likely tokens at each position, and the sampled one.
    prompt_logprobs: the same for the tokens of the prompt, all but the first.
    logit_bias: added to the logits of these tokens, -100 to 100, at every position.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens already generated,
        once, and once per occurrence.

    Raises ValueError naming the field and the value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        # Numbers of other libraries become Python's own, so that no later arithmetic wraps.
        checked: dict[str, Any] = {}
        for name, low, high in NUMBERS:
            checked[name] = check_number(name, getattr(self, name), low, high)
        if self.top_p == 0:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        for name, low, high in INTEGERS:
            if getattr(self, name) is not None or name in ("top_k", "n", "min_tokens"):
                checked[name] = check_integer(name, getattr(self, name), low, high)
        if checked.get("seed") == -1:
            checked["seed"] = None
        if self.max_tokens is not None and checked["min_tokens"] > checked["max_tokens"]:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}"
            )
        for name in BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                value = shown(getattr(self, name))
                raise ValueError(f"{name} must be true or false, not {value}")
        checked["logit_bias"] = self._checked_logit_bias()
        checked["stop"] = self._checked_stop()
        checked["stop_token_ids"] = self._checked_stop_token_ids()
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _checked_stop(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = () if stop is None else stop
        if not isinstance(stop, list | tuple):
            raise ValueError(f"stop must be a string or a list of strings, not {shown(stop)}")
        if len(stop) > MAX_STOPS:
            raise ValueError(f"stop must hold at most {MAX_STOPS} strings, not {len(stop)}")
        for string in stop:
            if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_LENGTH:
                raise ValueError(
                    f"stop must be strings of 1 to {MAX_STOP_LENGTH} characters,"
                    f" not {shown(string)}"
                )
        return tuple(stop)

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(token_ids, list | tuple):
            raise ValueError(f"stop_token_ids must be a list of ids, not {shown(token_ids)}")
        if len(token_ids) > MAX_STOPS:
            raise ValueError(
                f"stop_token_ids must hold at most {MAX_STOPS} ids, not {len(token_ids)}"
            )
        return tuple(check_integer("stop_token_ids", id, 0, MAX_TOKENS) for id in token_ids)

    def _checked_logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias must be a map of token ids to numbers, not {shown(self.logit_bias)}"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias must hold at most {MAX_LOGIT_BIAS} tokens, not {len(self.logit_bias)}"
            )
        biases = {
            check_integer("logit_bias", id, 0, MAX_TOKENS): check_number(
                "logit_bias", value, -100.0, 100.0
            )
            for id, value in self.logit_bias.items()
        }
        return biases or None

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_biases(self) -> bool:
        """Whether `biases` may give any."""
        return self.logit_bias is not None or self.min_tokens > 0

    def for_choice(self, choice: int) -> "SamplingParams":
        """The parameters of one of the n completions. The prompt is scored for the first alone."""
        return replace(self, n=1, prompt_logprobs=None if choice else self.prompt_logprobs)

    def ending_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Every token that ends the output.

        eos_token_ids: the model's.
        """
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else eos_token_ids)

    def numbers(self, vocab_size: int) -> dict[str, float]:
        """What the logits of each token are treated with, as operations take it."""
        return {
            # A top_k of the whole vocabulary keeps all too, and is spared the sort.
            "top_k": self.top_k if 0 < self.top_k < vocab_size else 0,
            "temperature": self.temperature,
            "top_p": max(self.top_p, SMALLEST_TOP_P),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }

    @cached_property
    def logit_bias_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and what is added to their logits: made once, read in every step."""
        biases = self.logit_bias or {}
        return np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)

    def biases(
        self, ending_token_ids: Collection[int], num_output_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and what is added to their logits after so many output tokens.

        Minus infinity for `ending_token_ids` while there are fewer than min_tokens. An id may be
        there twice; then both are added.
        """
        ids, values = self.logit_bias_arrays
        if num_output_tokens < self.min_tokens:
            ids = np.append(ids, np.array(list(ending_token_ids), np.int64))
            never = np.full(len(ending_token_ids), -math.inf, np.float32)
            values = np.append(values, never)
        return ids, values


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """The value as a float. Raises ValueError naming the field and the value."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Not math.isfinite, which overflows for an integer beyond every float.
    if not is_number or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"{name} must be a finite number, not {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {shown(value)}")
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """The value as Python's int. Raises ValueError naming the field and the value."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, not {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {shown(value)}")
    return int(value)


def shown(value: Any) -> str:
    """A value as an error message shows it: cut when long; huge integers have no repr at all."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def as_int64(seed: int) -> int:
    """The same 64 bits as a signed integer, which is what a torch.int64 tensor holds."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed


# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds
# of multiply and exclusive-or turn a counter into four random words. No state: any word of any
# stream can be had at once, in any order, on any device.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, ...]) -> tuple:
    """Philox4x32-10. Words are int64 tensors holding 32 bits each and broadcast together.

    key: (low, high); counter: (c0, c1, c2, c3). Returns the four output words.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # A signed 64-bit product wraps modulo 2^64, so its two halves are still the true ones.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    choices: torch.Tensor | int = 0,
    stream: int = 0,
) -> torch.Tensor:
    """Numbers in (0, 1), never 0 and never 1, float64; the arguments are int64 and broadcast.

    The counter is (token id, position, choice index, stream); u = (x + 0.5) / 2^24 from the top 24
    bits x of the first output word. Position is the number of tokens before the one drawn.
    """
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    zeros = torch.zeros_like(positions)
    word = philox(key, (token_ids, positions, zeros + choices, zeros + stream))[0]
    return ((word >> 8).double() + 0.5) / (1 << 24)


def gumbel_noise(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    choices: torch.Tensor | int = 0,
    stream: int = 0,
) -> torch.Tensor:
    """Gumbel noise, float64: argmax(logits + noise) is a draw from softmax(logits).

    Arguments as for `uniforms`. float64, because u = 1 - 2^-25 would round to 1 in float32, and
    -log(-log(1)) is infinite.
    """
    return -torch.log(-torch.log(uniforms(seeds, positions, token_ids, choices, stream)))


@dataclass(frozen=True)
class LogitBiases:
    """What is added to single logits of a batch; each [num_entries], on the logits' device."""

    rows: torch.Tensor  # int64
    token_ids: torch.Tensor  # int64
    values: torch.Tensor  # float32

    @classmethod
    def build(
        cls, biases: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device
    ) -> "LogitBiases | None":
        """From `SamplingParams.biases` of each row; None where no row has any."""
        counts = [len(ids) for ids, _ in biases]
        if not any(counts):
            return None
        token_ids, values = (np.concatenate(column) for column in zip(*biases, strict=True))
        return cls(
            to_device(np.repeat(np.arange(len(counts)), counts), torch.int64, device),
            to_device(token_ids, torch.int64, device),
            to_device(values, torch.float32, device),
        )

    @classmethod
    def of_sequences(
        cls, sequences: Iterable[Any], positions: Iterable[int], device: torch.device
    ) -> "LogitBiases | None":
        """Of the rows in which tokens of sequences are drawn; positions: the tokens before each.

        sequences: anything with `params`, `prompt_token_ids` and `ending_token_ids`.
        """
        rows = [
            sequence.params.biases(
                sequence.ending_token_ids, position - len(sequence.prompt_token_ids)
            )
            for sequence, position in zip(sequences, positions, strict=True)
        ]
        return cls.build(rows, device)

    def add_to(self, logits: torch.Tensor) -> torch.Tensor:
        """The sum as float32, [batch, vocab]; `logits` stay as they are."""
        sums = torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
        sums.copy_(logits)
        sums.view(-1).index_add_(0, self.rows * logits.shape[1] + self.token_ids, self.values)
        return sums


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens may be drawn in some rows of a batch, on the logits' device."""

    rows: torch.Tensor  # [num_masked] int64
    bits: (
        torch.Tensor
    )  # [num_masked, ceil(vocab / 32)] int32: bit i % 32 of word i // 32 for token i

    def apply_to(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, [batch, vocab], with -infinity where a token may not be drawn; `logits` stay as
        they are."""
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        may = (self.bits.unsqueeze(2) >> shifts).bitwise_and_(1).flatten(1)[:, : logits.shape[1]]
        masked = logits[self.rows].masked_fill_(may == 0, -math.inf)
        return logits.index_copy(0, self.rows, masked)


def not_drawn(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`token_ids`, [batch], with NO_TOKEN in the rows of logits, [batch, vocab], that have NaN or
    +infinity, or only -infinity: what was drawn there means nothing."""
    return token_ids.where(logits.amax(dim=-1).isfinite(), NO_TOKEN)  # amax hands NaN on


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of a batch as columns, [batch, 1] each, on the logits' device."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # int64; 0 keeps all
    top_p: torch.Tensor
    min_p: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    seeds: torch.Tensor  # int64, the 64 bits of each seed
    positions: torch.Tensor  # int64: the number of tokens before the one to draw
    output_counts: torch.Tensor | None  # [batch, vocab]: how often each token was generated
    num_logprobs: list[int | None]  # a plain list: it decides what is computed
    choices: torch.Tensor | None = None  # int64: which of n completions a row is; None: all 0
    biases: LogitBiases | None = None
    masks: TokenMasks | None = None

    def columns(self) -> dict[str, torch.Tensor]:
        """What `ops.sample` takes beside the logits, [batch] each."""
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "choices")
        columns = {name: getattr(self, name) for name in names}
        return {name: x.squeeze(1) for name, x in columns.items() if x is not None}

    def filters(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What turns logits into the distribution that is drawn from, of some rows: [rows] each."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name)[rows, 0] for name in names}

    def biased(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, [batch, vocab], with what is added to single ones of them; -infinity where a token
        may not be drawn."""
        logits = logits if self.biases is None else self.biases.add_to(logits)
        return logits if self.masks is None else self.masks.apply_to(logits)

    @classmethod
    def build(
        cls,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        num_prompt_tokens: Sequence[int],
        outputs: Sequence[Sequence[int]],
        ending_token_ids: Sequence[Collection[int]] | None = None,
        choices: Sequence[int] | None = None,
    ) -> "SamplingBatch":
        """One entry a row of logits, [batch, vocab], in each argument.

        outputs: the tokens a row has generated so far. They are counted only when some row has
        penalties. ending_token_ids: those that end a row's output; none unless given. choices: which
        of n completions each row is; the first unless given.
        """
        device, vocab = logits.device, logits.shape[1]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        counts = None
        if any(p.has_penalties for p in params):
            ids = [torch.tensor(output, dtype=torch.int64) for output in outputs]
            rows = [torch.bincount(row, minlength=vocab) for row in ids]
            counts = torch.stack(rows).to(device)
        lengths = [n + len(output) for n, output in zip(num_prompt_tokens, outputs, strict=True)]
        rows = zip(params, ending_token_ids or [()] * len(params), outputs, strict=True)
        biases = [p.biases(ends, len(output)) for p, ends, output in rows]
        numbers = [p.numbers(vocab) for p in params]
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        return cls(
            **{name: column([row[name] for row in numbers]) for name in names},
            top_k=column([row["top_k"] for row in numbers], torch.int64),
            seeds=column([as_int64(seed) for seed in seeds], torch.int64),
            positions=column(lengths, torch.int64),
            output_counts=counts,
            num_logprobs=[p.logprobs for p in params],
            choices=None if choices is None else column(choices, torch.int64),
            biases=LogitBiases.build(biases, device),
        )
