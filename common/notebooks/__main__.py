"""Run the notebooks from the top and keep what they show: `python -m common.notebooks [NAME...]`.

Each notebook gets a fresh kernel of the interpreter that runs this, whatever kernels are registered
on the machine. Outputs are written back only when every cell has run, without timestamps, versions
or paths of the machine, so that a second run changes measured numbers and pictures, nothing else.
`--check` writes nothing and sets NOTEBOOK_FAST=1, which notebooks take as a wish for fewer repeats.
"""

import argparse
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
CELL_SECONDS = 300  # no cell is meant to need a tenth of it

# What no output may hold: the folders that absolute paths begin with on a Unix machine, and drives.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~<>/:])/(?:home|root|Users|tmp|private|work(?:space|spaces)?|var|usr|opt|mnt)(?:/|\b)"
    r"|\b[A-Z]:\\\\?\w"
)


class NotebookError(Exception):
    """A notebook that cannot be run to its end; the message is one line that names the cell."""


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter; no registered kernel is looked for."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        argv.append("--log-level=CRITICAL")  # a notebook's own errors come back as outputs
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def find(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The notebooks called for, all without names. A name is a file, its stem, or how it begins.

    Raises NotebookError.
    """
    present = sorted((folder or FOLDER).glob("*.ipynb"))
    if not names:
        return present
    found = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [path for path in present if path.stem == stem]
        matches = matches or [path for path in present if path.stem.startswith(stem)]
        if not matches:
            known = ", ".join(path.stem for path in present) or "none"
            raise NotebookError(f"no notebook {name!r}; there are: {known}")
        found += matches
    return list(dict.fromkeys(found))


def load(path: Path) -> NotebookNode:
    """Read a notebook. Raises NotebookError."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookError(f"{path.stem}: cannot be read: {error.strerror}") from None
    except Exception as error:
        raise NotebookError(f"{path.stem}: not a notebook: {one_line(error)}") from None
    return notebook


def execute(
    path: Path, fast: bool = False, progress: Callable[[str], None] = lambda line: None
) -> NotebookNode:
    """Run a notebook from the top; returns it with its outputs, cleaned. Nothing is written.

    fast: the short form, NOTEBOOK_FAST=1. progress: called with a line after each code cell.
    Raises NotebookError, and KeyboardInterrupt on SIGINT and SIGTERM.
    """
    notebook = load(path)
    total = len(notebook.cells)
    at = {"index": 0, "begin": 0.0}

    def on_start(cell: NotebookNode, cell_index: int, **_: Any) -> None:
        at.update(index=cell_index, begin=time.perf_counter())

    def on_end(cell: NotebookNode, cell_index: int, **_: Any) -> None:
        seconds = time.perf_counter() - at["begin"]
        progress(f"{path.stem}: cell {cell_index + 1} of {total}, {seconds:.1f} s")

    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="",
        kernel_manager_class=Kernel,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        on_cell_execute=on_start,
        on_cell_executed=on_end,
    )
    place = f"{path.stem}: cell"
    try:
        with tempfile.TemporaryDirectory() as profile:
            client.execute(env=kernel_environment(fast, profile))
    except CellExecutionError as error:
        problem = f"{error.ename}: {one_line(error.evalue)}"
        raise NotebookError(f"{place} {at['index'] + 1} of {total}: {problem}") from None
    except CellTimeoutError:
        problem = f"no end after {CELL_SECONDS} s"
        raise NotebookError(f"{place} {at['index'] + 1} of {total}: {problem}") from None
    except AssertionError:  # nbclient takes SIGINT and SIGTERM, and then misses its kernel
        raise KeyboardInterrupt from None
    except (DeadKernelError, RuntimeError) as error:
        problem = f"the kernel died: {one_line(error)}"
        raise NotebookError(f"{place} {at['index'] + 1} of {total}: {problem}") from None
    clean(notebook)
    problems = leaks(notebook)
    if problems:
        raise NotebookError(f"{path.stem}: {problems[0]}")
    return notebook


def kernel_environment(fast: bool, profile: str) -> dict[str, str]:
    """This process's environment, less what would make a notebook's outputs its user's own.

    The short form's numbers do not matter, its time does: its threads sleep while they wait, since
    spinning ones slow each other down manifold where other programs use the same cores.
    """
    unwanted = ("NOTEBOOK_FAST", "MPLBACKEND", "MATPLOTLIBRC", "PYTHONSTARTUP")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    if fast:
        env |= {"NOTEBOOK_FAST": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return env | {"IPYTHONDIR": profile}


def clean(notebook: NotebookNode) -> None:
    """Drop what differs from run to run without meaning anything, and say what code was run."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        executed_source=source_hash(notebook),
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            for holder, key in texts(output):
                holder[key] = scrub(holder[key])


def merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of one stream: where the kernel cut it is a matter of timing."""
    merged: list[NotebookNode] = []
    for output in outputs:
        name = output.get("name")  # only streams have one
        if name and merged and merged[-1].get("name") == name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def source_hash(notebook: NotebookNode) -> str:
    """A short hash of the code cells: outputs belong to exactly this code."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def texts(output: NotebookNode) -> Iterator[tuple[dict[str, Any], str]]:
    """Where an output holds text, as (dict, key); pictures are left out."""
    if output.output_type == "stream":
        yield output, "text"
    elif output.output_type in ("display_data", "execute_result"):
        for kind, value in output.data.items():
            if isinstance(value, str) and not kind.startswith("image/p"):
                yield output.data, kind


def scrub(text: str) -> str:
    """Text with this machine's folders written as anybody's."""
    names = {
        str(ROOT): ".",
        tempfile.gettempdir(): "tmp",
        sys.prefix: "venv",
        str(Path.home()): "~",
    }
    for folder in sorted(names, key=len, reverse=True):
        if len(Path(folder).parts) > 1:  # a home of `/` is not a name to look for
            text = re.sub(re.escape(folder) + r"(?![\w-])", names[folder], text)
    return text


def leaks(notebook: NotebookNode) -> list[str]:
    """Absolute paths in sources and outputs, one line each."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        held = [cell.source]
        for output in cell.get("outputs", []):
            held += [holder[key] for holder, key in texts(output)]
            held += output.get("traceback", [])
        for text in held:
            if match := ABSOLUTE_PATH.search(text):
                shown = text[match.start() : match.start() + 40].split("\n")[0]
                found.append(f"cell {number}: an absolute path: {shown!r}")
    return found


def save(notebook: NotebookNode, path: Path) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".ipynb.new")
    try:
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def one_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.notebooks",
        description="Run notebooks from the top in fresh kernels, and keep their outputs.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as part01; all without")
    parser.add_argument("--check", action="store_true", help="run the short form, write nothing")
    args = parser.parse_args(arguments)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that an interrupt leaves behind
    failed = False
    try:
        for path in find(args.names):
            begin = time.perf_counter()
            try:
                notebook = execute(path, args.check, lambda line: print(line, flush=True))
                if not args.check:
                    save(notebook, path)
            except NotebookError as error:
                failed = True
                print(f"error: {error}", file=sys.stderr)
                continue
            seconds = time.perf_counter() - begin
            print(f"{path.stem}: {'passed' if args.check else 'written'} in {seconds:.0f} s")
    except NotebookError as error:
        failed = True
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the notebook under way is as it was", file=sys.stderr)
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
