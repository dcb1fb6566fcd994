"""The command line: `python -m common.gpu_check --help`."""

import argparse
import itertools
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
from common.gpu_check.runner import run_jobs

DEADLINE = 470  # seconds: a machine is often lent for eight minutes at a time
LIMIT_PASSED = "the section's time limit had passed"
DEADLINE_PASSED = "the deadline of the whole run had passed"

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
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--only", type=sections, default=tuple(SECTIONS), metavar="SECTION,...")
    parser.add_argument("--parts", type=positive, nargs="+", help="default: all from 03 on")
    parser.add_argument("--model", help=f"of what runs an engine (default: {MODEL})")
    parser.add_argument(
        "--deadline",
        type=positive,
        default=DEADLINE,
        metavar="SECONDS",
        help="for everything: what does not fit any more is left out (default: %(default)s)",
    )
    limits = ", ".join(f"{name} {section.seconds}" for name, section in SECTIONS.items())
    parser.add_argument("--time-limit", type=positive, help=f"s for each section ({limits})")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    return parser


def sections(text: str) -> tuple[str, ...]:
    """Names with commas between, in the order in which they run."""
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in names)


def main(argv: Sequence[str] | None = None) -> int:
    deadline = time.monotonic()
    parser = build_parser()
    args = parser.parse_args(argv)
    deadline += args.deadline
    try:
        device = resolved_device(args.device, args.quick)
        parts = args.parts or [part for part in existing_parts() if part >= FIRST_PART]
        for part in parts:
            part_package(part)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    model = args.model or (QUICK_MODEL if args.quick else MODEL)
    plan = Plan(device, args.quick, sorted(parts, reverse=True), model)
    command = f"python -m common.gpu_check {shlex.join(argv or sys.argv[1:])}".rstrip()
    base = to_result({}, parts, command)
    result = base
    save_result(args.json, result)  # where it cannot be written, that is known at once
    for found in check_all(plan, args.only, args.time_limit, deadline):
        result = base | changing(found)
        save_result(args.json, result)  # all there is so far: the machine may be gone any moment
    failures = result["failures"]
    num_missed = sum(row["status"] == NOT_REACHED for row in result["rows"])
    log(f"{len(failures)} failed, {num_missed} not reached; all of it is in {args.json}")
    for failure in failures:
        log(f"  {failure['section']}: {failure['name']}: {last_line(failure['error'])}")
    return 1 if failures else 0


def resolved_device(name: str, quick: bool) -> str:
    """cpu or cuda. Raises ValueError where it is not there, or too slow for the full form."""
    from common.device import resolve_device

    device = str(resolve_device(name)[0])
    if device == "cpu" and not quick:
        raise ValueError("there is no GPU; --quick checks that this command itself works")
    return device


def check_all(
    plan: Plan, only: Sequence[str], time_limit: int | None, deadline: float
) -> Iterator[dict[str, list[Item]]]:
    """The items of each section, after every new one; limits first where a section is judged by
    them."""
    found: dict[str, list[Item]] = {}
    wanted = set(only)
    if any(SECTIONS[name].needs_limits for name in only):
        wanted.add("limits")
    for name, section in SECTIONS.items():
        if name not in wanted:
            continue
        log(f"{name} …")
        limits = limits_of(found)
        if section.needs_limits and limits is None:
            continue  # the failure that says why is there already
        end, why = time.monotonic() + (time_limit or section.seconds), LIMIT_PASSED
        if deadline < end:
            end, why = deadline, DEADLINE_PASSED
        jobs = [job | {"limits": limits} for job in section.jobs(plan)]
        before = run_jobs(section.before(plan), end, why, plan.at_once)
        items = run_jobs(jobs, end, why, 1 if section.is_timed else plan.at_once)
        for item in itertools.chain(before, items):
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
    return make_result(
        title, COLUMNS, rows, limits=limits, parts=parts, command=command, extra=new
    )


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
    if item["error"]:
        return last_line(item["error"])[:200]
    if "rows" in item:
        return "; ".join(
            f"{row['point']}: {row['rate']:,.0f} tok/s" + share(row, "mbu") + share(row, "mfu")
            for row in item["rows"]
        )
    if "us" in item:
        text = f"{item['us']:,.1f} µs ({item['call_us']:,.1f} a call)"
        return text + share(item, "mbu") + share(item, "mfu")
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
