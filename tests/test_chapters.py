"""The chain's tool on throw-away chains: what it carries, what it refuses, and that it never writes half an edit."""

import itertools
import json
import os
import random
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chapters.__main__ import main
from common.chapters.chain import ROOT, code_hash, code_lines, count_code_lines

FOLDERS = ["part01_one", "part02_two", "part03_three", "part04_four", "part05_five"]

ENGINE = [f"line {number}\n" for number in range(30)]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True, env=environment
    ).stdout


def commit(root: Path, message: str = "state") -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", message)


def write(root: Path, name: str, text: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def with_lines(lines: dict[int, str]) -> str:
    return "".join(lines.get(number, line) for number, line in enumerate(ENGINE))


def front(number: int, touches: list[str], body: str = "") -> str:
    listed = "".join(f"\n  - {name}" for name in touches) or " []"
    return f"---\npart: {number}\ntitle: Part {number}\ntouches:{listed}\nneeds: []\n---\n\n# Part\n{body}"


def build(root: Path) -> Path:
    """Five parts: 3 changes engine.py and adds cache.py, 4 changes line 25 too, 5 deletes loop.py."""
    engines = [
        {},
        {},
        {10: "three\n"},
        {10: "three\n", 25: "four\n"},
        {10: "three\n", 25: "four\n"},
    ]
    for number, (folder, engine) in enumerate(zip(FOLDERS, engines, strict=True), start=1):
        text = '"""Doc."""\n' + "".join(
            f"# {line}" for line in with_lines(engine).splitlines(keepends=True)
        )
        write(root, f"{folder}/engine.py", text)
        if number < 5:
            write(root, f"{folder}/loop.py", "from .engine import x\n")
        if number >= 3:
            write(root, f"{folder}/cache.py", "import json\nsize = 1\n")
    touched = [
        ["engine.py (new)", "loop.py (new)"],
        [],
        ["engine.py", "cache.py (new)"],
        ["engine.py"],
        ["loop.py (deleted)"],
    ]
    for number, (folder, names) in enumerate(zip(FOLDERS, touched, strict=True), start=1):
        write(root, f"{folder}/README.md", front(number, names))
    packages = ", ".join(f'"{folder[:6]}"' for folder in FOLDERS)
    mapping = "".join(f'{folder[:6]} = "{folder}"\n' for folder in FOLDERS)
    write(
        root,
        "pyproject.toml",
        f'[tool.setuptools]\npackages = ["common", {packages}]\n[tool.setuptools.package-dir]\ncommon = "common"\n{mapping}',
    )
    write(root, "common/tool.py", "import json\n")
    git(root, "init", "-q", "-b", "main")
    commit(root)
    return root


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return build(tmp_path)


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def read(root: Path, name: str) -> str:
    number, file = name.split("/")
    return (root / FOLDERS[int(number) - 1] / file).read_bytes().decode()


def edit(root: Path, name: str, old: str, new: str) -> None:
    number, file = name.split("/")
    text = read(root, name)
    assert old in text
    write(root, f"{FOLDERS[int(number) - 1]}/{file}", text.replace(old, new))


# --- propagate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["part01/engine.py", "part01_one/engine.py", "./part01/engine.py"])
def test_clean_edit_reaches_every_part_and_keeps_their_own_changes(chain: Path, path: str) -> None:
    before = {n: read(chain, f"{n}/engine.py") for n in range(1, 6)}
    edit(chain, "1/engine.py", "# line 3\n", "# better\n# and longer\n")
    assert main(["propagate", path], root=chain) == 0
    for number in range(1, 6):
        expected = before[number].replace("# line 3\n", "# better\n# and longer\n")
        assert read(chain, f"{number}/engine.py") == expected
    assert "# three\n" in read(chain, "5/engine.py") and "# four\n" in read(chain, "5/engine.py")


def test_repeating_a_propagation_changes_nothing(chain: Path) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    once = snapshot(chain)
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    assert snapshot(chain) == once


def test_edits_of_parts_between_travel_too(chain: Path) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# first\n")
    edit(chain, "3/engine.py", "# line 20\n", "# third\n")
    assert main(["propagate", "--all"], root=chain) == 0
    assert "# third\n" not in read(chain, "2/engine.py")
    for number in (3, 4, 5):
        assert "# first\n" in read(chain, f"{number}/engine.py")
        assert "# third\n" in read(chain, f"{number}/engine.py")


def test_conflict_names_the_place_and_writes_nothing(chain: Path, capsys) -> None:
    edit(chain, "1/engine.py", "# line 10\n", "# other\n")
    edit(chain, "1/engine.py", "# line 2\n", "# added\n# line 2\n")  # moves the lines of part 3
    edit(chain, "1/loop.py", "x", "y")  # would go through, but all or nothing
    before = snapshot(chain)
    assert main(["propagate", "part01/engine.py", "part01/loop.py"], root=chain) == 1
    assert snapshot(chain) == before
    captured = capsys.readouterr()
    assert "conflict: part03/engine.py, line 12\n" in captured.err  # its docstring is line 1
    assert "    # three\n    =======\n    # other\n" in captured.err
    assert "--until 2" in captured.err and "nothing was written" in captured.err
    assert captured.out == ""


def test_a_conflict_is_passed_by_hand_with_until(chain: Path) -> None:
    edit(chain, "1/engine.py", "# line 10\n", "# other\n")
    assert main(["propagate", "part01/engine.py", "--until", "2"], root=chain) == 0
    assert "# other\n" in read(chain, "2/engine.py") and "# three\n" in read(chain, "3/engine.py")
    edit(chain, "3/engine.py", "# three\n", "# other three\n")
    assert main(["propagate", "part03/engine.py"], root=chain) == 0
    assert "# other three\n" in read(chain, "5/engine.py")


def test_new_file_is_copied_with_its_mode(chain: Path) -> None:
    write(chain, "part02_two/tool.sh", "#!/bin/sh\n").chmod(0o755)
    write(chain, "part04_four/tool.sh", "#!/bin/sh\n")
    assert main(["propagate", "part02/tool.sh"], root=chain) == 0
    assert not (chain / "part01_one/tool.sh").exists()
    for folder in FOLDERS[1:]:
        assert (chain / folder / "tool.sh").read_bytes() == b"#!/bin/sh\n"
    assert (chain / "part03_three/tool.sh").stat().st_mode & 0o777 == 0o755


def test_new_file_beside_another_of_that_name_is_an_error(chain: Path, capsys) -> None:
    write(chain, "part01_one/cache.py", "size = 2\n")
    before = snapshot(chain)
    assert main(["propagate", "part01/cache.py"], root=chain) == 1
    assert snapshot(chain) == before
    assert "part03/cache.py is another file" in capsys.readouterr().err


def test_deleted_file_goes_where_it_was_a_plain_copy(chain: Path, capsys) -> None:
    (chain / "part01_one/loop.py").unlink()
    assert main(["propagate", "part01/loop.py"], root=chain) == 0
    assert not list(chain.glob("*/loop.py"))
    assert "part05/loop.py: does not exist" in capsys.readouterr().out


def test_deleting_a_file_that_a_later_part_changed_is_an_error(chain: Path, capsys) -> None:
    (chain / "part01_one/engine.py").unlink()
    before = snapshot(chain)
    assert main(["propagate", "part01/engine.py"], root=chain) == 1
    assert snapshot(chain) == before
    assert "part03/engine.py has changes of its own" in capsys.readouterr().err


def test_a_superseded_file_ends_the_journey(chain: Path, capsys) -> None:
    edit(chain, "2/loop.py", "x", "y")
    assert main(["propagate", "part02/loop.py"], root=chain) == 0
    assert read(chain, "4/loop.py") == "from .engine import y\n"
    assert not (chain / "part05_five/loop.py").exists()
    assert "part05/loop.py: does not exist, so the edit ends at part04" in capsys.readouterr().out


def test_since_counts_committed_edits(chain: Path, capsys) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    commit(chain)
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    assert "nothing to carry" in capsys.readouterr().out
    assert "# better" not in read(chain, "2/engine.py")
    assert main(["propagate", "part01/engine.py", "--since", "HEAD~1"], root=chain) == 0
    assert "# better" in read(chain, "5/engine.py")


def test_default_on_a_branch_is_the_merge_base(chain: Path) -> None:
    git(chain, "checkout", "-qb", "fix")
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    commit(chain)
    git(chain, "branch", "-m", "main", "trunk")
    git(chain, "update-ref", "refs/remotes/origin/main", "trunk")  # a clone without a local main
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    assert "# better" in read(chain, "5/engine.py")


def test_an_edit_on_top_of_one_already_carried(chain: Path, capsys) -> None:
    git(chain, "checkout", "-qb", "fix")
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    commit(chain)
    edit(chain, "1/engine.py", "# better\n", "# best\n")
    assert main(["propagate", "part01/engine.py"], root=chain) == 1
    assert "try --since HEAD" in capsys.readouterr().err
    assert main(["propagate", "part01/engine.py", "--since", "HEAD"], root=chain) == 0
    assert "# best\n" in read(chain, "5/engine.py")


def test_an_uncommitted_new_part_takes_the_edit(chain: Path) -> None:
    for name in ("engine.py", "cache.py"):
        write(chain, f"part06_six/{name}", (chain / "part05_five" / name).read_bytes())
        write(chain, f"part07_seven/{name}", (chain / "part05_five" / name).read_bytes())
    path = chain / "part06_six/engine.py"
    path.write_text(path.read_text().replace("# line 20\n", "# six\n"))
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    assert "# better\n" in path.read_text() and "# six\n" in path.read_text()
    last = (chain / "part07_seven/engine.py").read_text()
    assert "# better\n" in last and "# six\n" not in last


def test_all_takes_every_changed_file(chain: Path, capsys) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    edit(chain, "3/cache.py", "size = 1", "size = 3")
    write(chain, "part02_two/extra.py", "new = 1\n")
    (chain / "part02_two/loop.py").unlink()
    write(chain, "part02_two/README.md", "not carried")
    assert main(["propagate", "--all"], root=chain) == 0
    assert "# better" in read(chain, "5/engine.py") and "size = 3" in read(chain, "5/cache.py")
    assert read(chain, "5/extra.py") == "new = 1\n"
    assert not (chain / "part04_four/loop.py").exists() and (chain / "part01_one/loop.py").exists()
    capsys.readouterr()
    commit(chain)
    assert main(["propagate", "--all"], root=chain) == 0
    assert "no chain file differs" in capsys.readouterr().out


def test_dry_run_says_it_and_writes_nothing(chain: Path, capsys) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    before = snapshot(chain)
    assert main(["propagate", "--dry-run", "part01/engine.py"], root=chain) == 0
    assert snapshot(chain) == before
    out = capsys.readouterr().out
    assert "part02/engine.py: as in part01\npart03/engine.py: merged\n" in out
    assert "4 files would be written" in out


def test_bytes_and_modes_survive(chain: Path) -> None:
    content = b"a\r\nb\r\n\xff\r\nd\r\ne\r\nf"  # CRLF, not UTF-8, no newline at the end
    for folder in FOLDERS:
        write(chain, f"{folder}/odd.txt", content).chmod(
            0o755 if folder == "part04_four" else 0o644
        )
    write(chain, "part03_three/odd.txt", content.replace(b"e\r\n", b"E\r\n"))
    commit(chain)
    write(chain, "part01_one/odd.txt", content.replace(b"a\r\n", b"A\r\n"))
    assert main(["propagate", "part01/odd.txt"], root=chain) == 0
    assert (chain / "part02_two/odd.txt").read_bytes() == b"A\r\nb\r\n\xff\r\nd\r\ne\r\nf"
    assert (chain / "part03_three/odd.txt").read_bytes() == b"A\r\nb\r\n\xff\r\nd\r\nE\r\nf"
    assert (chain / "part04_four/odd.txt").stat().st_mode & 0o777 == 0o755
    assert (chain / "part05_five/odd.txt").stat().st_mode & 0o777 == 0o644


def test_a_failing_disk_leaves_the_tree_as_it_was(chain: Path, capsys, monkeypatch) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    before = snapshot(chain)
    make, calls = tempfile.mkstemp, []

    def fail_at_third(**options: object) -> tuple[int, str]:
        calls.append(options)
        if len(calls) == 3:
            raise OSError("disk full")
        return make(**options)

    monkeypatch.setattr("common.chapters.propagate.tempfile.mkstemp", fail_at_third)
    assert main(["propagate", "part01/engine.py"], root=chain) == 1
    assert snapshot(chain) == before and "disk full" in capsys.readouterr().err


def test_a_commit_hooks_environment_does_not_mislead(chain: Path, monkeypatch) -> None:
    edit(chain, "1/engine.py", "# line 3\n", "# better\n")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert main(["propagate", "part01/engine.py"], root=chain) == 0
    assert "# better" in read(chain, "5/engine.py")


def test_works_in_a_subfolder_of_a_repository(tmp_path: Path) -> None:
    root = build(tmp_path / "inner")
    (root / ".git").rename(tmp_path / ".git")
    commit(tmp_path, "moved down")
    edit(root, "1/engine.py", "# line 3\n", "# better\n")
    assert main(["propagate", "--all"], root=root) == 0
    assert "# better" in read(root, "5/engine.py")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["propagate", "part09/engine.py"], "no such part: 'part09'"),
        (["propagate", "part00/engine.py"], "no such part"),
        (["propagate", "part01_wrong/engine.py"], "no such part"),
        (["propagate", "part01/nothing.py"], "no such file"),
        (["propagate", "part01"], "is no file of a part"),
        (["propagate", "common/tool.py"], "is no file of a part"),
        (["propagate", "/etc/hosts"], "lies outside"),
        (["propagate", "part01/../part02/engine.py"], "without '..'"),
        (["propagate", "part01/README.md"], "belongs to its part alone"),
        (["propagate", "part01/results/a.json"], "never merged"),
        (["propagate", "part01/folder"], "not a plain file"),
        (["propagate", "part01/binary.bin"], "is binary"),
        (["propagate", "part01/engine.py", "--since", "nowhere"], "no such revision"),
        (["propagate", "part01/engine.py", "--since", "--help"], "expected one argument"),
        (["propagate", "part01/engine.py", "--until", "77"], "no such part"),
        (["propagate"], "give either"),
        (["propagate", "--all", "part01/engine.py"], "give either"),
        (["diff", "0", "1"], "no such part: '0'"),
        (["diff", "1", "six"], "no such part: 'six'"),
        (["diff", "1"], "required"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(chain: Path, capsys, arguments: list[str], says: str) -> None:
    write(chain, "part01_one/binary.bin", b"\0\1\2")
    write(chain, "part01_one/folder/x.txt", "x")
    before = snapshot(chain)
    try:
        status = main(arguments, root=chain)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status not in (0, None)
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert says in captured.err
    assert captured.out == "" and snapshot(chain) == before


def test_without_git_history_or_parts(tmp_path: Path, capsys) -> None:
    assert main(["list"], root=tmp_path) == 1
    assert "no part folders" in capsys.readouterr().err
    write(tmp_path, "part01_one/engine.py", "x = 1\n")
    assert main(["propagate", "part01/engine.py"], root=tmp_path) == 1
    assert "not a git repository" in capsys.readouterr().err
    git(tmp_path, "init", "-q")
    assert main(["propagate", "part01/engine.py"], root=tmp_path) == 1
    assert "no commit" in capsys.readouterr().err
    write(tmp_path, "part01_two/engine.py", "x = 1\n")
    assert main(["list"], root=tmp_path) == 1
    assert "two folders for part 01" in capsys.readouterr().err


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_an_edit_leaves_the_step_between_parts_alone(seed: int, edited: int) -> None:
    """Techniques and edits in lines of their own: afterwards each part is its old self with the edit, nothing else."""
    random_ = random.Random(seed)
    slots = random_.sample(range(0, 30, 2), 12)
    edits = {slot: random_.choice(["", "edit\n", "edit\nmore\n"]) for slot in slots[:4]}
    techniques: dict[int, str] = {}
    models = []
    for number in range(1, 6):
        for slot in slots[4 + number : 5 + number + random_.randint(0, 1)]:
            techniques[slot] = random_.choice(["", f"part {number}\n", f"part {number}\nand\n"])
        models.append(dict(techniques))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder, model in zip(FOLDERS, models, strict=True):
            write(root, f"{folder}/engine.py", with_lines(model))
        git(root, "init", "-q", "-b", "main")
        commit(root)
        write(root, f"{FOLDERS[edited - 1]}/engine.py", with_lines(models[edited - 1] | edits))
        assert main(["propagate", f"part{edited:02d}/engine.py"], root=root) == 0
        for number, model in enumerate(models, start=1):
            expected = with_lines(model | edits if number >= edited else model)
            assert read(root, f"{number}/engine.py") == expected


# --- check -------------------------------------------------------------------------------------------------------


def test_check_passes_a_right_chain(chain: Path, capsys) -> None:
    write(chain, "part02_two/__pycache__/engine.pyc", b"\0")
    write(chain, "part02_two/results/speed.svg", "<svg/>")
    assert main(["check"], root=chain) == 0
    assert capsys.readouterr().out == "5 parts checked: 0 errors, 0 warnings\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("part02_two/engine.py", "import part01\n", "part02_two/engine.py:1: imports part01"),
        ("part02_two/engine.py", "def f():\n    from part01_one.engine import x\n", "engine.py:2: imports part01_one.engine"),
        ("part02_two/engine.py", "import_module('part01.engine')\n", "imports part01.engine"),
        ("part02_two/engine.py", "from ..part01_one import engine\n", "leaves the part"),
        ("part02_two/engine.py", "from part02.loop import x\n", "its own part02.loop"),
        ("part02_two/engine.py", "import part02_two.loop\n", "its own part02_two.loop"),
        ("part02_two/engine.py", "import loop\n", "write `.loop`"),
        ("part02_two/engine.py", "def (\n", "not valid Python"),
        ("common/tool.py", "from part03 import engine\n", "common/tool.py:1: imports part03"),
        ("part02_two/README.md", front(2, ["engine.py"]), "remove `- engine.py` from touches"),
        ("part03_three/README.md", front(3, ["engine.py", "cache.py"]), "add `- cache.py (new)` to touches"),
        ("part05_five/README.md", front(5, []), "add `- loop.py (deleted)` to touches"),
        ("part04_four/README.md", front(4, ["engine.py"] * 2), "'engine.py' twice"),
        ("part02_two/README.md", front(3, []), "part is 3"),
        ("part02_two/README.md", "# Two\n", "must open with front matter"),
        ("part02_two/README.md", "---\npart: 2\n", "must open with front matter"),
        ("part02_two/README.md", "---\npart: 2\n---\n", "needs exactly part, title, touches, needs"),
        ("part02_two/README.md", "---\n- [\n---\n", "not YAML"),
        ("part02_two/README.md", front(2, []).replace("part: 2", "part: two"), "part must be int"),
        ("part02_two/README.md", front(2, []).replace("needs: []", "needs: [1]"), "plain strings"),
        ("part02_two/README.md", front(2, []).replace("[]\n---", "['a b']\n---"), "no pip package"),
        ("part02_two/README.md", front(2, [], "<!-- table: results/no.json -->\n<!-- /table -->"), "results/no.json is missing"),
        ("part02_two/README.md", front(2, [], "<!-- table: results/no.json -->\n"), "has no <!-- /table -->"),
        ("part02_two/README.md", front(2, [], "<!-- /table -->\n"), "does not pair up"),
        ("part02_two/README.md", front(2, [], "<!-- table: ../a.json -->\n<!-- /table -->"), "a table's source is"),
        ("part02_two/walk.ipynb", "{}", "notebooks live in notebooks/"),
        ("part02_two/data.json", "{}", "belongs into part02_two/results/"),
        ("part02_two/.secret", "", "hidden files"),
        ("part02_two/weights.bin", b"\0\1", "not UTF-8 text"),
        ("part02_two/sub/module.py", "", "one flat package"),
        ("part02_two/results/run.log", "", "JSON and images"),
        ("part06_six/README.md", front(6, []), 'add "part06" to packages'),
        ("part06_six/README.md", front(6, []), 'part06 = "part06_six"'),
        ("part07_seven/README.md", front(7, []), "part 06 is missing"),
        ("part2_two/engine.py", "", "rename it to partNN_name"),
        ("pyproject.toml", "", "pyproject.toml: needs"),
    ],
)  # fmt: skip
def test_check_finds(chain: Path, capsys, name: str, text: str | bytes, says: str) -> None:
    write(chain, name, text)
    assert main(["check"], root=chain) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert any(says in line for line in errors), errors


