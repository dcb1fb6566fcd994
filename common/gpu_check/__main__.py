"""The command line: `python -m common.gpu_check --help`."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common.gpu_check
from common.bench.core.arguments import positive
from common.bench.core.processes import last_line, part_package
from common.bench.core.results import Result, column, make_result, save_result
from common.bench.ladder import existing_parts
from common.gpu_check.items import FAILED, NOT_REACHED, OK, Item
from common.gpu_check.runner import run_jobs

SECTIONS = {  # and how many seconds each may take: in all less than ten minutes
    "limits": 40,
    "kernels": 110,
    "oracle": 100,
    "speed": 100,
    "overlap": 60,
    "ladder": 200,
}
NEED_LIMITS = {"speed", "ladder"}
FIRST_ASYNC_PART = 5
FIRST_PART = 3  # the first with our own model and kernels
MODELS, QUICK_MODELS = ("random:qwen3-0.6b", "random:qwen3-8b"), ("random:tiny-qwen3",)
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
    parser.add_argument("--models", nargs="+", help="of the ladder")
    limits = ", ".join(f"{name} {seconds}" for name, seconds in SECTIONS.items())
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
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = resolved_device(args.device, args.quick)
        parts = args.parts or [part for part in existing_parts() if part >= FIRST_PART]
        for part in parts:
            part_package(part)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    found = check_all(args, device, parts)
    command = f"python -m common.gpu_check {shlex.join(argv or sys.argv[1:])}".rstrip()
    result = to_result(found, parts, command)
    save_result(args.json, result)
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


def check_all(args: argparse.Namespace, device: str, parts: list[int]) -> dict[str, list[Item]]:
    """The items of each section, limits first where a section is judged by them."""
    found: dict[str, list[Item]] = {}
    wanted = set(args.only) | ({"limits"} if NEED_LIMITS & set(args.only) else set())
    for section in SECTIONS:
        if section not in wanted:
            continue
        log(f"{section} …")
        limits = limits_of(found)
        if section in NEED_LIMITS and limits is None:
            continue  # the failure that says why is there already
        items = found.setdefault(section, [])
        seconds = args.time_limit or SECTIONS[section]
        for item in run_jobs(section_jobs(section, args, device, parts, limits), seconds):
            items.append(item)
            log(f"  {item['name']}: {item['status']} {summary(item)}")
    return found


def section_jobs(
    section: str,
    args: argparse.Namespace,
    device: str,
    parts: list[int],
    limits: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """The jobs of a section, newest part first: what the time limit cuts off is the oldest."""
    job = {
        "kind": section,
        "name": section,
        "device": device,
        "quick": args.quick,
        "limits": limits,
    }
    newest = sorted(parts, reverse=True)
    if section == "oracle":
        return [{**job, "name": f"part {part:02d}", "part": part} for part in newest]
    if section == "overlap":
        model = (args.models or (QUICK_MODELS if args.quick else MODELS))[0]
        with_loops = [part for part in newest if part >= FIRST_ASYNC_PART]
        return [
            {**job, "name": f"part {part:02d}, {model}", "part": part, "model": model}
            for part in with_loops[-1:]
        ]
    if section == "ladder":
        models = args.models or (QUICK_MODELS if args.quick else MODELS)
        return [
            {**job, "name": f"part {part:02d}, {model}", "part": part, "model": model}
            for part in newest
            for model in models
        ]
    return [job]


def limits_of(found: dict[str, list[Item]]) -> dict[str, Any] | None:
    return next((item["limits"] for item in found.get("limits", []) if item["status"] == OK), None)


def to_result(found: dict[str, list[Item]], parts: list[int], command: str) -> Result:
    """Everything in one result of the benchmark's format: a table, and all items in full."""
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
    title = "Checks and measurements on the device"
    extra = {"sections": found, "failures": failures}
    return make_result(
        title, COLUMNS, rows, limits=limits, parts=parts, command=command, extra=extra
    )


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
