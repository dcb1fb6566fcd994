"""How an edit travels along the chain: merges from part to part, all of them in memory before one is written.

Part J's file is part J-1's file plus a technique. An edit of part J-1 is the difference between its file at a revision
and its file now; merging that difference into part J keeps the technique, and the merged file is in turn the edit that
part J+1 gets. What cannot be merged stops everything, so that the tree never holds half an edit.
"""

import itertools
import os
import stat
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from common.chapters.chain import (
    PART_FOLDER,
    ChapterError,
    Part,
    find_part,
    find_parts,
    is_chain_file,
    run_git,
)
from common.chapters.merge import Conflict, Entry, merge_entry


@dataclass
class Tree:
    """The working tree, with what is to be written laid over it."""

    pending: dict[Path, Entry | None] = field(default_factory=dict)
    covered: set[tuple[int, str]] = field(default_factory=set)  # (part, file) some edit has passed

    def on_disk(self, part: Part, name: str) -> Entry | None:
        path = part.folder / name
        if path.is_symlink() or path.is_dir():
            raise ChapterError(f"{part.package}/{name} is not a plain file")
        if not path.exists():
            return None
        return Entry(path.read_bytes(), stat.S_IMODE(path.stat().st_mode))

    def read(self, part: Part, name: str) -> Entry | None:
        path = part.folder / name
        return self.pending[path] if path in self.pending else self.on_disk(part, name)


class Baseline:
    """The parts as they were before the edit: at the first of `revisions` that has the part."""

    def __init__(self, root: Path, revisions: list[str]) -> None:
        self.root = root
        # Part number to (revision, folder); a folder may have had another name then.
        self.folders: dict[int, tuple[str, str]] = {}
        for revision in reversed(revisions):
            _, names = run_git(root, "ls-tree", "-d", "-z", "--name-only", revision)
            for name in names.decode(errors="replace").split("\0"):
                if match := PART_FOLDER.fullmatch(name):
                    self.folders[int(match[1])] = (revision, name)

    def read(self, part: Part, name: str) -> Entry | None:
        revision, folder = self.folders[part.number]
        _, listing = run_git(self.root, "ls-tree", "-z", revision, "--", f"{folder}/{name}")
        if not listing:
            return None
        mode = listing.split(b" ", 1)[0]
        if mode not in (b"100644", b"100755"):
            raise ChapterError(f"{part.package}/{name} is not a plain file at {revision}")
        # --filters gives the bytes a checkout would give, line endings included.
        _, content = run_git(self.root, "cat-file", "--filters", f"{revision}:./{folder}/{name}")
        return Entry(content, 0o755 if mode == b"100755" else 0o644)

    def changed(self, part: Part) -> list[str]:
        """Chain files of `part` that differ between the baseline and the working tree."""
        revision, folder = self.folders[part.number]
        _, listing = run_git(self.root, "ls-tree", "-r", "-z", revision, "--", f"{folder}/")
        before: dict[str, tuple[str, bool]] = {}  # name to (blob, executable)
        for line in listing.decode().split("\0")[:-1]:
            fields, path = line.split("\t", 1)
            mode, _, blob = fields.split(" ")
            before[path.removeprefix(f"{folder}/")] = (blob, mode == "100755")
        names = list(part.read_chain())
        paths = [f"{part.folder.name}/{name}" for name in names]
        _, blobs = run_git(self.root, "hash-object", "--", *paths) if paths else (0, b"")
        now = {
            name: (blob, bool((part.folder / name).stat().st_mode & 0o100))
            for name, blob in zip(names, blobs.decode().split(), strict=True)
        }
        both = sorted(filter(is_chain_file, before.keys() | now.keys()))
        return [name for name in both if before.get(name) != now.get(name)]


def propagate(
    root: Path, paths: list[str], since: str | None, until: str | None, dry_run: bool
) -> int:
    """Carry the edited `paths` forward, or every edited chain file when there are none.

    Returns 0, or 1 when something stood in the way; then nothing has been written. Raises ChapterError on bad input.
    """
    parts = find_parts(root)
    chosen = [parse_path(root, parts, path) for path in paths]
    last = find_part(parts, until).number if until else parts[-1].number
    revision = find_revision(root, since)
    baseline = Baseline(root, [revision, "HEAD"])
    for part, _ in chosen:
        found, _ = baseline.folders.get(part.number, ("", ""))
        if not found or (since and found != revision):
            raise ChapterError(
                f"{part.package} does not exist at {since or 'HEAD'}; nothing to compare the edit with"
            )
    if not paths:
        known = [part for part in parts if part.number in baseline.folders]
        chosen = [(part, name) for part in known for name in baseline.changed(part)]
    tree = Tree()
    lines: list[str] = []
    problems: list[Conflict] = []
    for part, name in sorted(chosen, key=lambda pair: (pair[0].number, pair[1])):
        if (part.number, name) in tree.covered:
            continue  # an earlier part's edit has passed here and taken this one along
        try:
            rest = [later for later in parts if part.number < later.number <= last]
            lines += carry(name, [part, *rest], baseline, tree)
        except Conflict as problem:
            problems.append(problem)
    if problems:
        report_problems(problems, revision)
        return 1
    if not dry_run:
        write(tree.pending)
    print("\n".join(lines or [f"no chain file differs from {revision}"]))
    done = "would be written or deleted" if dry_run else "written or deleted"
    print(f"{len(tree.pending)} files {done}")
    return 0


