"""`offload sleep`: memory that a sleeping server gives back, and how soon it is awake again.

A server with weights and a KV cache answers a request, sleeps at a level, and wakes up. Resident: the
process's memory as the system counts it. Times are of the requests to `/sleep` and `/wake_up`, beside
the seconds that the same server took to start. First answer: of the request after that, whose tokens
must be those of before.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import finish, progress, settings_of
from common.bench.core.processes import as_flags, post_json, run_worker
from common.bench.core.results import column, make_result
from common.bench.offload.contenders import PART, add_common_arguments
from common.bench.router.processes import router_process

LEVELS = (1, 2)
COLUMNS = [
    column("level", "level", digits=0),
    column("awake_mb", "resident, awake", "MB", 0),
    column("asleep_mb", "asleep", "MB", 0),
    column("given", "given back", "%", 0),
    column("sleep_s", "to fall asleep", "s", 2),
    column("wake_s", "to wake up", "s", 2),
    column("start_s", "a start", "s", 1),
    column("times", "times sooner", digits=0),
    column("answer_s", "first answer", "s", 2),
]
BODY = {"prompt": list(range(100, 140)), "max_tokens": 8, "temperature": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, pairs=2)


def run(args: argparse.Namespace) -> int:
    found: dict[int, list[dict[str, float]]] = {level: [] for level in LEVELS}
    for _ in progress(range(args.pairs), "servers"):
        for level, values in measure(args).items():
            found[level].append(values)
    rows = []
    for level, values in found.items():
        median = {name: statistics.median(one[name] for one in values) for name in values[0]}
        given = 100 * (1 - median["asleep_mb"] / median["awake_mb"])
        times = median["start_s"] / median["wake_s"]
        rows.append({"level": level, **median, "given": given, "times": times})
    notes = [
        f"Model {args.model}; a fresh server for each of {args.pairs} rounds, level 1 and then 2,"
        " medians. Level 1: weights in a file without a name, on a GPU in pinned memory. Level 2: they"
        " are read from the checkpoint again. The KV cache is dropped at both, and before level 2 little of it has been touched again."
    ]
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = "A server that sleeps"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes))
    return 0


def measure(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """One server, both levels. Raises BenchError."""
    flags = ["--model", args.model, *as_flags(settings_of(args))]
    begin, found = time.perf_counter(), {}
    with router_process(f"part{PART}.server", *flags, verbose=args.verbose) as (url, pid):
        start = time.perf_counter() - begin
        expected = timed(url, "/v1/completions", BODY)[1]["choices"]
        for level in LEVELS:
            awake = resident(pid)
            sleep, _ = timed(url, f"/sleep?level={level}", {})
            asleep = resident(pid)
            wake, _ = timed(url, "/wake_up", {})
            answer, told = timed(url, "/v1/completions", BODY)
            if told["choices"] != expected:
                raise BenchError(f"level {level}: other tokens after waking up")
            found[level] = {
                "awake_mb": awake / 1e6,
                "asleep_mb": asleep / 1e6,
                "sleep_s": sleep,
                "wake_s": wake,
                "start_s": start,
                "answer_s": answer,
            }
    return found


def timed(url: str, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    begin = time.perf_counter()
    told = post_json(url + path, body)
    return time.perf_counter() - begin, told


def resident(pid: int) -> int:
    """Bytes of memory that the process has now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS")]
    return 1024 * int(line.split()[1])
