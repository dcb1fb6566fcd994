"""`host`: what a decode step costs the host, on a device that takes no time at all.

The engine runs as it does otherwise, but for the work that it gives to the device: tokens are there
at once. What is left is the host's: scheduling, the step's input, reading tokens, ending sequences,
outputs. On a GPU a step cannot be shorter than this, however fast the GPU is. Each number of
sequences is a fresh process; times are medians over the steps in which all of them decode, by the
wall clock of one thread, since nothing else runs. Launching kernels is not counted.

With --vary one thing grows while the others stay as they are:

    sequences  in the batch
    waiting    requests behind 64 running sequences
    blocks     in the pool, all of them in the prefix cache before 64 sequences begin: each new block
               evicts one
    context    tokens before 8 sequences decode
"""

import argparse
import importlib
import statistics
from typing import Any

from common.bench.core.arguments import add_output_arguments, finish, positive, progress
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import part_package, run_worker
from common.bench.core.results import column, make_result

MODEL, MODEL_LEN = "random:tiny-llama", 1024  # its arithmetic is left out
LONG_MODEL = "smollm2-135m"  # for contexts up to 8192
# Tokens. Of all lengths between, so that as many sequences need a new block in each step.
SHORTEST, LONGEST = 24, 39
WARM_UP = 32  # steps
RING = (
    16  # steps that the trace keeps, so that each step pays for one that leaves, as in a long run
)
PHASES = ("schedule", "prepare", "launch", "wait", "postprocess")
FIRST_PART = 5  # the first whose device is a queue
SIZES = {
    "sequences": [1, 16, 64, 256, 1024],
    "waiting": [0, 100, 1000, 10_000],
    "blocks": [2000, 10_000, 100_000],
    "context": [128, 512, 2048, 7680],
}
RUNNING = {"waiting": 64, "blocks": 64, "context": 8}  # sequences, where these do not vary
COLUMNS = [
    column("part", "part", digits=0),
    column("num_seqs", "sequences", digits=0),
    column("num_waiting", "waiting", digits=0),
    column("num_blocks", "blocks", digits=0),
    column("context", "context", "tokens", 0),
    *(column(name, name, "µs", 0) for name in PHASES),
    column("rest", "rest", "µs", 0),
    column("step", "whole step", "µs", 0),
    column("p99", "99% of steps within", "µs", 0),
    column("each", "for each sequence", "µs", 2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=positive, nargs="+", required=True, help="from 05 on")
    parser.add_argument(
        "--vary", choices=SIZES, default="sequences", help="what grows (default: sequences)"
    )
    sizes = "; ".join(f"{name}: {' '.join(map(str, some))}" for name, some in SIZES.items())
    parser.add_argument(
        "--sizes", type=int, nargs="+", help=f"of it, in increasing order ({sizes})"
    )
    parser.add_argument("--steps", type=positive, default=200, help="default: 200")
    parser.add_argument("--repeats", type=positive, default=3, help="processes of each (3)")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for part in args.parts:
        part_package(part)
        if part < FIRST_PART:
            raise ValueError(f"part {part:02d} does its device's work itself: --parts from 05 on")
    sizes = args.sizes or SIZES[args.vary]
    least = 0 if args.vary == "waiting" else 1
    if wrong := [size for size in sizes if size < least]:
        raise ValueError(f"--sizes must be {least} or more, not {wrong[0]}")
    kinds = [(part, size) for part in args.parts for size in sizes]
    samples: dict[tuple[int, int], list[dict[str, float]]] = {kind: [] for kind in kinds}
    others = OtherWork()
    for part, size in progress(kinds * args.repeats, "processes"):
        job = {"job": "host", "part": part, "steps": args.steps, **setting(args.vary, size)}
        samples[part, size].append(run_worker(job, verbose=args.verbose)["us"])
    rows = []
    for part, size in kinds:
        found = {
            name: statistics.median(sample[name] for sample in samples[part, size])
            for name in (*PHASES, "rest", "step", "p99")
        }
        count = setting(args.vary, size)["num_seqs"]
        kind = {"part": part, **setting(args.vary, size)}
        rows.append({**kind, **found, "each": found["step"] / count})
    notes = [
        f"Decode steps, greedy; medians of {args.steps} steps; processes of each: {args.repeats}. The"
        " device takes no time. Rest: what is between the phases, the trace among it."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    limits = {"unmeasured": "only the host works here"}
    title = "What a decode step costs the host"
    columns = [c for c in COLUMNS if any(c["key"] in row for row in rows)]
    finish(args, make_result(title, columns, rows, limits=limits, parts=args.parts, notes=notes))
    return 0


def setting(vary: str, size: int) -> dict[str, int]:
    """What a process is asked beside its part and steps."""
    if vary == "sequences":
        return {"num_seqs": size}
    name = {"waiting": "num_waiting", "blocks": "num_blocks", "context": "context"}[vary]
    return {"num_seqs": RUNNING[vary], name: size}


class Done:
    """Work that was done as soon as it was given."""

    def __init__(self, sampled: Any) -> None:
        self.sampled = sampled

    def wait(self) -> None:
        pass

    def result(self) -> Any:
        return self.sampled

    def times(self) -> tuple[float, float]:
        return 0.0, 0.0


class NoDevice:
    """A queue whose device takes no time."""

    def submit(self, run: Any, *_: Any) -> Done:
        return Done(run())

    def close(self) -> None:
        """Nothing is held."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "num_seqs", "steps", and perhaps one of "num_waiting", "num_blocks", "context"} ->
    {"us": median microseconds of each phase, of the rest and of a step, and what 99% of the steps take
    at most}."""
    engine = engine_without_device(**job)
    if "num_blocks" in job:
        fill_cache(engine)
    records = decode_steps(engine, **job)
    found = {"step": [record.end - record.begin for record in records]}
    for name in PHASES:
        found[name] = [record.phase_seconds()[name] for record in records]
    phases = zip(*(found[name] for name in PHASES), strict=True)
    found["rest"] = [step - sum(spans) for step, spans in zip(found["step"], phases, strict=True)]
    us = {name: 1e6 * statistics.median(seconds) for name, seconds in found.items()}
    us["p99"] = 1e6 * sorted(found["step"])[99 * len(records) // 100]
    return {"us": us}


def engine_without_device(
    part: int, num_seqs: int, steps: int, num_blocks: int = 0, context: int = LONGEST, **job: Any
) -> Any:
    """An engine whose device takes no time, and draws the same token again and again. num_blocks: as
    many as are needed, unless given."""
    import torch

    from common.logprobs import SampledLogprobs

    package = part_package(part)
    most = context + output_len(steps)
    needed = num_seqs * (2 + most // 16)
    if 0 < num_blocks < needed:
        raise ValueError(f"num_blocks must be {needed} or more here, not {num_blocks}")
    config = importlib.import_module(f"{package}.config").EngineConfig(
        model=MODEL if most <= MODEL_LEN else LONG_MODEL,
        device="cpu",
        threads=1,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * context,  # all prompts in one step
        num_blocks=num_blocks or needed,
        max_model_len=most,
    )
    engine = importlib.import_module(f"{package}.engine").LLMEngine(config)
    sampled_class = importlib.import_module(f"{package}.sampler").Sampled

    def instead(batch: Any, *_: Any) -> Any:
        token_ids = torch.full((len(batch.rows),), 5)
        return sampled_class(token_ids, SampledLogprobs(batch.sampling.num_logprobs))

    engine.runner.queue, engine.runner.run = NoDevice(), instead
    engine.trace.capacity = RING
    return engine


def fill_cache(engine: Any) -> None:
    """Run prompts that begin differently until each block of the pool has been used."""
    from common.requests import Request
    from common.sampling import SamplingParams

    size = 16 * (engine.max_model_len // 16 - 1)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for number in range(engine.kv.num_blocks * 16 // size + 2):
        prompt = [2 + number % 500, 2 + number // 500, *(2 + i % 500 for i in range(size - 2))]
        engine.add_request(Request(f"before-{number}", prompt, params))
        while engine.has_unfinished():
            engine.step()


def output_len(steps: int) -> int:
    """Tokens of each sequence: none ends before the last step that is measured."""
    return WARM_UP + steps + 8


def decode_steps(
    engine: Any, num_seqs: int, steps: int, num_waiting: int = 0, context: int = 0, **job: Any
) -> list[Any]:
    """The records of so many steps in which all of so many sequences decode. context: their prompts'
    length, unless of all lengths between SHORTEST and LONGEST."""
    from common.requests import Request
    from common.sampling import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len(steps), ignore_eos=True)
    for number in range(num_seqs):
        length = context or SHORTEST + number % (LONGEST - SHORTEST + 1)
        prompt = [2 + (7 * number + i) % 500 for i in range(length)]
        engine.add_request(Request(f"request-{number}", prompt, params))
    while engine.stats()["num_waiting"]:
        engine.step()
    for number in range(num_waiting):
        engine.add_request(Request(f"waiting-{number}", [2 + number % 500] * SHORTEST, params))
    for _ in range(WARM_UP):
        engine.step()
    records = []
    for _ in range(steps):
        engine.step()
        records.append(engine.trace.last_record)
    assert all(len(record.scheduled) == num_seqs for record in records), "not all decode"
    return records
