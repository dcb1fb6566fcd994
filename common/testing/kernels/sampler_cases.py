"""The sampler's cases: token for token what the reference draws.

Sums are rounded in another order, so a token at the very edge of a filter, or one of two noisy
logits that are all but equal, may be drawn instead; such a row is judged by `is_close_call`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from common.kernels.reference import GREEDY_BELOW, smallest_kept
from common.sampling import NO_TOKEN, gumbel_noise
from common.testing.kernels.case import REFERENCE, Case, Target

NUM_ROWS = 18
TEMPERATURES = (1.0, 0.0, 0.7, 2.0, 100.0, 0.05, 1e-6)
TOP_KS = (0, 1, 5, 50, 300, 2**24, 0, 2)
TOP_PS = (1.0, 0.9, 0.5, 1e-30, 0.999, 0.1, 1.0)
MIN_PS = (0.0, 0.0, 0.1, 1.0, 0.0)
CLOSE = 1e-4  # of noisy logits, and of what is summed for top-p


def sampler_cases() -> Iterator[Case]:
    for vocab, spread in ((1, 1.0), (5, 3.0), (300, 0.01), (1000, 100.0), (5003, 3.0)):
        yield Case("sample", f"{vocab} tokens, spread {spread}", spread_case(vocab, spread), 0)
    yield Case("sample", "ties", lambda t: wrong_rows(t, tied()), 0)
    yield Case("sample", "impossible tokens", lambda t: wrong_rows(t, impossible()), 0)
    yield Case("sample", "edges of filters", lambda t: wrong_rows(t, drawn(8) * 0.3, edges()), 0)
    for name, logits in hard_logits().items():
        yield Case("sample", name, lambda t, x=logits: wrong_rows(t, x, hard_columns()), 0)
    yield Case("sample", "half precision", half_error, 0)
    yield Case("sample", "choices", lambda t: wrong_rows(t, drawn(200), with_choices()), 0)
    yield Case("sample", "filters alone", wrong_filters, 0)
    yield Case("sample", "views and other formats", views_error, 0)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45):
        yield Case("sample", f"odd logits, {value}", lambda t, v=value: odd_rows(t, v), 0)
    yield Case("sample", "frequencies", excess, 1)


def spread_case(vocab: int, spread: float):
    return lambda t: wrong_rows(t, drawn(vocab) * spread)


def drawn(vocab: int, num_rows: int = NUM_ROWS) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab))


def tied() -> Tensor:
    logits = (drawn(300) * 2).round()
    logits[::3] = -logits[::3].abs()  # has minus zeros
    return logits


def impossible() -> Tensor:
    logits = drawn(300) * 3
    logits[drawn(300).roll(7, 1) > 0] = -torch.inf
    logits[:, 150] = 1.0
    return logits


def columns(num_rows: int, vocab: int) -> list[Tensor]:
    """Temperature, top-k, top-p, min-p, seeds, positions: many mixes of filters."""
    i = torch.arange(num_rows) + vocab

    def pick(values: tuple[float, ...], step: int) -> Tensor:
        return torch.tensor(values)[i // step % len(values)]

    floats = pick(TEMPERATURES, 1), pick(TOP_PS, 3), pick(MIN_PS, 2)
    seeds = i * -7046029254386353131  # wraps: all 64 bits are used
    return [floats[0], pick(TOP_KS, 5), floats[1], floats[2], seeds, i * 37 % 5000]


def with_choices() -> list[Tensor]:
    return [*columns(NUM_ROWS, 200), torch.arange(NUM_ROWS) % 3]


def edges() -> list[Tensor]:
    """For eight tokens that are nearly as likely: one more kept, or one less, is soon drawn."""
    i = torch.arange(NUM_ROWS)
    has_top_k = i % 2 == 0
    top_k = torch.where(has_top_k, 2 + i // 2 % 5, 0)
    top_p = torch.where(has_top_k, 1.0, 0.2 + 0.6 * i / NUM_ROWS)
    return [torch.ones(NUM_ROWS), top_k, top_p, torch.zeros(NUM_ROWS), i * 12345, i]


def hard_logits() -> dict[str, Tensor]:
    """Where a search among the most likely tokens is no use, or bounds are far apart; four rows."""
    flat, far, few, huge = (drawn(vocab, 4) for vocab in (8300, 700, 701, 702))
    far[:, 5] = 500
    few[:, 3:690] = -torch.inf
    huge[:, ::3] *= 1e37
    ties = flat[:, :600].mul(2).round().clamp(max=2)
    return {
        "flat, more tokens than are gathered": flat * 0.1,
        "all equal": torch.full((4, 8300), 0.25),
        "far below the top": far,
        "few possible tokens": few,
        "logits of any size": huge,
        "ties at the k-th": ties,
    }


def hard_columns() -> list[Tensor]:
    top_k, top_p = torch.tensor([0, 600, 40, 2]), torch.tensor([0.9, 1.0, 0.4, 0.7])
    i = torch.arange(4)
    return [torch.tensor([1.0, 0.8, 1.0, 30.0]), top_k, top_p, torch.zeros(4), i * 977, i]


def half_error(t: Target) -> float:
    """Rows whose token is another than the one of the same logits in float32."""
    logits, own = drawn(500, 5) * 3, [x.to(t.device) for x in columns(5, 500)]
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16):
        x = logits.to(t.device, dtype)
        wrong += int((t.ops.sample(x, *own) != t.ops.sample(x.float(), *own)).sum())
    return wrong


def wrong_rows(t: Target, logits: Tensor, own: list[Tensor] | None = None) -> float:
    """own: the other arguments; a mix of filters unless given."""
    own = columns(*logits.shape) if own is None else own
    logits, own = some_rows(t, logits, own)
    expected = REFERENCE.sample(logits, *own).tolist()
    actual = t.ops.sample(logits.to(t.device), *(x.to(t.device) for x in own))
    if actual.shape != (len(logits),) or actual.dtype != torch.int64:
        return math.inf
    pairs = enumerate(zip(actual.tolist(), expected, strict=True))
    return sum(a != e and not is_close_call(logits, own, row, a) for row, (a, e) in pairs)


def some_rows(t: Target, logits: Tensor, own: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """For a slow target half of the rows, even ones and odd ones, when there are many."""
    if not t.is_slow or len(logits) < NUM_ROWS:
        return logits, own
    kept = torch.arange(len(logits)) % 4 % 3 == 0
    return logits[kept], [x[kept] for x in own]


def is_close_call(logits: Tensor, own: list[Tensor], row: int, token: int) -> bool:
    """Whether rounding alone may have led to this token."""
    if not 0 <= token < logits.shape[1] or own[0][row] < GREEDY_BELOW:
        return False
    temperature, top_k, top_p, min_p, *noise = (x[row : row + 1] for x in own)
    scaled = logits[row : row + 1].float() / temperature

    def threshold(change: float) -> Tensor:
        allowed = top_p if top_p >= 1 else (top_p + change).clamp(1e-37, 1)
        return smallest_kept(scaled, top_k, allowed, min_p * (1 - change)) - change * 0.01

    tokens = torch.arange(logits.shape[1])
    choices = noise[2] if len(noise) > 2 else 0
    noisy = scaled[0].double() + gumbel_noise(noise[0], noise[1], tokens, choices)
    surely_kept = scaled[0] >= threshold(-CLOSE)
    best = noisy[surely_kept].max()
    is_kept = bool(scaled[0, token] >= threshold(CLOSE)[0])
    return is_kept and bool(noisy[token] >= best - CLOSE * max(1.0, best.abs().item() * 1e-2))


def wrong_filters(t: Target) -> float:
    """Rows of which `smallest_kept` keeps other tokens than the reference, by more than rounding."""
    wrong = 0
    for vocab, spread in ((1, 1.0), (5, 3.0), (300, 3.0), (5003, 3.0)):
        logits, own = some_rows(t, drawn(vocab) * spread, columns(NUM_ROWS, vocab)[1:4])
        smallest = t.ops.smallest_kept(logits.to(t.device), *(x.to(t.device) for x in own)).cpu()
        kept, (top_k, top_p, min_p) = logits >= smallest.unsqueeze(1), own
        for change in (-CLOSE, CLOSE):  # fewer tokens than must stay, more than may
            allowed = torch.where(top_p < 1, (top_p + change).clamp(1e-37, 1), top_p)
            bound = REFERENCE.smallest_kept(logits, top_k, allowed, min_p * (1 - change))
            expected = logits >= (bound - change * 0.01).unsqueeze(1)
            differ = expected & ~kept if change < 0 else kept & ~expected
            wrong += int(differ.any(dim=1).sum())
    return wrong


def views_error(t: Target) -> float:
    logits = drawn(64, 6).bfloat16().to(t.device)
    ones = torch.ones(6, dtype=torch.float64, device=t.device)
    zeros = torch.zeros(6, dtype=torch.int32, device=t.device)
    own = (ones, zeros, ones, ones * 0, torch.arange(12, device=t.device)[::2], zeros)
    expected = REFERENCE.sample(logits.float().cpu(), *(x.cpu() for x in own))
    wider = torch.cat([logits, logits], dim=1)[:, :64]
    found = [t.ops.sample(x, *own).cpu() for x in (logits, wider, wider.T.contiguous().T)]
    return sum(int((x != expected).sum()) for x in found)


def odd_rows(t: Target, value: float) -> float:
    """Rows with values at the ends of the format, or beyond: no token where one is NaN or +inf, or
    where all are -inf; else one that is possible."""
    wrong = 0
    for places in (slice(None), slice(0, 40, 2), slice(7, 8)):
        logits = drawn(40, 7)
        logits[:, places] = value
        own = [x.to(t.device) for x in columns(7, 40)]
        tokens = t.ops.sample(logits.to(t.device), *own).tolist()
        possible = set(range(40))
        if math.isnan(value) or value == torch.inf or (logits == -torch.inf).all():
            possible = {NO_TOKEN}
        elif value == -torch.inf:
            possible -= set(range(40)[places])
        wrong += sum(token not in possible for token in tokens)
    return wrong


def excess(t: Target) -> float:
    """Chi-square of many rows' tokens against the softmax, over a bound that chance exceeds less
    than once in a million times."""
    num_rows, vocab = (20_000 if t.device.type == "cuda" else 60 if t.is_slow else 120), 6
    logits = torch.linspace(0, 1.5, vocab, device=t.device).repeat(num_rows, 1)
    ones, numbers = torch.ones(num_rows, device=t.device), torch.arange(num_rows, device=t.device)
    tokens = t.ops.sample(logits, ones, numbers * 0, ones, ones * 0, numbers * 977, numbers % 100)
    found = torch.bincount(tokens.cpu(), minlength=vocab).double()
    expected = logits[0].cpu().double().softmax(0) * num_rows
    return ((found - expected).square() / expected).sum().item() / 36
