"""What the subcommands' flags share, and what each does with its result."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.bench.core.report import render
from common.bench.core.results import Result, save_result

DEFAULT_MODEL = "smollm2-135m"
Item = TypeVar("Item")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is JSON, else as text."""
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:KEY=VALUE,KEY=VALUE,…: a name and fields of an EngineConfig, at least one."""
    name, _, pairs = text.partition(":")
    if not name.strip() or not pairs:
        raise argparse.ArgumentTypeError(f"must be NAME:KEY=VALUE,KEY=VALUE, not {text!r}")
    return name.strip(), dict(setting(pair) for pair in pairs.split(","))


def add_engine_arguments(parser: argparse.ArgumentParser, limits: bool = True) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    parser.add_argument(
        "--set",
        dest="settings",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the part's EngineConfig, such as device=cuda or max_num_seqs=32",
    )
    if limits:
        parser.add_argument(
            "--quick-limits", action="store_true", help="measure limits in a second"
        )
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(args.settings)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--title", help="the result's title")


def length_range(given: list[int] | None, fixed: int | None, default: int) -> tuple[int, int]:
    """(min, max) from a range, one length, or the default. Raises ValueError if min > max."""
    low, high = given or [fixed or default] * 2
    if low > high:
        raise ValueError(f"range {low} {high}: the minimum is above the maximum")
    return low, high


def finish(args: argparse.Namespace, result: Result) -> None:
    """Save the result where asked to and print its table."""
    if args.title:
        result["title"] = args.title
    if args.json:
        save_result(args.json, result)
    print(render(result))


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """The items, with a progress bar on standard error."""
    with progress_bar(len(items), label) as advance:
        for item in items:
            yield item
            advance(item)


@contextlib.contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[object], object]]:
    """A bar on standard error, where tqdm is installed and someone is looking; the function it
    gives advances it by one."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _: None
        return
    with tqdm(desc=label, total=total, file=sys.stderr, disable=None) as bar:
        yield lambda _: bar.update()
