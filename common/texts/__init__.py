"""Texts to calibrate on and to measure with; the two share no passage.

calibration.txt: "The Time Machine" by H. G. Wells (1895), chapters I to IV; prose and code of this
repository; sums. evaluation.txt: "Alice's Adventures in Wonderland" by Lewis Carroll (1865), from
chapter I; "The Time Machine", from chapter VI; other prose and code of this repository; other sums.
Both books are in the public domain, and stand here as Project Gutenberg's volunteers typed them
(numbers 35 and 11), without its headers. questions.json: written for this repository.

A section begins with a line `=== name`, which is no part of it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
CALIBRATION, EVALUATION = FOLDER / "calibration.txt", FOLDER / "evaluation.txt"
QUESTIONS = FOLDER / "questions.json"


def sections(path: Path) -> dict[str, str]:
    """{name: text} of a file. A file without such lines is one section of its own name.

    Raises ValueError where it cannot be read or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"text {path}: {reason}") from None
    found: dict[str, str] = {}
    name = path.stem
    for line in text.splitlines(keepends=True):
        if line.startswith("=== "):
            name = line[4:].strip()
        else:
            found[name] = found.get(name, "") + line
    found = {name: text.strip("\n") + "\n" for name, text in found.items() if text.strip()}
    if not found:
        raise ValueError(f"text {path}: there is no text in it")
    return found
