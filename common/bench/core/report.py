"""`report`: results as Markdown tables, printed, or written into the READMEs' generated blocks.

A block is a pair of comments on lines of their own, with the table between them:

    <!-- table: results/offline.json -->
    <!-- /table -->

The path is relative to the README. What stands between the comments is replaced, so writing twice
changes nothing. Blocks in fenced code are left alone.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.noise import disturbance
from common.bench.core.processes import ROOT
from common.bench.core.results import Result, code_hashes, load_result

OPENING = re.compile(r"<!-- table: (\S+) -->")
CLOSING = "<!-- /table -->"
NOTHING = "–"


def render(result: Result) -> str:
    """A result as a Markdown table, with what it was measured on in a line beneath, and notes."""
    columns = result["columns"]
    numeric = [any(is_number(row[entry["key"]]) for row in result["rows"]) for entry in columns]
    lines = [
        table_line(heading(entry) for entry in columns),
        table_line("---:" if right else "---" for right in numeric),
    ]
    for row in result["rows"]:
        lines.append(table_line(cell(row[entry["key"]], entry["digits"]) for entry in columns))
    lines = [f"**{escape(result['title'])}**", "", *lines, "", provenance(result)]
    if result["notes"]:
        lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines)


def table_line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def heading(entry: dict[str, Any]) -> str:
    unit = f" ({entry['unit']})" if entry["unit"] else ""
    return escape(entry["label"] + unit)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any, digits: int) -> str:
    """A value as text: numbers rounded, with thousands separators; a dash for null."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.{digits}f}" if is_number(value) else escape(value)


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def provenance(result: Result) -> str:
    """One line: machine, its limits, date, versions, command."""
    machine, limits, versions = result["machine"], result["limits"], result["versions"]
    facts = [machine.get("cpu"), plural(machine.get("cores"), "core")]
    facts += [gpu["name"] + f" (driver {gpu['driver']})" for gpu in machine.get("gpus") or []]
    if machine.get("memory_gib"):
        facts.append(f"{machine['memory_gib']:.0f} GiB")
    if limits.get("read_gbps"):
        facts.append(f"{limits['device']} limits: {limits['read_gbps']:.0f} GB/s read")
        facts.append(f"{limits['fp32_gflops']:,.0f} GFLOP/s fp32")
    if limits.get("bf16_tflops"):
        facts.append(f"{limits['bf16_tflops']:,.0f} TFLOP/s bf16")
    if remark := disturbance(limits.get("other_cores")):
        facts.append(f"while these were measured {remark.removesuffix(' meanwhile')}")
    if limits.get("unmeasured"):
        facts.append(f"limits not measured: {limits['unmeasured']}")
    named = [f"{name} {version}" for name, version in versions.items() if version]
    what = ", ".join(fact for fact in facts if fact)
    return f"*{what}. {result['date'][:10]}. {', '.join(named)}.* `{result['command']}`"


def plural(count: int | None, noun: str) -> str | None:
    return None if count is None else f"{count} {noun}{'' if count == 1 else 's'}"


def filled(text: str, folder: Path, where: str) -> str:
    """The text of a README with every block's table made anew from its JSON.

    Raises BenchError for an unclosed block and for what cannot be read.
    """
    lines: list[str] = []
    name: str | None = None
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        mark = line.lstrip()[:3]
        if name is None and mark in ("```", "~~~") and (not fence or mark == fence):
            fence = "" if fence else mark
        opening = None if fence else OPENING.fullmatch(line.strip())
        if opening and name is not None:
            raise BenchError(f"{where}:{number}: the block of {name} before it is not closed")
        if opening:
            name = opening[1]
            lines += [line, "", render(load_block(folder, name, f"{where}:{number}")), ""]
        elif name is not None and line.strip() == CLOSING:
            name = None
        if name is None:
            lines.append(line)
    if name is not None:
        raise BenchError(f"{where}: the block of {name} is not closed by {CLOSING}")
    return "\n".join(lines)


def load_block(folder: Path, name: str, where: str) -> Result:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BenchError(f"{where}: {name} leads out of {folder.name}")
    try:
        return load_result(path)
    except ValueError as error:
        raise BenchError(f"{where}: {error}") from None


def write_readme(path: Path) -> bool:
    """Fill the blocks of one README in place; whether that changed it."""
    text = path.read_text(encoding="utf-8")
    new = filled(text, path.parent, f"{path.parent.name}/{path.name}")
    if not OPENING.search(text) or new == text:
        return False
    path.write_text(new, encoding="utf-8")
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    parser.add_argument("--all", action="store_true", help="every committed result of every part")
    parser.add_argument("--part", type=int, help="the results, or the README, of one part")
    parser.add_argument("--write", action="store_true", help="fill the READMEs' tables")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="plot latencies of `serve`")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    folders = part_folders(args.root, args.part)
    if args.write:
        if args.files:
            raise ValueError("--write takes no files: the READMEs name theirs")
        own = [] if args.part is not None else [args.root / "README.md"]
        for path in [*own, *(folder / "README.md" for folder in folders)]:
            if path.is_file() and write_readme(path):
                print(path.relative_to(args.root))
        return 0
    files = list(args.files)
    if args.all or args.part is not None:
        files += [path for folder in folders for path in sorted(folder.glob("results/*.json"))]
    if not files:
        raise ValueError("no results: name files, or give --all or --part N")
    results = [load_result(path) for path in files]
    if args.plot:
        from common.bench.serving.plot import plot_latencies

        plot_latencies(dict(zip(map(str, files), results, strict=True)), args.plot)
    for path, result in zip(files, results, strict=True):
        warn_if_stale(path, result)
        print(render(result) + "\n")
    return 0


def part_folders(root: Path, part: int | None) -> list[Path]:
    pattern = "part[0-9][0-9]_*" if part is None else f"part{part:02d}_*"
    folders = sorted(path for path in root.glob(pattern) if path.is_dir())
    if part is not None and not folders:
        raise ValueError(f"there is no part {part:02d} here")
    return folders


def warn_if_stale(path: Path, result: Result) -> None:
    """Say on standard error which parts' code has changed since the result was measured."""
    parts = [int(name[4:]) for name in result["code"] if re.fullmatch(r"part\d\d", name)]
    now = code_hashes(parts)
    changed = [name for name, code in now.items() if result["code"][name] != code]
    if changed:
        print(f"{path}: stale, changed since: {', '.join(changed)}", file=sys.stderr)
