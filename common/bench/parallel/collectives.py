"""`parallel collectives`: alpha and beta of each collective, between ranks of this machine.

--ranks processes with one thread each run a collective some times in a row, for tensors from 256
bytes to 16 MiB; a time is that of one call on rank 0, the median of --repeats rows. A line
alpha + beta * bytes is fitted with the least relative deviations, because sizes differ 65536-fold.
The bytes are those of the whole tensor (all-reduce, broadcast), of all rows (all-gather, reduce-
scatter, gather) or of what one rank hands out (all-to-all). `sent` is what rank 0 has counted as
given to others in one call, to these bytes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from common.bench.core.arguments import add_output_arguments, finish, positive
from common.bench.core.noise import disturbance
from common.bench.core.processes import child_environment, run_json, run_worker
from common.bench.core.results import Result, column, make_result
from common.bench.parallel.fit import Fit, fit_alpha_beta
from common.bench.parallel.measure import OPERATIONS
from common.bench.prefix.plot import check_plot

SIZES = tuple(256 * 4**i for i in range(9))  # bytes, 256 to 16 Mi
COLUMNS = [
    column("transport", "between ranks"),
    column("ranks", "ranks", digits=0),
    column("operation", "collective"),
    column("alpha_us", "alpha", "µs", 1),
    column("alpha_error_us", "±", "µs", 1),
    column("gbps", "1 / beta", "GB/s", 2),
    column("gbps_error", "±", "GB/s", 2),
    column("error", "off by", "%", 0),
    column("worst", "at most", "%", 0),
    column("small_us", "of 2 KiB", "µs", 1),
    column("large_us", "of 64 KiB", "µs", 1),
    column("sent", "sent", digits=2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transports", nargs="+", default=["gloo", "shared_memory"], metavar="NAME",
        choices=["gloo", "shared_memory"], help="default: gloo shared_memory",
    )  # fmt: skip
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2], help="default: 2")
    parser.add_argument(
        "--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS, metavar="NAME",
        help=f"default: {' '.join(OPERATIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=list(SIZES), help="in bytes, multiples of 64"
    )
    parser.add_argument("--repeats", type=positive, default=15, help="default: 15")
    parser.add_argument("--quick-limits", action="store_true", help="measure limits in a second")
    parser.add_argument("--verbose", action="store_true", help="show what the ranks print")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    sizes = sorted(set(args.sizes))
    for name, bad in (
        ("--sizes", [size for size in sizes if size % 64] or (len(sizes) < 3 and sizes)),
        ("--ranks", [ranks for ranks in args.ranks if not 2 <= ranks <= 16]),
    ):
        if bad:
            wants = "three or more multiples of 64" if name == "--sizes" else "between 2 and 16"
            raise ValueError(f"{name} {' '.join(map(str, bad))}: must be {wants}")
    answers = []
    for ranks in sorted(set(args.ranks)):
        for transport in dict.fromkeys(args.transports):
            job = {
                "job": "collectives", "transport": transport, "ranks": ranks, "sizes": sizes,
                "operations": list(dict.fromkeys(args.operations)), "repeats": args.repeats,
            }  # fmt: skip
            answers.append((job, run_job(job, args.verbose)))
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    result = collectives_result(args, answers, limits)
    if args.plot:
        from common.bench.parallel.plot import plot_collectives

        plot_collectives(result, args.plot)
    finish(args, result)
    return 0


def run_job(job: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """The job of `common.bench.parallel.measure` in a fresh process."""
    command = [sys.executable, "-m", "common.bench.parallel.measure"]
    return run_json(command, job, child_environment(), job["job"], verbose=verbose)


def collectives_result(
    args: argparse.Namespace,
    answers: list[tuple[dict[str, Any], dict[str, Any]]],
    limits: dict[str, Any],
) -> Result:
    rows = [
        row_of(job, operation, measured)
        for job, answer in answers
        for operation, measured in answer["operations"].items()
    ]
    notes = [
        f"float32; one thread a rank; medians of {args.repeats} rows of calls. off by: root mean"
        " square of the times' deviations from the line, and the greatest; ±: one standard error."
        " sent: bytes that rank 0 gave to others in a call, to the collective's bytes."
    ]
    for job, answer in answers:
        if remark := disturbance(answer["wall_other_cores"]):
            notes.append(f"{job['transport']}, {job['ranks']} ranks: {remark}.")
    return make_result("Collectives: alpha and beta", COLUMNS, rows, limits=limits, notes=notes)


def row_of(job: dict[str, Any], operation: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """measured: of each size, num_bytes, seconds and sent_bytes of one call."""
    sizes = [point["num_bytes"] for point in measured]
    times = [point["seconds"] for point in measured]
    fit = fit_alpha_beta(sizes, times)
    return {
        "transport": job["transport"].replace("_", " "),
        "ranks": job["ranks"],
        "operation": operation.replace("_", "-"),
        "alpha_us": 1e6 * fit.alpha,
        "alpha_error_us": 1e6 * fit.alpha_error,
        "gbps": fit.bytes_per_s / 1e9 if fit.beta else None,
        "gbps_error": fit.beta_error / fit.beta**2 / 1e9 if fit.beta else None,
        "error": 100 * fit.error,
        "worst": 100 * fit.worst,
        "small_us": microseconds(fit, measured, 2048),
        "large_us": microseconds(fit, measured, 65536),
        "sent": measured[-1]["sent_bytes"] / measured[-1]["num_bytes"],
        "sizes": sizes,
        "times_s": times,
        "alpha_s": fit.alpha,
        "beta_s": fit.beta,
    }


def microseconds(fit: Fit, measured: list[dict[str, Any]], num_bytes: int) -> float:
    """Of one call, as measured where that size was; else as the line says."""
    times = {point["num_bytes"]: point["seconds"] for point in measured}
    return 1e6 * times.get(num_bytes, fit.seconds(num_bytes))
