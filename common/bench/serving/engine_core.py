"""`engine-core`: one part's server with its engine in a thread, and in a process of its own.

Fresh servers take turns, in an order that is reversed every round. Each is given a closed loop of each
number of streams, after a warm-up of the same kind. Medians over the rounds; the ratios are of servers
that were measured one after the other.
"""

import argparse
import asyncio
import statistics
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.pairs import paired_ratio
from common.bench.core.processes import PartServer, run_worker
from common.bench.core.report import plural
from common.bench.core.results import column, make_result
from common.bench.serving.servers import MEASURED, MEASURES, Samples, add_load_arguments, measure

FORMS: dict[str, dict[str, Any]] = {
    "thread": {"engine_core": "thread"},
    "process": {"engine_core": "process"},
}
COLUMNS = [
    column("form", "engine core"),
    *MEASURED,
    column("ratio", "rate / thread's", digits=2),
    column("ratio_low", "95% from", digits=2),
    column("ratio_high", "to", digits=2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=15, help="default: 15")
    add_engine_arguments(parser)
    add_load_arguments(parser, rounds=5)
    parser.add_argument("--http-processes", type=positive, help="a third form, with so many")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    forms = dict(FORMS)
    if args.http_processes:
        forms[f"process, {args.http_processes} HTTP"] = {"api_server_count": args.http_processes}
    samples: Samples = {(form, count): {} for form in forms for count in args.streams}
    turns = [(n, form) for n in range(args.rounds) for form in list(forms)[:: -1 if n % 2 else 1]]
    others = OtherWork()
    for number, form in progress(turns, "servers"):
        settings = settings_of(args) | forms[form]
        with PartServer(args.part, args.model, settings, verbose=args.verbose) as server:
            for count in args.streams:
                found = asyncio.run(measure(server.url, count, number, args))
                samples[form, count][number] = found
    rows = [row(form, count, samples) for count in args.streams for form in forms]
    notes = [
        f"Model {args.model}, {args.prompt_len} tokens in, {args.output_len} out, greedy, streamed;"
        f" {plural(args.rounds, 'fresh server')} of each form, in turns."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = "The engine in a thread of the server, and in a process of its own"
    result = make_result(title, COLUMNS, rows, limits=limits, parts=[args.part], notes=notes)
    finish(args, result)
    return 0


def row(form: str, count: int, samples: Samples) -> dict[str, Any]:
    rounds = samples[form, count]
    medians = {n: statistics.median(found[n] for found in rounds.values()) for n in MEASURES}
    both = [
        {number: found["rate"] for number, found in samples[one, count].items()}
        for one in (form, "thread")
    ]
    ratio = paired_ratio(both[0], both[1])
    ratios = {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return {"form": form, "streams": count, **medians, **ratios, "rounds": rounds}
