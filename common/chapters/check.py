"""What must hold along the chain; `python -m common.chapters check` prints it and `make test` runs it.

Every check returns lines that name the file and what to do about it. Only stale tables are warnings: a result that was
measured before the last edit is old, not wrong, and measuring takes longer than a test run may.
"""

import json
import re
import tomllib
from pathlib import Path

from common.chapters.chain import (
    IMAGES,
    PART_FOLDER,
    TOUCH,
    ChapterError,
    Part,
    changes,
    find_parts,
    front_matter,
    hash_chain,
    list_files,
)
from common.chapters.imports import PART_NAME, check_common, check_imports

TABLE = re.compile(r"<!--\s*table:\s*(\S+?)(?:\s[^\n]*?)?-->|<!--\s*(/table)\s*-->")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def check(root: Path) -> tuple[list[str], list[str]]:
    """(errors, warnings) over the whole repository."""
    parts = find_parts(root)
    errors = check_folders(root, parts) + check_packaging(root, parts) + check_common(root)
    warnings: list[str] = []
    chains = [part.read_chain() for part in parts]
    hashes = {part.package: hash_chain(chain) for part, chain in zip(parts, chains, strict=True)}
    before: dict[str, bytes] = {}
    for part, chain in zip(parts, chains, strict=True):
        errors += check_front_matter(part, changes(before, chain))
        errors += check_contents(part, chain)
        errors += check_imports(part, chain)
        wrong, stale = check_tables(part, hashes)
        errors += wrong
        warnings += stale
        before = chain
    return errors, warnings


def check_folders(root: Path, parts: list[Part]) -> list[str]:
    errors = []
    for number, part in enumerate(parts, start=1):
        if part.number != number:
            errors.append(
                f"{part.folder.name}: part {number:02d} is missing before it; the chain has no gaps"
            )
            break
    for folder in sorted(root.glob("part*")):
        if folder.is_dir() and not PART_FOLDER.fullmatch(folder.name):
            errors.append(
                f"{folder.name}: rename it to partNN_name, in small letters, or move it away"
            )
    return errors


def check_front_matter(part: Part, difference: dict[str, str]) -> list[str]:
    """The README's `part` and `touches` against the folder's number and its real difference to the part before."""
    where = f"{part.folder.name}/README.md"
    try:
        fields = front_matter(part)
    except ChapterError as error:
        return [str(error)]
    errors = []
    if fields["part"] != part.number:
        errors.append(f"{where}: part is {fields['part']}, the folder says {part.number}")
    if not fields["title"].strip():
        errors.append(f"{where}: title is empty")
    for name in fields["needs"]:
        if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*(\[[\w,\- ]+\])?([<>=!~].*)?", name):
            errors.append(f"{where}: needs has {name!r}, which is no pip package")
    claimed = []
    for item in fields["touches"]:
        match = TOUCH.fullmatch(item)
        if not match:
            errors.append(
                f"{where}: touches has {item!r}; write `name`, `name (new)` or `name (deleted)`"
            )
            continue
        claimed.append(item)
    real = [name if kind == "changed" else f"{name} ({kind})" for name, kind in difference.items()]
    for item in sorted(set(real) - set(claimed)):
        errors.append(f"{where}: add `- {item}` to touches")
    for item in sorted(set(claimed) - set(real)):
        errors.append(
            f"{where}: remove `- {item}` from touches; that is not what differs from the part before"
        )
    for item in sorted({item for item in claimed if claimed.count(item) > 1}):
        errors.append(f"{where}: touches has {item!r} twice")
    return errors


