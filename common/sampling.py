"""What a request may ask of the sampler, and the noise it is sampled with.

`SamplingParams` is validated once, at the boundary, and never changes. The noise is a pure function
of (seed, position, choice, token id), so a seeded result is the same alone or in a batch, in this part or
in any other, today or after a restart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

MAX_TOKENS = 1 << 24  # far above any context; keeps sums of counts within an int64
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_N = 128

# (field, smallest, largest); seed, max_tokens and logprobs may also be None.
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
    ("logprobs", 0, MAX_LOGPROBS),
)
SMALLEST_TOP_P = torch.finfo(torch.float32).tiny  # below it float32 may have 0: no token would stay


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Field names and defaults are vLLM's, and where it has them OpenAI's.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
    top_k: keep the top_k most likely tokens; 0 or -1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one.
    seed: 64 bits; None draws them at admission.
    max_tokens: number of tokens to generate at most; None means up to the model's context.
    stop: strings that end the text and are cut from it.
    stop_token_ids: tokens that end the output.
    ignore_eos: go on past the model's end-of-sequence token.
    n: completions for each prompt.
    logprobs: report this many most likely tokens at each position, and the sampled one.
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

    def __post_init__(self) -> None:
        # Numbers of other libraries become Python's own, so that no later arithmetic wraps.
        checked: dict[str, Any] = {}
        for name, low, high in NUMBERS:
            checked[name] = check_number(name, getattr(self, name), low, high)
        if self.top_p == 0:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        for name, low, high in INTEGERS:
            if getattr(self, name) is not None or name in ("top_k", "n"):
                checked[name] = check_integer(name, getattr(self, name), low, high)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, not {shown(self.ignore_eos)}")
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

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


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

    @classmethod
    def build(
        cls,
        logits: torch.Tensor,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        num_prompt_tokens: Sequence[int],
        outputs: Sequence[Sequence[int]],
    ) -> "SamplingBatch":
        """One entry a row of logits, [batch, vocab], in each argument.

        outputs: the tokens a row has generated so far. They are counted only when some row has
        penalties.
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
        return cls(
            temperature=column([p.temperature for p in params]),
            # A top_k of the whole vocabulary keeps all too, and is spared the sort.
            top_k=column([p.top_k if 0 < p.top_k < vocab else 0 for p in params], torch.int64),
            top_p=column([max(p.top_p, SMALLEST_TOP_P) for p in params]),
            min_p=column([p.min_p for p in params]),
            presence_penalty=column([p.presence_penalty for p in params]),
            frequency_penalty=column([p.frequency_penalty for p in params]),
            seeds=column([as_int64(seed) for seed in seeds], torch.int64),
            positions=column(lengths, torch.int64),
            output_counts=counts,
            num_logprobs=[p.logprobs for p in params],
        )
