"""The chain of parts as data: which folders exist, which files belong to them, what differs between neighbours.

`common.chapters` is the command line on top of this. A *chain file* is what part N+1 copies from part N: everything in a
part's folder except its README, results, notebooks, JSON and images, which belong to one part alone.
"""

import ast
import functools
import hashlib
import io
import os
import re
import subprocess
import tokenize
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

PART_FOLDER = re.compile(r"part(\d\d)_[a-z0-9_]+")
IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
JUNK = {
    "__pycache__",
    ".DS_Store",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
}
KINDS = ("changed", "deleted", "new")
TOUCH = re.compile(r"(\S+)(?: \((new|deleted)\))?")
HOOK_VARIABLES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR"}
FRONT_KEYS = {"part": int, "title": str, "touches": list, "needs": list}


class ChapterError(ValueError):
    """Something in the repository or on the command line is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class Part:
    number: int
    folder: Path

    @property
    def package(self) -> str:
        return f"part{self.number:02d}"

    def read_chain(self) -> dict[str, bytes]:
        """Chain file name (posix, relative to the folder) to content, sorted by name."""
        names = [name for name in list_files(self.folder) if is_chain_file(name)]
        return {
            name: (self.folder / name).read_bytes()
            for name in names
            if not (self.folder / name).is_symlink()
        }


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` as a sorted posix path; links to folders count as files and are not followed."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in JUNK and name not in links]
        found += [
            Path(where, name).relative_to(folder).as_posix()
            for name in files + links
            if name not in JUNK
        ]
    return sorted(found)


def is_chain_file(name: str) -> bool:
    """Whether `name`, relative to its part's folder, is carried from part to part."""
    path = Path(name)
    if name == "README.md" or path.parts[0] == "results":
        return False
    if any(piece.startswith(".") or piece in JUNK for piece in path.parts):
        return False
    return path.suffix.lower() not in {".ipynb", ".json", *IMAGES}


def find_parts(root: Path) -> list[Part]:
    """The parts below `root` by number. A folder that holds nothing but caches is no part."""
    parts: dict[int, Part] = {}
    for folder in sorted(root.iterdir()):
        match = PART_FOLDER.fullmatch(folder.name)
        if not match or not folder.is_dir() or not list_files(folder):
            continue
        number = int(match[1])
        if number in parts:
            raise ChapterError(
                f"two folders for part {number:02d}: {parts[number].folder.name} and {folder.name}"
            )
        parts[number] = Part(number, folder)
    if not parts:
        raise ChapterError(f"no part folders (partNN_name) in {root}")
    return [parts[number] for number in sorted(parts)]


def find_part(parts: list[Part], name: int | str) -> Part:
    """The part called `name`: 4, "4", "04", "part04" or its folder's name."""
    text = str(name)
    number = re.fullmatch(r"(?:part)?(\d{1,2})", text)
    for part in parts:
        if part.folder.name == text or (number and int(number[1]) == part.number):
            return part
    raise ChapterError(
        f"no such part: {text!r} (there are {parts[0].package} to {parts[-1].package})"
    )


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> dict[str, str]:
    """File name to "changed", "deleted" or "new"; files that are the same on both sides are left out."""
    kinds = {}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            kinds[name] = (
                "new" if name not in before else "deleted" if name not in after else "changed"
            )
    return kinds


def code_hash(part: int | str, root: Path = ROOT) -> str:
    """Twelve hex digits over names and contents of a part's chain files: which code a result was measured on."""
    return hash_chain(find_part(find_parts(root), part).read_chain())


def hash_chain(chain: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(chain.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def count_code_lines(path: Path | str) -> int:
    """Lines of a Python file that hold code: no blank lines, no comments, no docstrings."""
    return len(code_lines(Path(path).read_bytes(), str(path)))


@functools.cache
def code_lines(content: bytes, name: str) -> tuple[str, ...]:
    """The lines of a Python file that hold code, without the comments at their ends.

    name: the file's, for the error. Raises ChapterError where it is not valid Python.
    """
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise ChapterError(f"{name}: not valid Python ({error})") from None
    # A string that stands alone as a statement documents something, wherever it is.
    spans = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines: set[int] = set()
    comments: dict[int, int] = {}  # line -> the column where its comment begins
    encoding = "utf-8"
    for token in tokenize.tokenize(io.BytesIO(content).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.ENCODING:
            encoding = token.string
        if token.type == tokenize.COMMENT:
            comments[first] = token.start[1]
        inside = any(start <= first and last <= stop for start, stop in spans)
        documents = token.type == tokenize.STRING and inside
        if token.type not in silent and not documents:
            lines.update(range(first, last + 1))
    text = content.decode(encoding).split("\n")
    code = [text[line - 1][: comments.get(line)].rstrip() for line in sorted(lines)]
    return tuple(line for line in code if line)


def front_matter(part: Part) -> dict:
    """The YAML block a part's README opens with, its keys and their types checked."""
    readme = part.folder / "README.md"
    where = f"{part.folder.name}/README.md"
    if not readme.is_file():
        raise ChapterError(f"{where}: missing; a part opens with a README and its front matter")
    try:
        lines = readme.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ChapterError(f"{where}: not UTF-8 text") from None
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise ChapterError(f"{where}: must open with front matter between two lines of ---")
    try:
        fields = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise ChapterError(
            f"{where}: front matter is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(fields, dict) or fields.keys() != FRONT_KEYS.keys():
        given = ", ".join(map(str, fields)) if isinstance(fields, dict) else repr(fields)
        raise ChapterError(
            f"{where}: front matter needs exactly {', '.join(FRONT_KEYS)}; it has {given}"
        )
    for key, kind in FRONT_KEYS.items():
        if type(fields[key]) is not kind:
            raise ChapterError(f"{where}: {key} must be {kind.__name__}, not {fields[key]!r}")
    for key in ("touches", "needs"):
        if not all(isinstance(item, str) for item in fields[key]):
            raise ChapterError(f"{where}: {key} must hold plain strings, not {fields[key]!r}")
    return fields


def run_git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> tuple[int, bytes]:
    """Exit status and standard output of a git command run in `root`; any status outside `ok` is an error."""
    # A commit hook points git at its own repository and index; here the folder decides.
    environment = {key: value for key, value in os.environ.items() if key not in HOOK_VARIABLES}
    environment["LC_ALL"] = "C"
    try:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, env=environment
        )
    except FileNotFoundError:
        raise ChapterError("git is not installed or not on the PATH") from None
    if done.returncode not in ok:
        message = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        message = message.splitlines()[0].removeprefix("fatal: ").removeprefix("error: ")
        raise ChapterError(f"git: {message}")
    return done.returncode, done.stdout
