"""`arrival`: what those who stream notice of a long prompt that comes in.

--streams requests decode; when each has --before tokens, a prompt of --prompt-len tokens arrives.
Measured are the gaps between the tokens of each stream (inter-token latency, ITL) from then on
until the newcomer's first token, the newcomer's time to first token (TTFT), and the time until all
is done. Each measurement is a fresh process, and parts take turns, in alternating order.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.latencies import percentile
from common.bench.core.noise import disturbance
from common.bench.core.processes import part_package, run_worker
from common.bench.core.report import plural
from common.bench.core.results import column, make_result

COLUMNS = [
    column("part", "part", digits=0),
    column("median_ms", "median ITL", "ms", 0),
    column("p99_ms", "p99 ITL", "ms", 0),
    column("worst_ms", "worst ITL", "ms", 0),
    column("ttft_ms", "TTFT of the newcomer", "ms", 0),
    column("total_s", "until all is done", "s", 2),
    column("worst_ratio", "worst ITL, to the part above", "x", 2),
    column("total_ratio", "total, to the part above", "x", 2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=positive, nargs="+", default=[5, 6], help="default: 5 6")
    add_engine_arguments(parser)
    parser.add_argument("--streams", type=positive, default=8, help="that decode (default: 8)")
    parser.add_argument("--prompt-len", type=positive, default=1500, help="default: 1500")
    parser.add_argument("--stream-prompt-len", type=positive, default=32, help="default: 32")
    parser.add_argument("--output-len", type=positive, default=96, help="of each (default: 96)")
    parser.add_argument("--before", type=positive, default=32, help="tokens (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument("--vocab-size", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.before >= args.output_len:
        raise ValueError("before must be less than output_len: the streams would be done")
    for part in args.parts:
        part_package(part)
    answers: dict[int, list[dict[str, Any]]] = {part: [] for part in args.parts}
    turns = [
        (number, part)
        for number in range(args.repeats)
        for part in args.parts[:: -1 if number % 2 else 1]
    ]
    shape = ("streams", "prompt_len", "stream_prompt_len", "output_len", "before", "vocab_size")
    for number, part in progress(turns, "measurements"):
        job = {"job": "arrival", "part": part, "model": args.model, "settings": settings_of(args)}
        job |= {name: getattr(args, name) for name in shape} | {"seed": f"{args.seed} {number}"}
        answers[part].append(run_worker(job, verbose=args.verbose))
    rows = [row(part, answers[part]) for part in args.parts]
    for before, after in itertools.pairwise(rows):
        for name in ("worst", "total"):
            pairs = zip(after[f"{name}s"], before[f"{name}s"], strict=True)
            after[f"{name}_ratio"] = statistics.median(mine / its for mine, its in pairs)
    notes = [
        f"Model {args.model}, greedy. {plural(args.streams, 'stream')} of {args.stream_prompt_len}"
        f" tokens in and {args.output_len} out; when each has {args.before}, a prompt of"
        f" {args.prompt_len} tokens arrives. ITL: from then until the newcomer's first token; its"
        f" median and p99 over all rounds, worst and the rest medians of {args.repeats} rounds, each"
        " in a fresh process, parts in turns. Ratios: medians of the rounds' ratios."
    ]
    cores = [answer["wall_other_cores"] for part in answers.values() for answer in part]
    if remark := disturbance(max((c for c in cores if c is not None), default=None)):
        notes.append(f"Disturbed, in the worst measurement: {remark}.")
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = f"A prompt of {args.prompt_len} tokens among {args.streams} streams"
    result = make_result(title, COLUMNS, rows, limits=limits, parts=args.parts, notes=notes)
    if args.plot:
        draw({part: median_round(answers[part])["tokens"] for part in args.parts}, args.plot)
    finish(args, result)
    return 0


def row(part: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [1000 * gap for answer in answers for gap in answer["gaps"]]
    worsts = [1000 * max(answer["gaps"]) for answer in answers]
    totals = [answer["total_s"] for answer in answers]
    return {
        "part": part,
        "median_ms": statistics.median(gaps),
        "p99_ms": percentile(gaps, 99),
        "worst_ms": statistics.median(worsts),
        "ttft_ms": 1000 * statistics.median(answer["ttft_s"] for answer in answers),
        "total_s": statistics.median(totals),
        "worsts": worsts,
        "totals": totals,
        "worst_ratio": None,
        "total_ratio": None,
    }


def median_round(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The round whose worst gap is the median one."""
    ordered = sorted(answers, key=lambda answer: max(answer["gaps"]))
    return ordered[(len(ordered) - 1) // 2]


def draw(tokens_of: dict[int, list[list[float]]], path: Path) -> None:
    """A row a stream, a mark a token; seconds since the long prompt came in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(tokens_of), 1, sharex=True, figsize=(9, 1.6 * len(tokens_of) + 0.6), squeeze=False
    )
    for (part, streams), [axes] in zip(tokens_of.items(), panels, strict=True):
        for index, times in enumerate(streams):
            newcomer = index == len(streams) - 1
            color = "#D55E00" if newcomer else "#0072B2"
            axes.plot(times, [index] * len(times), "|", color=color, markersize=7)
        axes.set_title(f"Part {part:02d}: tokens of the streams, and of the newcomer", loc="left")
        axes.axvline(0, color="#7F7F7F", lw=1)
        axes.set_yticks([])
    panels[-1][0].set_xlabel("seconds since the long prompt came in")
    figure.set_layout_engine("tight")
    figure.savefig(path, dpi=110)


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Drive one engine through it. In the worker's process.

    Returns gaps: seconds between tokens of one stream, that end after the arrival and begin before
    the newcomer's first token; ttft_s; total_s; tokens: when each came, by stream, the newcomer's
    last, in seconds since the arrival.
    """
    import time

    from common.bench.core.workload import random_prompts
    from common.requests import Request
    from common.sampling import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=job["output_len"], ignore_eos=True)
    lengths = [job["stream_prompt_len"]] * job["streams"] + [job["prompt_len"]]
    warm_up = random_prompts([16] * job["streams"], job["vocab_size"], "warm-up")
    engine.generate(warm_up, SamplingParams(temperature=0, max_tokens=4), progress=False)
    *streams, newcomer = random_prompts(lengths, job["vocab_size"], job["seed"])
    times: dict[str, list[float]] = {str(number): [] for number in range(len(streams))}
    begin, arrival = time.perf_counter(), 0.0
    for name, prompt in zip(times, streams, strict=True):
        engine.add_request(Request(name, prompt, params))
    while engine.has_unfinished():
        if not arrival and min(map(len, times.values())) >= job["before"]:
            arrival = time.perf_counter()
            times["newcomer"] = []
            engine.add_request(Request("newcomer", newcomer, params))
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            times[output.request_id] += [now] * len(output.token_ids)
    total = time.perf_counter() - begin
    if any(len(own) != job["output_len"] for own in times.values()):
        raise BenchError("a request has not got its tokens")
    first = times["newcomer"][0]
    gaps = [
        after - before
        for name, own in times.items()
        for before, after in itertools.pairwise(own)
        if name != "newcomer" and after > arrival and before < first
    ]
    tokens = [[at - arrival for at in own] for own in times.values()]
    return {"gaps": gaps, "ttft_s": first - arrival, "total_s": total, "tokens": tokens}