def check_contents(part: Part, chain: dict[str, bytes]) -> list[str]:
    """A part's folder holds text files of the chain, one README, images, and JSON under results/; nothing else."""
    errors = []
    for name in list_files(part.folder):
        where, path = f"{part.folder.name}/{name}", Path(name)
        suffix = path.suffix.lower()
        if (part.folder / name).is_symlink():
            errors.append(f"{where}: is a link; put a plain file there")
        elif any(piece.startswith(".") for piece in path.parts):
            errors.append(f"{where}: hidden files have no place in a part; remove it")
        elif suffix == ".ipynb":
            errors.append(f"{where}: notebooks live in notebooks/; move it there")
        elif path.parts[0] == "results":
            if suffix not in {".json", *IMAGES}:
                errors.append(f"{where}: results/ holds JSON and images; move or remove it")
        elif suffix == ".json" and path.parts[0] != "monitoring":  # where dashboards are
            errors.append(f"{where}: JSON belongs into {part.folder.name}/results/; move it there")
        elif path.name != "README.md" and suffix == ".md":
            errors.append(f"{where}: a part has one text, its README.md; move the words there")
        elif name in chain and not is_text(chain[name]):
            errors.append(
                f"{where}: is not UTF-8 text; parts hold source, README.md, images and results/*.json only"
            )
        elif suffix == ".py" and len(path.parts) > 1:
            errors.append(
                f"{where}: a part is one flat package; move it up into {part.folder.name}/"
            )
    return errors


def is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def check_tables(part: Part, hashes: dict[str, str]) -> tuple[list[str], list[str]]:
    """(errors, warnings) about the generated tables in a part's README and the results they were made from."""
    where = f"{part.folder.name}/README.md"
    readme = part.folder / "README.md"
    if not readme.is_file():
        return [], []  # check_front_matter has said so
    text = FENCE.sub("", readme.read_text(encoding="utf-8", errors="replace"))
    errors, warnings, is_open = [], [], ""
    for match in TABLE.finditer(text):
        source = match[1] or ""
        if bool(is_open) != bool(match[2]):
            errors.append(
                f"{where}: {match[0]} does not pair up; a table ends with <!-- /table -->"
            )
        is_open = source
        if source:
            wrong, stale = check_result(part, source, hashes)
            errors += [f"{where}: {line}" for line in wrong]
            warnings += [f"{where}: {line}" for line in stale]
    if is_open:
        errors.append(f"{where}: the table of {is_open} has no <!-- /table -->")
    return errors, warnings


def check_result(part: Part, source: str, hashes: dict[str, str]) -> tuple[list[str], list[str]]:
    if not re.fullmatch(r"results/[\w.\-]+\.json", source):
        return [f"a table's source is results/NAME.json in the part's folder, not {source}"], []
    try:
        code = json.loads((part.folder / source).read_bytes()).get("code")
    except FileNotFoundError:
        return [f"{source} is missing; measure it or remove the table"], []
    except (ValueError, AttributeError):
        return [f"{source} is not a JSON object; measure it again"], []
    if not isinstance(code, dict):  # empty when only other engines were measured
        return [f'{source} has no "code" (part to code hash); measure it again'], []
    stale = [
        f"{name} was {measured}, is {hashes.get(name, 'gone')}"
        for name, measured in sorted(code.items())
        if hashes.get(name) != measured
    ]
    return [], [
        f"stale table: {source} was measured on other code ({'; '.join(stale)})"
    ] if stale else []


def check_packaging(root: Path, parts: list[Part]) -> list[str]:
    """pyproject.toml lists every part, and maps its import name to its folder."""
    try:
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
            "setuptools"
        ]
        packages, folders = list(settings["packages"]), dict(settings["package-dir"])
    except FileNotFoundError:
        return ["pyproject.toml: missing"]
    except (KeyError, TypeError, ValueError) as error:
        return [f"pyproject.toml: needs [tool.setuptools] packages and package-dir ({error!r})"]
    errors = []
    for part in parts:
        if part.package not in packages:
            errors.append(f'pyproject.toml: add "{part.package}" to packages')
        if folders.get(part.package) != part.folder.name:
            errors.append(
                f'pyproject.toml: package-dir needs {part.package} = "{part.folder.name}"'
            )
    real = {part.package for part in parts}
    for name in sorted(set(packages) | set(folders)):
        if PART_NAME.fullmatch(name) and name not in real:
            errors.append(
                f"pyproject.toml: {name} has no folder {name}_...; remove it from packages and package-dir"
            )
    return errors
