"""Which packages of this environment are other than the lock's: `python -m common.testing.versions LOCK`.

`make test-newest` ends with it, so that a failure stands beside what may have caused it.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def locked_versions(path: Path, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The lock's version of each package, for this Python and platform (or the ones given)."""
    versions = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            [pin] = requirement.specifier
            assert pin.operator == "==", f"{path}: {line!r} is no pin"
            versions[requirement.name] = pin.version
    return versions


def differences(path: Path) -> list[str]:
    """A line for each package that is not the lock's: its name, the lock's version, and ours."""
    lines = []
    for name, version in sorted(locked_versions(path).items()):
        try:
            ours = metadata.version(name)
        except metadata.PackageNotFoundError:
            ours = "not installed"
        if ours != version:
            lines.append(f"{name} {version} -> {ours}")
    return lines


if __name__ == "__main__":
    lines = differences(Path(sys.argv[1]))
    print(f"== {len(lines)} packages are other than in {sys.argv[1]}", *lines, sep="\n   ")