def test_check_finds_a_missing_readme_and_a_package_without_folder(chain: Path, capsys) -> None:
    (chain / "part02_two/README.md").unlink()
    (chain / "part05_five").rename(chain / "gone")
    assert main(["check"], root=chain) == 1
    out = capsys.readouterr().out
    assert "part02_two/README.md: missing" in out and "part05 has no folder" in out


def test_a_link_in_a_part_is_an_error(chain: Path, capsys) -> None:
    (chain / "part02_two/link.py").symlink_to(chain / "common/tool.py")
    assert main(["check"], root=chain) == 1
    assert "part02_two/link.py: is a link" in capsys.readouterr().out


def test_stale_tables_are_a_warning(chain: Path, capsys) -> None:
    body = "<!-- table: results/speed.json --rows all -->\n| a |\n<!-- /table -->\n"
    body += "```\n<!-- table: results/example.json -->\n```\n"
    write(chain, "part02_two/README.md", front(2, [], body))
    result = {"code": {"part01": code_hash(1, chain), "part02": code_hash("part02", chain)}}
    path = write(chain, "part02_two/results/speed.json", json.dumps(result))
    assert main(["check"], root=chain) == 0
    assert "0 warnings" in capsys.readouterr().out
    edit(chain, "1/loop.py", "import x", "import x, y")
    edit(chain, "2/loop.py", "import x", "import x, y")
    write(chain, "part03_three/README.md", front(3, ["engine.py", "loop.py", "cache.py (new)"]))
    assert main(["check"], root=chain) == 0
    out = capsys.readouterr().out
    assert "warning: part02_two/README.md: stale table: results/speed.json" in out
    assert f"part01 was {result['code']['part01']}, is {code_hash(1, chain)}" in out
    assert main(["check", "--quiet"], root=chain) == 0
    quiet = capsys.readouterr().out
    assert "0 errors, 1 warnings" in quiet and "stale table" not in quiet
    for text in ("[]", "{", "{}", '{"code": []}'):
        path.write_text(text)
        assert main(["check"], root=chain) == 1
        assert "measure it again" in capsys.readouterr().out


