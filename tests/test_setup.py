"""What `make` installs: the lock, the ranges, and the list of packages agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import common
from common.testing.versions import differences, locked_versions

ROOT = Path(common.__file__).parents[1]
LOCKS = {"requirements.txt": (), "requirements-dev.txt": ("dev", "notebooks")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13")


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_what_the_ranges_ask_for(name: str, python: str) -> None:
    versions = locked_versions(ROOT / name, environment(python))
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in LOCKS[name]:
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if requirement.name in ("torch", "triton"):  # by themselves: see the Makefile
            continue
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_names_no_address_and_no_cuda(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for unwanted in ("://", "--", "@", "\ntorch==", "triton", "nvidia", "cuda", "file:"):
        assert unwanted not in text, unwanted


def test_what_the_makefile_pins_is_in_the_ranges() -> None:
    pins = re.findall(r"\b(torch|triton)==([0-9.]+)", (ROOT / "Makefile").read_text())
    assert {name for name, _ in pins} == {"torch", "triton"}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = map(Requirement, [*PROJECT["project"]["dependencies"], *extras["dev"]])
    ranges = {requirement.name: requirement.specifier for requirement in wanted}
    for name, version in pins:
        assert ranges[name].contains(version), f"{name}=={version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_engines_lock_is_part_of_the_tests_lock(python: str) -> None:
    small, large = (locked_versions(ROOT / name, environment(python)) for name in LOCKS)
    assert small.items() < large.items()


def test_differences_from_a_lock_are_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# a comment\npytest==0.1\nno-such-package==1.0\n"
        "numpy==0.0 ; python_full_version < '3.9'\n"
        f"pluggy=={__import__('pluggy').__version__}\n"
    )
    assert differences(lock) == [
        "no-such-package 1.0 -> not installed",
        f"pytest 0.1 -> {pytest.__version__}",
    ]


def test_every_folder_of_common_is_a_package() -> None:
    """Else an installed copy lacks it, and setuptools warns."""
    folders = {path.parent for path in (ROOT / "common").rglob("*") if path.suffix != ".pyc"}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    names = {name for name in names if "__pycache__" not in name}
    listed = {name for name in PROJECT["tool"]["setuptools"]["packages"] if name[:4] != "part"}
    assert names == listed
