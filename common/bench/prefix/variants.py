"""The engines that `prefix` compares, and their turns: a fresh process each, alternating order."""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import progress
from common.bench.core.processes import child_environment, part_package, run_json
from common.bench.core.rounds import Entrant
from common.bench.ladder import existing_parts

KINDS = ("off", "hash", "radix")


@dataclass
class Variant(Entrant):
    """A part, with one kind of prefix cache where it has any. rates: output tokens a second.

    runs: what `worker.prefix_job` gave, by workload and round.
    """

    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)


def part_kind(text: str) -> tuple[int, str | None]:
    """PART or PART:KIND, KIND a value of the part's prefix_cache."""
    match = re.fullmatch(r"(\d+)(?::(\w+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be PART or PART:KIND, not {text!r}")
    return int(match[1]), match[2]


def checked_block_size(value: Any) -> int:
    """What --set gave. Raises ValueError."""
    if type(value) is not int or value < 1:
        raise ValueError(f"--set block_size: must be a positive integer, not {value!r}")
    return value


def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
    """Run one job of `common.bench.prefix.worker` in a fresh process."""
    command = [sys.executable, "-m", "common.bench.prefix.worker"]
    return run_json(command, job, child_environment(), job["job"], verbose=verbose)


def default_variants() -> list[tuple[int, str | None]]:
    """The first part that has prefix caches, with each kind of them, after the part before it."""
    parts = existing_parts()
    first = next((part for part in parts if "prefix_cache" in known_settings(part)), None)
    if first is None:
        raise ValueError("--variants: no part here has a prefix_cache, so name the parts")
    before = [(part, None) for part in parts if part == first - 1]
    return [*before, *((first, kind) for kind in KINDS)]


def known_settings(part: int) -> set[str]:
    return {entry.name for entry in fields(config_class(part))}


def config_class(part: int) -> Any:
    return importlib.import_module(f"{part_package(part)}.config").EngineConfig


def make_variant(
    part: int, kind: str | None, model: str, settings: dict[str, Any], rounds: int, verbose: bool
) -> Variant:
    """Raises ValueError for what the part's EngineConfig does not take."""
    name = f"part {part:02d}"
    if kind is not None:
        if "prefix_cache" not in known_settings(part):
            raise ValueError(f"--variants {part}:{kind}: part {part:02d} has no prefix_cache")
        name, settings = f"{name}, {kind}", {**settings, "prefix_cache": kind}
    try:
        config_class(part)(model=model, **settings)
    except TypeError as error:
        raise ValueError(str(error).replace("EngineConfig.__init__() ", "")) from None
    job = {"job": "prefix", "part": part, "model": model, "settings": settings}
    return Variant(name, lambda work: run_job({**job, **work[0]}, verbose), rounds)


def measure_variants(variants: list[Variant], work: dict[str, Any], rounds: int) -> None:
    """Give all the same work, round by round. A variant that fails is told and takes no further part.

    work: `vocab_size` and `workloads` of the worker's job. Ctrl-C ends it early, with what there is
    by then, once each variant has been measured.
    """
    turns = [
        (number, variant)
        for number in range(rounds)
        for variant in variants[:: -1 if number % 2 else 1]
    ]
    try:
        for number, variant in progress(turns, "measurements"):
            if variant.failure is None:
                take_turn(variant, work, number)
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
        outputs = [record["token_ids"] for record in run["records"].values()]
        variant.runs.setdefault(name, {})[number] = run
        variant.rates.setdefault(name, {})[number] = sum(map(len, outputs)) / run["seconds"]
    if answer["wall_other_cores"] is not None:
        variant.other_cores.append(answer["wall_other_cores"])