def test_code_hash_sees_names_and_contents_of_chain_files_only(chain: Path) -> None:
    start = code_hash(2, chain)
    assert start == code_hash("part02_two", chain) and len(start) == 12
    assert start == code_hash(1, chain) != code_hash(3, chain)
    write(chain, "part02_two/README.md", "other")
    write(chain, "part02_two/results/x.json", "{}")
    assert code_hash(2, chain) == start
    (chain / "part02_two/loop.py").rename(chain / "part02_two/hoop.py")
    assert code_hash(2, chain) != start


# --- diff, list, lines -------------------------------------------------------------------------------------------


def test_diff_shows_changed_then_deleted_then_new(chain: Path, capsys) -> None:
    assert main(["diff", "1", "5"], root=chain) == 0
    out = capsys.readouterr().out
    headers = [line for line in out.splitlines() if line.startswith("diff --git")]
    assert [header.split("/")[-1] for header in headers] == ["engine.py", "loop.py", "cache.py"]
    assert "-# line 10\n+# three\n" in out and "+size = 1\n" in out and "README" not in out
    assert "\x1b[" not in out
    assert main(["diff", "part01", "part05_five", "--all", "--color", "always"], root=chain) == 0
    out = capsys.readouterr().out
    assert "README.md" in out and "\x1b[" in out


