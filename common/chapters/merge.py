"""One merge of `common.chapters propagate`: part J's file and two states of part J-1's, into part J's new file.

The merging itself is git's. What is here is what git leaves open: files that come and go, permission bits, and a
conflict told in the line numbers of the file a person will open.
"""

import tempfile
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from common.chapters.chain import ChapterError, Part, run_git

# Length of a conflict marker: longer than git's seven, so that text about conflicts is not taken for one.
MARKER = 23
OPEN, MIDDLE, CLOSE = (sign * MARKER for sign in (b"<", b"=", b">"))


@dataclass(frozen=True)
class Entry:
    """A file's bytes and permission bits."""

    content: bytes
    mode: int

    @property
    def executable(self) -> bool:
        return bool(self.mode & 0o100)

    def same(self, other: "Entry | None") -> bool:
        """Whether git would call the two the same."""
        if other is None:
            return False
        return (self.content, self.executable) == (other.content, other.executable)


class Conflict(ChapterError):
    """An edit that a later part cannot take as it is."""


def merge_entry(
    where: str, before: Part, base: Entry | None, ours: Entry | None, theirs: Entry | None
) -> tuple[Entry | None, str]:
    """Part J's new file (None: no file) and a word for what happened.

    `where` names part J's file and `before` is part J-1. `base` and `theirs` are part J-1's file before and after the
    edit, `ours` is part J's. Raises Conflict.
    """
    if theirs is None:
        if ours is None:
            return None, "unchanged"
        if base and ours.content == base.content:
            return None, "deleted"
        raise Conflict(
            f"{where} has changes of its own, and {before.package} deletes it; delete it by hand first"
        )
    if base is None:
        if ours is None:
            return theirs, "new"
        if ours.content == theirs.content:
            return ours, "unchanged"
        raise Conflict(
            f"{where} is another file than {before.package}'s new one; rename one of them"
        )
    if ours is None:
        raise Conflict(f"{where} does not exist")
    mode = ours.mode
    if theirs.executable != base.executable:
        mode = theirs.mode
    if base.content == theirs.content or ours.content == theirs.content:
        content = ours.content
    elif ours.content == base.content:
        content = theirs.content
    else:
        content = merge_text(where, before, base.content, ours.content, theirs.content)
    if (content, mode) == (ours.content, ours.mode):
        return ours, "unchanged"
    return Entry(
        content, mode
    ), f"as in {before.package}" if content == theirs.content else "merged"


def merge_text(where: str, before: Part, base: bytes, ours: bytes, theirs: bytes) -> bytes:
    if b"\0" in base + ours + theirs:
        raise Conflict(f"{where} or {before.package}'s is binary, and cannot be merged")
    with tempfile.TemporaryDirectory() as name:
        for label, content in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(name, label).write_bytes(content)
        labels = ["-L", where, "-L", "base", "-L", f"{before.package}, edited"]
        command = ["-c", "merge.conflictStyle=merge", "merge-file", "-p", f"--marker-size={MARKER}"]
        # The exit status counts the conflicts, 127 at most; anything above is an error.
        conflicts, merged = run_git(
            Path(name), *command, *labels, "ours", "base", "theirs", ok=tuple(range(128))
        )
    if conflicts:
        raise Conflict(describe_conflicts(where, before, ours, merged))
    return merged


def describe_conflicts(where: str, before: Part, ours: bytes, merged: bytes) -> str:
    """The lines of part J's present file that conflict, both sides of each conflict, and the way on."""
    kept: list[bytes] = []  # `merged`, with our side of each conflict
    spans: list[tuple[int, int]] = []  # conflicts as line indices of `kept`
    shown: list[str] = []
    side, start = "", 0
    for line in merged.splitlines(keepends=True):
        text = line.decode(errors="replace").rstrip("\r\n")
        mark = line[: MARKER + 1].rstrip()
        if mark == OPEN and not side:
            side, start, text = "ours", len(kept), text[MARKER - 7 :]
        elif mark == MIDDLE and side == "ours":
            side, text = "theirs", text[MARKER - 7 :]
        elif mark == CLOSE and side == "theirs":
            side, text = "", text[MARKER - 7 :]
            spans.append((start, len(kept)))
        elif side != "theirs":
            kept.append(line)
            if not side:
                continue
        shown.append(f"    {text}")
    lines = ours.splitlines(keepends=True)
    places = ", ".join(line_range(lines, kept, *span) for span in spans)
    way_on = (
        f"  Change the edit; or carry it as far as it goes with --until {before.number}, "
        f"make it in {where} by hand, and propagate that file."
    )
    return "\n".join([f"{where}, {places}", *shown, way_on])


def line_range(ours: list[bytes], kept: list[bytes], start: int, stop: int) -> str:
    """Lines [start, stop) of `kept` as line numbers of `ours`."""
    numbers: dict[int, int] = {}  # index in `kept` to line number in `ours`
    for a, b, size in SequenceMatcher(None, ours, kept, autojunk=False).get_matching_blocks():
        numbers.update({b + i: a + i + 1 for i in range(size)})
    found = [numbers[i] for i in range(start, stop) if i in numbers]
    if not found:
        return f"after line {max((line for i, line in numbers.items() if i < start), default=0)}"
    return f"line {found[0]}" if len(found) == 1 else f"lines {found[0]}-{found[-1]}"
