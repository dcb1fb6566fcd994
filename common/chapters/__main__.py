"""The tool that keeps fifteen copies of one engine honest: list, diff, check and propagate over the chain of parts.

Part N is a copy of part N-1 plus one technique, so an early fix has to reach every later part, and what a README says it
touches has to be what it touches. Nobody keeps that up by hand. `python -m common.chapters --help` shows the commands;
`chain` says what a part is, `check` what must hold, `propagate` how an edit travels.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from common.chapters.chain import (
    KINDS,
    ROOT,
    ChapterError,
    Part,
    changes,
    code_lines,
    count_code_lines,
    find_part,
    find_parts,
    front_matter,
    list_files,
    run_git,
)
from common.chapters.check import check
from common.chapters.propagate import propagate

PROPAGATE_HELP = """\
Carry an edit of a chain file forward through every later part.

For each later part J it merges three versions of the file with `git merge-file`:
  ours    part J's file
  base    part J-1's file at REV
  theirs  part J-1's file now, with what was merged into it just before
Edits made to parts between are carried along in the same way. A new file is copied into later parts, a deleted one is
deleted where it was a plain copy, and the first part that has no such file ends the journey. All files are merged in
memory first: on a conflict the place is shown, nothing is written, and the exit status is 1.

REV is by default the merge base of HEAD and the main branch (`main`, else `origin/main`), so that a branch's commits
count as its edit; on the main branch itself it is HEAD, so that the uncommitted edit counts. A part that REV does not
have yet is compared with HEAD instead. If an earlier edit was already carried forward and committed, `--since HEAD`
carries only what came after it.
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def reading_order(parts: list[Part], kinds: dict[str, str]) -> list[str]:
    """Changed files, then deleted, then new ones; within each the files that entered the chain first come first."""
    entered: dict[str, int] = {}
    for part in parts:
        for name in list_files(part.folder):
            entered.setdefault(name, part.number)
    return sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), entered.get(name, 0), name))