def test_diff_stat_counts(chain: Path, capsys) -> None:
    write(chain, "part05_five/__init__.py", "")
    assert main(["diff", "1", "5", "--stat"], root=chain) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["engine.py", "+2", "-2"],
        ["loop.py", "(deleted)", "+0", "-1"],
        ["cache.py", "(new)", "+2", "-0"],
        ["__init__.py", "(new)", "+0", "-0"],
        ["total,", "4", "files", "+4", "-3"],
    ]
    assert main(["diff", "1", "2"], root=chain) == 0
    assert "have the same files" in capsys.readouterr().out


def test_list(chain: Path, capsys) -> None:
    write(chain, "part02_two/README.md", "no front matter")
    assert main(["list"], root=chain) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["01", "Part", "1", "1"]
    assert rows[2][1] == "(part02_two:"
    # Part 3 rewrites a comment and has a new file of two lines; part 5 drops one line of code.
    assert rows[3] == ["03", "Part", "3", "3", "+2", "-0", "+3", "-1"]
    assert rows[4] == ["04", "Part", "4", "3", "+0", "-0", "+1", "-1"]
    assert rows[5] == ["05", "Part", "5", "2", "+0", "-1", "+0", "-1"]


def steps(root: Path, capsys) -> dict[str, tuple[int, list[str]]]:
    """Of each part: its lines of code, and its step as `list` shows it: code and all lines."""
    capsys.readouterr()
    assert main(["list"], root=root) == 0
    header, *rows, footer = capsys.readouterr().out.splitlines()
    assert header.split() == ["part", "title", "code", "+code", "-code", "+lines", "-lines"]
    assert footer.startswith("code: lines of Python") and "lines: all, as in diff" in footer
    values = {}
    for row in rows:
        size, *step = row[40:].split()
        values[row[:2]] = int(size), step
    return values


