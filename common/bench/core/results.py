"""The file format of every measurement: a table, and all that is needed to judge and repeat it.

    {"format": 1, "title": ..., "columns": [{"key", "label", "unit", "digits"}], "rows": [{...}],
     "command": ..., "date": ..., "machine": {...}, "limits": {...}, "versions": {...},
     "code": {"part01": hash}, "notes": [...]}

A row has a value for every column: a number, a text, true or false, or null for what could not be
measured (a note says why). Rows and the file may hold more than the table shows. Any script that
calls `make_result` and `save_result` gets its table into a README.
"""

import contextlib
import datetime
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.bench.core.machine import machine, versions

FORMAT = 1
REQUIRED = {
    "title": str,
    "columns": list,
    "rows": list,
    "command": str,
    "date": str,
    "machine": dict,
    "limits": dict,
    "versions": dict,
    "code": dict,
    "notes": list,
}
COLUMN_TYPES = {"key": str, "label": str, "unit": str, "digits": int}

Result = dict[str, Any]


def column(key: str, label: str, unit: str = "", digits: int = 1) -> dict[str, Any]:
    """One column: the key in the rows, the heading, its unit, and decimals shown for numbers."""
    return {"key": key, "label": label, "unit": unit, "digits": digits}


def make_result(
    title: str,
    columns: Sequence[Mapping[str, Any]],
    rows: Iterable[Mapping[str, Any]],
    *,
    limits: Mapping[str, Any],
    parts: Iterable[int] = (),
    notes: Iterable[str] = (),
    command: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Result:
    """A result with this machine, now, these versions and the code of `parts` written into it.

    `limits` is what `measure_limits` returned, or {"unmeasured": reason}. `command` is this
    process's command line unless given. `extra` adds keys of your own (raw samples).
    Raises ValueError where the result would not load again.
    """
    result: Result = {
        "format": FORMAT,
        "title": title,
        "columns": [dict(entry) for entry in columns],
        "rows": [dict(row) for row in rows],
        "command": command or command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "limits": dict(limits),
        "versions": versions(),
        "code": code_hashes(parts),
        "notes": list(notes),
    }
    for key, value in (extra or {}).items():
        if key in result:
            raise ValueError(f"extra must not replace {key!r}")
        result[key] = value
    validate(result, "result")
    return result


def save_result(path: str | Path, result: Result) -> None:
    """Write a result as JSON: whole or not at all, so that a reader never sees half a file."""
    validate(result, str(path))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would travel into the repository
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_result(path: str | Path) -> Result:
    """Read and check a result. Raises ValueError that names the file and what is wrong in it."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    validate(result, str(path))
    return result


def validate(result: Any, where: str) -> None:
    """Raise ValueError, with the place, unless `result` keeps to the format."""
    if not isinstance(result, dict):
        raise ValueError(f"{where}: a result must be an object, not {type(result).__name__}")
    if result.get("format") != FORMAT:
        raise ValueError(f"{where}: format must be {FORMAT}, not {result.get('format')!r}")
    for key, kind in REQUIRED.items():
        if not isinstance(result.get(key), kind):
            found = type(result[key]).__name__ if key in result else "missing"
            raise ValueError(f"{where}: {key} must be a {kind.__name__}, but is {found}")
    keys = [validate_column(entry, where) for entry in result["columns"]]
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"{where}: columns must be at least one, with different keys: {keys}")
    for number, row in enumerate(result["rows"], start=1):
        validate_row(row, keys, f"{where}: row {number}")
    if not all(isinstance(note, str) for note in result["notes"]):
        raise ValueError(f"{where}: notes must be texts")


def validate_column(entry: Any, where: str) -> str:
    for key, kind in COLUMN_TYPES.items():
        if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
            raise ValueError(f"{where}: column {entry!r} lacks {key!r} ({kind.__name__})")
    if entry["digits"] < 0:
        raise ValueError(f"{where}: column {entry['key']!r} has digits {entry['digits']}")
    return entry["key"]


def validate_row(row: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, not {type(row).__name__}")
    for key in keys:
        if key not in row:
            raise ValueError(f"{where} has no {key!r}; write null for what was not measured")
        value = row[key]
        if value is not None and not isinstance(value, str | int | float | bool):
            raise ValueError(f"{where}: {key!r} must be a plain value, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {key!r} must be finite, not {value!r}")


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def code_hashes(parts: Iterable[int]) -> dict[str, str]:
    """The hash of each part's code, by which a table measured on older code is found."""
    try:
        from common.chapters.chain import code_hash
    except ImportError:
        return {}
    hashes = {}
    for part in parts:
        with contextlib.suppress(ValueError):  # no part of this repository
            hashes[f"part{part:02d}"] = code_hash(part)
    return hashes


def command_line() -> str:
    """This process's command line as one would type it, with paths relative to where one stands.

    Of a path that leads elsewhere the last three names are kept: the rest is this machine's own.
    """
    script, *arguments = sys.argv
    if script.endswith("__main__.py"):
        script = "-m common.bench"
    here = os.getcwd() + os.sep
    shown = [argument.removeprefix(here) for argument in arguments]
    shown = [os.sep.join(a.split(os.sep)[-3:]) if os.path.isabs(a) else a for a in shown]
    return f"python {script} {shlex.join(shown)}".rstrip()