def git_diff(root: Path, before: Part, after: Part, name: str, kind: str, *options: str) -> str:
    old = "/dev/null" if kind == "new" else f"{before.folder.name}/{name}"
    new = "/dev/null" if kind == "deleted" else f"{after.folder.name}/{name}"
    fixed = ["--no-index", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/"]
    _, output = run_git(root, "diff", *fixed, *options, "--", old, new, ok=(0, 1))
    return output.decode(errors="replace")


def diff_stat(
    root: Path, before: Part, after: Part, kinds: dict[str, str]
) -> dict[str, tuple[int, int] | None]:
    """File name to (lines added, lines deleted), None where a file is binary."""
    stat: dict[str, tuple[int, int] | None] = {}
    for name, kind in kinds.items():
        fields = git_diff(root, before, after, name, kind, "--numstat").split("\t")
        # An empty file that comes or goes may have no line in git's table.
        added, deleted = fields[:2] if len(fields) > 2 else ("0", "0")
        stat[name] = None if added == "-" else (int(added), int(deleted))
    return stat


def code_stat(root: Path, before: Part, after: Part) -> tuple[int, int]:
    """(lines of Python code added, deleted), as in a diff of the two parts without blank lines, comments and docstrings."""
    with tempfile.TemporaryDirectory() as folder:
        for part in (before, after):
            Path(folder, part.package).mkdir()
            for name, content in part.read_chain().items():
                path = Path(folder, part.package, name)
                if path.suffix == ".py":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lines = code_lines(content, f"{part.folder.name}/{name}")
                    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        fixed = ["--no-index", "--no-ext-diff", "--no-textconv", "--no-renames", "--text"]
        sides = [str(Path(folder, part.package)) for part in (before, after)]
        _, output = run_git(root, "diff", "--numstat", *fixed, "--", *sides, ok=(0, 1))
    counts = [line.split("\t")[:2] for line in output.decode(errors="replace").splitlines()]
    return sum(int(added) for added, _ in counts), sum(int(deleted) for _, deleted in counts)


def total(stat: dict[str, tuple[int, int] | None]) -> tuple[int, int]:
    counts = [pair for pair in stat.values() if pair]
    return sum(added for added, _ in counts), sum(deleted for _, deleted in counts)


def command_list(arguments: argparse.Namespace, root: Path) -> int:
    parts = find_parts(root)
    columns = ("code", "+code", "-code", "+lines", "-lines")
    print(f"{'part':<6}{'title':<34}" + "".join(f"{name:>8}" for name in columns))
    before: tuple[Part, dict[str, bytes]] | None = None
    for part in parts:
        try:
            title = front_matter(part)["title"]
        except ChapterError:
            title = f"({part.folder.name}: no front matter)"
        chain = part.read_chain()
        lines = sum(count_code_lines(part.folder / name) for name in chain if name.endswith(".py"))
        row = f"{part.number:02d}    {title:<34}{lines:>8}"
        if before:
            stat = diff_stat(root, before[0], part, changes(before[1], chain))
            for added, deleted in (code_stat(root, before[0], part), total(stat)):
                row += f"{f'+{added}':>8}{f'-{deleted}':>8}"
        print(row)
        before = part, chain
    print("code: lines of Python without blanks, comments and docstrings; lines: all, as in diff")
    return 0


def command_diff(arguments: argparse.Namespace, root: Path) -> int:
    parts = find_parts(root)
    before, after = find_part(parts, arguments.before), find_part(parts, arguments.after)
    kinds = changes(before.read_chain(), after.read_chain())
    names = reading_order(parts, kinds)
    if arguments.all:
        sides = [
            {name: (part.folder / name).read_bytes() for name in list_files(part.folder)}
            for part in (before, after)
        ]
        rest = {name: kind for name, kind in changes(*sides).items() if name not in kinds}
        names += reading_order(parts, rest)
        kinds |= rest
    if not names:
        print(f"{before.folder.name} and {after.folder.name} have the same files")
        return 0
    if arguments.stat:
        print_stat(names, kinds, diff_stat(root, before, after, kinds))
        return 0
    tty = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colour = arguments.color == "always" or (arguments.color == "auto" and tty)
    for name in names:
        option = f"--color={'always' if colour else 'never'}"
        sys.stdout.write(git_diff(root, before, after, name, kinds[name], option))
    return 0


def print_stat(
    names: list[str], kinds: dict[str, str], stat: dict[str, tuple[int, int] | None]
) -> None:
    width = max(len(name) for name in names) + 11
    for name in names:
        label = name if kinds[name] == "changed" else f"{name} ({kinds[name]})"
        pair = stat[name]
        counts = f"{f'+{pair[0]}':>7}{f'-{pair[1]}':>7}" if pair else f"{'binary':>14}"
        print(f"{label:<{width}}{counts}")
    added, deleted = total(stat)
    print(f"{f'total, {len(names)} files':<{width}}{f'+{added}':>7}{f'-{deleted}':>7}")


def command_check(arguments: argparse.Namespace, root: Path) -> int:
    errors, warnings = check(root)
    for line in [] if arguments.quiet else warnings:
        print(f"warning: {line}")
    for line in errors:
        print(f"error: {line}")
    hint = " (shown without --quiet)" if arguments.quiet and warnings else ""
    counts = f"{len(errors)} errors, {len(warnings)} warnings{hint}"
    print(f"{len(find_parts(root))} parts checked: {counts}")
    return 1 if errors else 0


def command_propagate(arguments: argparse.Namespace, root: Path) -> int:
    if arguments.all == bool(arguments.paths):
        raise ChapterError("give either the edited files or --all")
    return propagate(root, arguments.paths, arguments.since, arguments.until, arguments.dry_run)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m common.chapters", description="Keep the chain of parts in order."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="list|diff|check|propagate"
    )

    command = commands.add_parser(
        "list", help="the parts, their size, their step from the part before"
    )
    command.set_defaults(run=command_list)

    command = commands.add_parser("diff", help="what part B changes against part A", description=(
        "Unified diff between two parts: changed files, then deleted, then new ones, oldest files first."))  # fmt: skip
    command.add_argument("before", metavar="A", help="a part: 6, part06 or its folder's name")
    command.add_argument("after", metavar="B", help="the part to compare with it")
    command.add_argument(
        "--stat", action="store_true", help="only the lines added and deleted in each file"
    )
    command.add_argument("--all", action="store_true", help="README, JSON, images and the like too")
    command.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal"
    )
    command.set_defaults(run=command_diff)

    command = commands.add_parser("check", help="front matter, imports, tables, packaging, folders", description=(
        "Check what must hold along the chain. Exit status 1 on any error; tables whose results were measured on "
        "other code are warnings."))  # fmt: skip
    command.add_argument("--quiet", action="store_true", help="count the warnings, show the errors")
    command.set_defaults(run=command_check)

    command = commands.add_parser(
        "propagate",
        help="carry an edit forward through every later part",
        description=PROPAGATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="part04/scheduler.py, or with the folder's full name",
    )
    command.add_argument("--since", metavar="REV", help="the revision the edit is counted from")
    command.add_argument("--until", metavar="PART", help="the last part to carry it to")
    command.add_argument(
        "--all", action="store_true", help="every chain file changed since REV, lowest part first"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be written, write nothing"
    )
    command.set_defaults(run=command_propagate)
    return parser


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments, root)
    except (ChapterError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `diff 6 7 | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
