"""The command line: `python -m common.gpu_check --help`."""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common.gpu_check
from common.bench.core.arguments import positive
from common.bench.core.processes import last_line, part_package
from common.bench.core.results import Result, column, make_result, save_result
from common.bench.ladder import existing_parts
from common.gpu_check.items import FAILED, NOT_REACHED, OK, Item
from common.gpu_check.plan import FIRST_PART, MODEL, QUICK_MODEL, SECTIONS, Plan
from common.gpu_check.runner import End, run_jobs

DEADLINE = 470  # seconds: less than eight minutes of a card's time
MOST_AGE = 60  # seconds that the imports before `main` may have taken
LIMIT_PASSED = "the section's time was up"
DEADLINE_PASSED = "the time for the whole run was up"
# Where they could not be measured, what is judged by them is measured all the same.
UNKNOWN_LIMITS = dict.fromkeys(("read_gbps", "fp32_gflops", "bf16_tflops"), math.nan)

COLUMNS = [
    column("section", "section"),
    column("name", "check"),
    column("status", "result"),
    column("seconds", "time", "s", 1),
    column("found", "found"),
]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.gpu_check",
        description=common.gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of what is measured (auto: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument(
        "--only",
        type=section_and_text,
        nargs="+",
        metavar="SECTION[:TEXT]",
        help="these sections; of a section those checks whose name contains the text",
    )
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    parser.add_argument("--parts", type=positive, nargs="+", help="default: all from 03 on")
    parser.add_argument("--model", help=f"of what runs an engine (default: {MODEL})")
    parser.add_argument(
        "--deadline",
        type=positive,
        default=DEADLINE,
        metavar="SECONDS",
        help="for everything, counted from the start of this process: what does not fit any more"
        " is left out (default: %(default)s)",
    )
    limits = ", ".join(f"{name} {section.seconds}" for name, section in SECTIONS.items())
    parser.add_argument("--time-limit", type=positive, help=f"s for each section ({limits})")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    return parser


def section_and_text(text: str) -> tuple[str, str]:
    """A section's name, and what the names of its checks are to contain."""
    name, _, part = text.partition(":")
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return name, part


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic() - process_age() if argv is None else time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    deadline = start + args.deadline
    try:
        if args.list and args.device == "auto" and not args.quick:  # what a GPU would run
            device, dtype = "cuda", "bfloat16" if args.dtype == "auto" else args.dtype
        else:
            device, dtype = resolved_device(args.device, args.dtype, args.quick)
        parts = args.parts or [part for part in existing_parts() if part >= FIRST_PART]
        for part in parts:
            part_package(part)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    model = args.model or (QUICK_MODEL if args.quick else MODEL)
    plan = Plan(device, dtype, args.quick, sorted(parts, reverse=True), model)
    wanted: dict[str, list[str]] = {}  # section -> what the names of its checks are to contain
    for name, text in args.only or ((name, "") for name in SECTIONS):
        wanted.setdefault(name, []).append(text)
    if args.list:
        print("\n".join(listing(plan, wanted, args.time_limit, args.deadline)))
        return 0
    command = f"python -m common.gpu_check {shlex.join(argv or sys.argv[1:])}".rstrip()
    base = to_result({}, parts, command)
    result = base
    save_result(args.json, result)  # where it cannot be written, that is known at once
    for found in check_all(plan, wanted, args.time_limit, deadline):
        spent = {"deadline": args.deadline, "spent_s": round(time.monotonic() - start, 1)}
        result = base | changing(found) | spent
        save_result(args.json, result)  # all there is so far, should the command be killed
    failures = result["failures"]
    num_missed = sum(row["status"] == NOT_REACHED for row in result["rows"])
    log(f"{len(failures)} failed, {num_missed} not reached; all of it is in {args.json}")
    for failure in failures:
        log(f"  {failure['section']}: {failure['name']}: {last_line(failure['error'])}")
    return 1 if failures else 0


def resolved_device(name: str, dtype: str, quick: bool) -> tuple[str, str]:
    """(cpu or a GPU, a number format). Raises ValueError where it is not there, or too slow for the
    full form."""
    from common.device import resolve_device

    device, dtype = (str(found).removeprefix("torch.") for found in resolve_device(name, dtype))
    if device == "cpu" and not quick:
        raise ValueError("there is no GPU; --quick checks that this command itself works")
    return device, dtype


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell, or not the truth."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return age if 0 <= age < MOST_AGE else 0.0
    except (OSError, AttributeError, ValueError):
        return 0.0


def ordered(wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    """In the order in which they run; limits first where a section is judged by them."""
    if any(SECTIONS[name].needs_limits for name in wanted):
        wanted = {"limits": [""], **wanted}
    return {name: wanted[name] for name in SECTIONS if name in wanted}


def listing(
    plan: Plan, wanted: dict[str, list[str]], time_limit: int | None, deadline: float
) -> Iterator[str]:
    """The plan in lines: sections, their seconds, and the processes of each."""
    total = 0
    for name in ordered(wanted):
        seconds = (time_limit or SECTIONS[name].seconds) * plan.patience
        total += seconds
        at_once = 1 if SECTIONS[name].is_timed else plan.at_once
        yield f"{name}: {seconds} s" + (f", {at_once} processes at once" if at_once > 1 else "")
        for job in SECTIONS[name].jobs(plan):
            share = f" ({job['share'][0] + 1} of {job['share'][1]})" if "share" in job else ""
            yield f"    {job['name']}{share}: at most {job['limit']:.0f} s a check"
    yield f"in all {total} s, and the last section until the deadline at {deadline:.0f} s"


def check_all(
    plan: Plan, wanted: dict[str, list[str]], time_limit: int | None, deadline: float
) -> Iterator[dict[str, list[Item]]]:
    """The items of each section, after every new one."""
    found: dict[str, list[Item]] = {}
    wanted = ordered(wanted)
    for name, texts in wanted.items():
        log(f"{name} …")
        section, limits = SECTIONS[name], limits_of(found) or UNKNOWN_LIMITS
        is_last = name == list(wanted)[-1] and not time_limit
        seconds = (time_limit or section.seconds) * plan.patience
        end = End(time.monotonic() + seconds, LIMIT_PASSED)
        if deadline < end.at or is_last:
            end = End(deadline, DEADLINE_PASSED)
        texts = [] if "" in texts else texts
        jobs = [job | {"limits": limits, "only": texts} for job in section.jobs(plan)]
        items = run_jobs(jobs, end, 1 if section.is_timed else plan.at_once)
        for item in items:
            found.setdefault(name, []).append(item)
            log(f"  {item['name']}: {item['status']} {summary(item)}")
            yield found


def limits_of(found: dict[str, list[Item]]) -> dict[str, Any] | None:
    return next((item["limits"] for item in found.get("limits", []) if item["status"] == OK), None)


def to_result(found: dict[str, list[Item]], parts: list[int], command: str) -> Result:
    """Everything in one result of the benchmark's format: a table, and all items in full."""
    title = "Checks and measurements on the device"
    new = changing(found)
    rows, limits = new.pop("rows"), new.pop("limits")
    return make_result(title, COLUMNS, rows, limits=limits, parts=parts, command=command, extra=new)


def changing(found: dict[str, list[Item]]) -> dict[str, Any]:
    """What of a result grows with every item."""
    rows = [
        {**{key: item[key] for key in ("name", "status", "seconds")}, "section": section}
        | {"found": summary(item)}
        for section, items in found.items()
        for item in items
    ]
    failures = [
        {"section": section, "name": item["name"], "error": item["error"]}
        for section, items in found.items()
        for item in items
        if item["status"] == FAILED
    ]
    limits = limits_of(found) or {"unmeasured": "that section was not asked for, or failed"}
    return {"rows": rows, "limits": limits, "sections": found, "failures": failures}


def summary(item: Item) -> str:
    """What an item found, in one short line."""
    if item["status"] == NOT_REACHED:
        return f"{item['error']} ({item['seconds_left']:.0f} s were left)"
    if item["error"]:
        return last_line(item["error"])[:200]
    if "us" in item:
        text = f"{item['us']:,.1f} µs ({item['call_us']:,.1f} a call)"
        return text + share(item, "mbu") + share(item, "mfu")
    if "tok/s" in item and "mfu" in item:
        return f"{item['tok/s']:,.0f} tok/s" + share(item, "mbu") + share(item, "mfu")
    known = {"name", "status", "seconds", "error"}
    found = item.get("limits") or {key: item[key] for key in item if key not in known}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
        if isinstance(value, int | float)
    )


def share(values: dict[str, Any], key: str) -> str:
    return f", {key.upper()} {values[key]:.0f}%" if values.get(key) else ""


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