def report_problems(problems: list[Conflict], revision: str) -> None:
    for problem in problems:
        print(f"conflict: {problem}", file=sys.stderr)
    if revision != "HEAD":
        print(f"The edit is counted from {revision}; if part of it was carried and committed, try --since HEAD.", file=sys.stderr)  # fmt: skip
    print("nothing was written", file=sys.stderr)


def parse_path(root: Path, parts: list[Part], text: str) -> tuple[Part, str]:
    """The part and the chain file that a PATH on the command line means."""
    path = Path(text)
    if ".." in path.parts:
        raise ChapterError(f"{text}: give the path without '..'")
    if path.is_absolute():
        if not path.resolve().is_relative_to(root.resolve()):
            raise ChapterError(f"{text}: lies outside {root}")
        path = path.resolve().relative_to(root.resolve())
    if len(path.parts) < 2 or not path.parts[0].startswith("part"):
        raise ChapterError(f"{text}: is no file of a part; give a path like part04/scheduler.py")
    part, name = find_part(parts, path.parts[0]), Path(*path.parts[1:]).as_posix()
    if name == "README.md":
        raise ChapterError(f"{text}: a README belongs to its part alone and is not carried forward")
    if not is_chain_file(name):
        raise ChapterError(
            f"{text}: results, notebooks, JSON and images are never merged, only chain files"
        )
    return part, name


def find_revision(root: Path, since: str | None) -> str:
    """The revision the edit is counted from; the help of `propagate` tells the default."""
    run_git(root, "rev-parse", "--git-dir")
    verify = ["rev-parse", "--verify", "--quiet", "--end-of-options"]
    wanted = "HEAD" if since is None else since
    missing, commit = run_git(root, *verify, f"{wanted}^{{commit}}", ok=(0, 1, 128))
    if missing and since is None:
        raise ChapterError("the repository has no commit to compare with")
    if missing:
        raise ChapterError(f"--since {since}: no such revision")
    if since is not None:
        return commit.decode().strip()[:12]
    _, branch = run_git(root, "symbolic-ref", "--short", "--quiet", "HEAD", ok=(0, 1))
    if branch.strip() != b"main":
        for name in ("refs/heads/main", "refs/remotes/origin/main"):
            missing, commit = run_git(root, "merge-base", "HEAD", name, ok=(0, 1, 128))
            if not missing:
                return commit.decode().strip()[:12]
    return "HEAD"


def carry(name: str, chain: list[Part], baseline: Baseline, tree: Tree) -> list[str]:
    """Merge one file through `chain`, whose first part was edited, into `tree`; tells what each part gets."""
    first = chain[0]
    revision, _ = baseline.folders[first.number]
    base, theirs = baseline.read(first, name), tree.read(first, name)
    if base is None and theirs is None:
        raise ChapterError(f"{first.package}/{name}: no such file, neither now nor at {revision}")
    if theirs and b"\0" in theirs.content:
        raise ChapterError(f"{first.package}/{name}: is binary; only text is carried forward")
    if theirs and theirs.same(base):
        return [f"{first.package}/{name}: as it was at {revision}, nothing to carry (see --since)"]
    tree.covered.add((first.number, name))
    lines = []
    for before, part in itertools.pairwise(chain):
        where = f"{part.package}/{name}"
        ours = tree.read(part, name)
        # A part that no revision has was made from the tree as it is, so there the edit is what we merge now.
        known = part.number in baseline.folders
        at_base = baseline.read(part, name) if known else tree.on_disk(part, name)
        superseded = base is not None and theirs is not None
        never_there = theirs is None and at_base is None
        if ours is None and (superseded or never_there):
            lines.append(f"{where}: does not exist, so the edit ends at {before.package}")
            break
        result, action = merge_entry(where, before, base, ours, theirs)
        tree.covered.add((part.number, name))
        if action != "unchanged":
            tree.pending[part.folder / name] = result
        lines.append(f"{where}: {action}")
        base, theirs = at_base, result
    return lines or [f"{first.package}/{name}: no later part to carry it to"]


def write(pending: dict[Path, Entry | None]) -> None:
    """Put every file beside its place, then move them all in: a full disk leaves the tree as it was."""
    ready: list[tuple[str, Path]] = []
    try:
        for path, entry in pending.items():
            if entry is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            ready.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(entry.content)
            os.chmod(name, entry.mode)
        while ready:
            os.replace(*ready[0])
            ready.pop(0)
    finally:
        for name, _ in ready:
            Path(name).unlink(missing_ok=True)
    for path, entry in pending.items():
        if entry is None:
            path.unlink()
