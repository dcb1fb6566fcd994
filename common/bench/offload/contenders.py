"""What `offload` compares, in turns: a fresh process for each measurement, in alternating order."""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    positive,
    progress,
    settings_of,
)
from common.bench.core.noise import disturbance
from common.bench.core.pairs import paired_ratio
from common.bench.core.processes import child_environment, run_json, run_worker
from common.bench.core.rates import same_tokens
from common.bench.core.report import plural
from common.bench.ladder import known_vocab_size
from common.bench.prefix.requests import Request

PART, BLOCK_SIZE = 12, 16
HOST_BYTES = 2 << 30  # unless a measurement says otherwise: all fits

Answer = dict[str, Any]  # what `worker.offload_job` gave


@dataclass
class Contender:
    """One way to run the work. answers: by round; of a round in which it failed there is none."""

    name: str
    run: Callable[[int], Answer]
    answers: dict[int, Answer] = field(default_factory=dict)
    failure: str | None = None

    def each(self, value: Callable[[Answer], float | None]) -> dict[int, float]:
        """A value of each round that has it."""
        found = {number: value(answer) for number, answer in self.answers.items()}
        return {number: one for number, one in found.items() if one is not None}

    def median(self, value: Callable[[Answer], float | None]) -> float | None:
        found = self.each(value)
        return statistics.median(found.values()) if found else None

    def count(self, name: str) -> float | None:
        """A counter, the median of the rounds; None where the engine has no such counter."""
        return self.median(lambda answer: answer["counters"].get(name))


def add_common_arguments(parser: argparse.ArgumentParser, pairs: int = 3) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=pairs, help=f"rounds (default: {pairs})")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_output_arguments(parser)


def engine_job(
    args: argparse.Namespace, part: int, requests: list[Request], **settings: Any
) -> Answer:
    """Run requests on an engine in a fresh process. Raises BenchError."""
    own = {"block_size": BLOCK_SIZE, **settings_of(args), **settings}
    job = {"job": "offload", "part": part, "model": args.model, "settings": own}
    job |= {
        "vocab_size": known_vocab_size(args.model),
        "requests": [vars(request) for request in requests],
    }
    command = [sys.executable, "-m", "common.bench.offload.worker"]
    return run_json(command, job, child_environment(), "offload", verbose=args.verbose)


def take_turns(contenders: list[Contender], rounds: int) -> None:
    """Measure all, round by round. One that fails is told and takes no further part."""
    turns = [
        (number, one) for number in range(rounds) for one in contenders[:: -1 if number % 2 else 1]
    ]
    for number, one in progress(turns, "measurements"):
        if one.failure is None:
            try:
                one.answers[number] = one.run(number)
            except BenchError as error:
                one.failure = str(error)
                print(f"{one.name}: {error}", file=sys.stderr)


def times_less(
    one: Contender, first: Contender, value: Callable[[Answer], float | None]
) -> float | None:
    """How many times less it is than the first one's, the median of the rounds' ratios."""
    return None if one is first else paired_ratio(first.each(value), one.each(value)).median


def same_as(one: Contender, first: Contender) -> float | None:
    """Percent of tokens that are those of the first one, over the rounds that both have."""
    rounds = one.answers.keys() & first.answers.keys()
    if one is first or not rounds:
        return None
    return min(
        same_tokens(outputs(one.answers[n]), outputs(first.answers[n], one.answers[n]))
        for n in rounds
    )


def outputs(answer: Answer, order: Answer | None = None) -> list[list[int]]:
    """Each request's tokens, in the order of another answer's requests."""
    return [answer["records"][name]["token_ids"] for name in (order or answer)["records"]]


def rate(answer: Answer, way: str) -> float | None:
    """Copied bytes a second, "save" to the host or "load" from there, in GB/s; None where nothing was."""
    counters = answer["counters"]
    seconds = counters.get(f"offload_seconds_{way}")
    return counters[f"offload_bytes_{way}"] / seconds / 1e9 if seconds else None


def limits_of(args: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    devices = [a["device"] for one in contenders for a in one.answers.values()] or ["cpu"]
    device = devices[0].partition(":")[0]
    return run_worker({"job": "limits", "device": device, "quick": args.quick_limits})


def remarks(contenders: list[Contender]) -> Iterator[str]:
    """What failed, and what disturbed."""
    for one in contenders:
        if one.failure:
            yield f"{one.name} failed after {plural(len(one.answers), 'round')}: {one.failure}"
    cores = [a["wall_other_cores"] for one in contenders for a in one.answers.values()]
    known = [value for value in cores if value is not None]
    if known and (remark := disturbance(statistics.median(known))):
        yield f"Disturbed: {remark}."


def block_bytes(model: str, block_size: int = BLOCK_SIZE, number_bytes: int = 4) -> int:
    """Of one block's keys and values in all layers, in float32 unless told otherwise."""
    from common.bench.costs import ModelShape
    from common.models.checkpoint import read_json, resolve

    shape = ModelShape.from_config(read_json(resolve(model) / "config.json"))
    return shape.num_layers * 2 * block_size * shape.num_kv_heads * shape.head_dim * number_bytes
