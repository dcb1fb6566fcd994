"""The engines that `speculative` compares, and their turns: a fresh process each, alternating order."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import progress
from common.bench.core.processes import child_environment, run_json
from common.bench.core.rounds import Entrant
from common.bench.prefix.variants import config_class, known_settings

FOR_PROPOSERS = ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "draft_layers")


@dataclass(frozen=True)
class Choice:
    """What --variants names: a part, who drafts there, and the model that does."""

    part: int
    proposer: str | None = None
    draft_model: str | None = None

    @property
    def name(self) -> str:
        return f"part {self.part:02d}" + "".join(
            f", {text}" for text in (self.proposer, self.draft_model) if text
        )


@dataclass
class Variant(Entrant):
    """A part, with or without somebody who drafts. rates: tokens a second of decoding.

    runs: what `worker.decode` gave, by point and round.
    """

    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)


def choice(text: str) -> Choice:
    """PART, PART:PROPOSER or PART:draft=MODEL."""
    match = re.fullmatch(r"(\d+)(?::(?:(draft)=(.+)|(\w+)))?", text)
    if not match or match[4] == "draft":
        raise argparse.ArgumentTypeError(
            f"must be PART, PART:PROPOSER or PART:draft=MODEL, not {text!r}"
        )
    return Choice(int(match[1]), match[2] or match[4], match[3])


def make_variant(
    chosen: Choice, model: str, settings: dict[str, Any], rounds: int, verbose: bool
) -> Variant:
    """Settings of speculation are for variants that speculate. Raises ValueError for what the part's
    EngineConfig does not take."""
    if chosen.proposer is None:
        settings = {key: value for key, value in settings.items() if key not in FOR_PROPOSERS}
    elif "speculative" not in known_settings(chosen.part):
        raise ValueError(
            f"--variants {chosen.part}:{chosen.proposer}: this part does not speculate"
        )
    else:
        settings = {**settings, "speculative": chosen.proposer}
    if chosen.draft_model is not None:
        settings = {**settings, "draft_model": chosen.draft_model}
    try:
        config_class(chosen.part)(model=model, **settings)
    except TypeError as error:
        raise ValueError(str(error).replace("EngineConfig.__init__() ", "")) from None
    job = {"job": "speculative", "part": chosen.part, "model": model, "settings": settings}
    return Variant(chosen.name, lambda work: run_job({**job, **work[0]}, verbose), rounds)


def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
    """Run one job of `common.bench.speculative.worker` in a fresh process."""
    command = [sys.executable, "-m", "common.bench.speculative.worker"]
    return run_json(command, job, child_environment(), job["job"], verbose=verbose)


def measure_variants(
    variants: list[Variant], work: Callable[[int], dict[str, Any]], rounds: int
) -> None:
    """Give all the same work, and other work in every round. A variant that fails is told and takes
    no further part.

    work: of a round, what the worker's job has of it. Ctrl-C ends it early, with what there is by
    then, once each variant has been measured.
    """
    turns = [
        (number, variant)
        for number in range(rounds)
        for variant in variants[:: -1 if number % 2 else 1]
    ]
    try:
        for number, variant in progress(turns, "measurements"):
            if variant.failure is None:
                take_turn(variant, work(number), number)
    except KeyboardInterrupt:
        if not all(variant.rates or variant.failure for variant in variants):
            raise
        print("stopped early: the result is of the rounds until here", file=sys.stderr)


def take_turn(variant: Variant, work: dict[str, Any], number: int) -> None:
    try:
        answer = variant.run([work])
    except BenchError as error:
        variant.failure = str(error)
        print(f"{variant.name}: {error}", file=sys.stderr)
        return
    variant.facts = {key: value for key, value in answer.items() if key != "runs"}
    for name, run in answer["runs"].items():
        variant.runs.setdefault(name, {})[number] = run
        variant.rates.setdefault(name, {})[number] = run["num_tokens"] / run["seconds"]
    if answer["wall_other_cores"] is not None:
        variant.other_cores.append(answer["wall_other_cores"])