BEFORE = '''\
"""About it."""

import os


class Pool:
    """Blocks."""

    size: int = 1  # of one

    def take(self, count: int) -> str:
        """Some of them."""
        return """one

        two"""
'''


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        ('"""Blocks."""', '"""Blocks,\n    and more.\n    """', ["+0", "-0", "+3", "-1"]),
        ("  # of one", "  # of all of them", ["+0", "-0", "+1", "-1"]),
        ("  # of one", "", ["+0", "-0", "+1", "-1"]),
        ("import os\n", "import os\n\n# Why.\n", ["+0", "-0", "+2", "-0"]),
        ("size: int = 1", "size: int = 2", ["+1", "-1", "+1", "-1"]),
        ("import os", "import os\nimport re", ["+1", "-0", "+1", "-0"]),
        ("        two", "        2  # no comment", ["+1", "-1", "+1", "-1"]),  # text of a string
        ("    def take", "    @staticmethod\n    def take", ["+1", "-0", "+1", "-0"]),
        ("import os\n\n\n", "", ["+0", "-1", "+0", "-3"]),
    ],
)
def test_a_step_in_code_and_in_all_lines(
    chain: Path, capsys, old: str, new: str, step: list[str]
) -> None:
    """Code is what is left without blank lines, comments and docstrings."""
    for folder in FOLDERS:
        write(chain, f"{folder}/pool.py", BEFORE)
    before = steps(chain, capsys)
    assert old in BEFORE
    for folder in FOLDERS[1:]:
        write(chain, f"{folder}/pool.py", BEFORE.replace(old, new, 1))
    after = steps(chain, capsys)
    assert after["02"][1] == step
    assert after.keys() == before.keys()
    assert [after[number][1] for number in ("03", "04", "05")] == [
        before[number][1] for number in ("03", "04", "05")
    ]


