"""The notebooks run from the top, and what is committed is what their code showed when it ran."""

import ast
import functools
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from common.notebooks import __main__ as notebooks
from common.notebooks.__main__ import NotebookError
from common.testing.few_layers import few_layers

PATHS = notebooks.find()
MIN_IMAGES = {
    "part01_simple_server": 6,
    "part02_async_streaming": 6,
    "part03_paged_attention": 6,
    "part04_continuous_batching": 6,
}
MAX_BYTES = 2_000_000  # of a file, pictures included: a page that opens at once
ALLOWED = {"common", "numpy", "matplotlib", "torch", *sys.stdlib_module_names}

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
# In the short form run the first, two from the middle and the last three: a part's own code no longer
# changes once its notebook has run, and what the others import is looked up in any case.
SHORT = ("part01", "part04", "part08", *(path.stem[:6] for path in PATHS[-3:]))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


LAYERS = {"part09_tensor_parallel": 8}  # of the embedded model, where a cell looks into the last


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """The environment in which the embedded model has some of its 30 layers: every cell runs, and that
    nothing fails is what is looked at here. What the cells find out is in the committed files."""
    return functools.cache(lambda count: few_layers(tmp_path_factory.mktemp("models"), count))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem.startswith(SHORT) else pytest.mark.long)
        for path in PATHS
    ],
    ids=lambda path: path.stem,
)
@pytest.mark.timeout(120)
def test_runs_from_the_top(
    path: Path, small_model: Callable[[int], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    for name, value in small_model(LAYERS.get(path.stem, 4)).items():
        monkeypatch.setenv(name, value)
    notebook = notebooks.execute(path, fast=True)
    assert path.read_bytes() == before
    assert noise(notebook) == []
    assert notebooks.leaks(notebook) == []


def noise(notebook: nbformat.NotebookNode) -> list[str]:
    """Errors and warnings among the outputs."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.get('text') or output.get('evalue')}")
    return found


@every_notebook
def test_committed_file_is_one_whole_run(path: Path) -> None:
    notebook = notebooks.load(path)
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not run from the top in one go"
    assert notebook.metadata.get("executed_source") == notebooks.source_hash(notebook), (
        f"code was edited after it ran: python -m common.notebooks {path.stem}"
    )
    assert noise(notebook) == []
    assert notebooks.leaks(notebook) == []
    assert not any("execution" in cell.metadata for cell in cells), "timestamps"


@every_notebook
def test_committed_file_has_its_pictures(path: Path) -> None:
    outputs = [output for cell in code_cells(notebooks.load(path)) for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= MIN_IMAGES.get(path.stem, 1)
    assert path.stat().st_size < MAX_BYTES


@every_notebook
def test_imports_only_its_part_and_common(path: Path) -> None:
    """And what it imports is there."""
    own = path.stem.split("_")[0]
    imported = set()
    for cell in code_cells(notebooks.load(path)):
        source = cell.source
        assert not source.lstrip().startswith(("%", "!")), f"not plain Python: {source[:40]!r}"
        tree = compile(
            source, path.stem, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or ".")
                if (node.module or ".").split(".")[0] in (own, "common"):
                    assert all(is_there(node.module, alias.name) for alias in node.names), source
    roots = {name.split(".")[0] for name in imported}
    assert own in roots, f"does not import {own}"
    assert roots - ALLOWED - {own} == set()


def is_there(module: str, name: str) -> bool:
    """Whether `from module import name` would do."""
    found = importlib.import_module(module)
    return hasattr(found, name) or find_spec(f"{module}.{name}") is not None


def a_notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_an_error_names_notebook_and_cell_in_one_line(tmp_path: Path) -> None:
    path = a_notebook(tmp_path, "print(1)", "1 / 0", "print(2)")
    before = path.read_bytes()
    lines: list[str] = []
    with pytest.raises(NotebookError) as caught:
        notebooks.execute(path, progress=lines.append)
    assert str(caught.value) == "small: cell 2 of 3: ZeroDivisionError: division by zero"
    assert path.read_bytes() == before
    assert lines[0].startswith("small: cell 1 of 3, ")


def test_a_kernel_that_dies_is_an_error_not_a_hang(tmp_path: Path) -> None:
    path = a_notebook(tmp_path, "import os; os._exit(3)")
    with pytest.raises(NotebookError, match=r"small: cell 1 of 1: the kernel died: "):
        notebooks.execute(path)


def test_short_form_is_told_and_long_form_is_not_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    path = a_notebook(tmp_path, "import os; print(os.environ.get('NOTEBOOK_FAST'))")
    assert notebooks.execute(path, fast=True).cells[0].outputs[0].text == "1\n"
    assert notebooks.execute(path).cells[0].outputs[0].text == "None\n"


def test_outputs_are_the_same_from_run_to_run(tmp_path: Path) -> None:
    show = "import sys; print(1, flush=True); print(2); display({'text/plain': '3'}, raw=True)"
    path = a_notebook(tmp_path, show, "import os; print(os.path.expanduser('~/models'))")
    first = notebooks.execute(path)
    notebooks.save(first, path)
    notebooks.save(notebooks.execute(path), path)
    assert notebooks.load(path) == first
    assert first.cells[0].outputs[0].text == "1\n2\n"
    assert first.cells[1].outputs[0].text == "~/models\n"
    assert "version" not in first.metadata.language_info
    assert [item.name for item in tmp_path.iterdir()] == ["small.ipynb"]


@pytest.mark.parametrize(
    ("text", "leaking"),
    [
        ("saved in /home/someone/x", True),
        ("File '/tmp/ipykernel_12/3.py'", True),
        (r"C:\Users\someone", True),
        ("/work", True),
        ("12 tokens/s, 3 GB/s, and/or, 1/2", False),
        ("https://example.org/home/page", False),
        ("<td>ms/tmp</td></td>", False),
        ("~/models and ./notebooks/part01", False),
    ],
)
def test_what_counts_as_a_path_of_the_machine(text: str, leaking: bool) -> None:
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text=text)])
    assert bool(notebooks.leaks(nbformat.v4.new_notebook(cells=[cell]))) == leaking


def test_pictures_are_not_searched_for_paths() -> None:
    data = {"image/png": "AAAA /tmp/ AAAA"}
    output = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    assert notebooks.leaks(nbformat.v4.new_notebook(cells=[cell])) == []


def test_names(tmp_path: Path) -> None:
    for name in ("part01_one", "part02_two"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    stems = [path.stem for path in notebooks.find(["part02", "part01_one.ipynb"], tmp_path)]
    assert stems == ["part02_two", "part01_one"]
    assert len(notebooks.find([], tmp_path)) == 2
    with pytest.raises(NotebookError, match="no notebook 'part03'; there are: part01_one, part02"):
        notebooks.find(["part03"], tmp_path)
    with pytest.raises(NotebookError, match="part01_one: not a notebook: "):
        notebooks.load(tmp_path / "part01_one.ipynb")


def test_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    path = a_notebook(tmp_path, "print(1)")
    before = path.read_bytes()
    assert notebooks.main(["--check"]) == 0
    assert path.read_bytes() == before
    assert notebooks.main(["small"]) == 0
    assert json.loads(path.read_text())["cells"][0]["execution_count"] == 1
    assert notebooks.main(["nothing"]) == 1
    a_notebook(tmp_path, "1 / 0")
    assert notebooks.main([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: no notebook 'nothing'; there are: small",
        "error: small: cell 1 of 1: ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_leaves_the_file(tmp_path: Path, number: int) -> None:
    path = a_notebook(tmp_path, "print(1)", "import time; time.sleep(100)")
    before = path.read_bytes()
    code = (
        "import pathlib, sys; from common.notebooks import __main__ as notebooks;"
        f"notebooks.FOLDER = pathlib.Path({str(tmp_path)!r}); sys.exit(notebooks.main())"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("small: cell 1 of 2")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert errors == "interrupted; the notebook under way is as it was\n"
    assert process.returncode == 130
    assert path.read_bytes() == before