def test_files_that_move_and_files_that_are_no_python(chain: Path, capsys) -> None:
    """A file under another name is deleted and new; what is no Python is no code."""
    write(chain, "part01_one/deep/a.py", "x = 1\ny = 2\n")
    for folder in FOLDERS[1:]:
        write(chain, f"{folder}/b.py", "x = 1\ny = 2\n")
        write(chain, f"{folder}/page.html", "<p>\n<p>\n<p>\n")
        write(chain, f"{folder}/nothing.py", "# nothing\n")
    assert steps(chain, capsys)["02"][1] == ["+2", "-2", "+6", "-2"]
    write(chain, "part02_two/b.py", "def (")
    assert main(["list"], root=chain) == 1
    assert "part02_two/b.py: not valid Python" in capsys.readouterr().err


def test_the_steps_add_up_to_the_sizes(capsys) -> None:
    """Of this repository: a part has the code of the part before, plus its step, minus it."""
    sizes = list(steps(ROOT, capsys).values())
    assert len(sizes) > 1 and sizes[0][1] == []
    for (before, _), (after, (added, deleted, *_)) in itertools.pairwise(sizes):
        assert after == before + int(added) + int(deleted)


def test_count_code_lines(tmp_path: Path) -> None:
    code = '''\
        """A module's
        docstring."""

        # a comment
        import os  # counts


        class A:
            """Docstring."""

            x: int = 1
            """About x."""

            def f(self) -> str:
                """Doc
                over lines.
                """
                return """one

                two"""


        y = (
            1,
        ); "no code either"
        '''
    path = write(tmp_path, "a.py", textwrap.dedent(code))
    # import, class, x, def, return with its two lines of text, y with its three
    assert count_code_lines(path) == 9
    assert count_code_lines(write(tmp_path, "b.py", "")) == 0
    crlf = "\ufeff" + textwrap.dedent(code).replace("\n", "\r\n")
    assert count_code_lines(write(tmp_path, "d.py", crlf)) == 9
    latin = "# coding: latin-1\nx = 'é'  # é\n"
    assert code_lines(latin.encode("latin-1"), "e.py") == ("x = 'é'",)
    with pytest.raises(ValueError, match=r"c\.py: not valid Python"):
        count_code_lines(write(tmp_path, "c.py", "def ("))


def test_the_repository_itself_passes(capsys) -> None:
    if not list(ROOT.glob("part01_*/README.md")):
        pytest.skip("no part has been written yet")
    status = main(["check"])
    assert status == 0, capsys.readouterr().out
