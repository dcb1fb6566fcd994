"""Text that knows of each of its characters where it comes from.

A chat template writes special tokens, and a user's message may hold the text of one. After the
template has cut, joined and changed its texts, which is which? Each character carries a mark: OWN,
when the template's author wrote it, GIVEN, when it came in with a message. The marks are a string of
the same length, and what is done to the text is done to them.

Only the methods below carry marks. Any other operation gives a plain `str`, whose characters count
as UNKNOWN; nobody's text becomes the template's by it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

OWN, GIVEN, UNKNOWN = "o", "g", "?"


def marks_of(text: str) -> str:
    """A mark for each character."""
    return text._marks if isinstance(text, TracedText) else UNKNOWN * len(text)


def own(text: str) -> "TracedText":
    """A text of the template's author."""
    return TracedText(text, OWN * len(text))


def given(value: Any) -> Any:
    """A message's text, or everything in a list or an object of a message."""
    if isinstance(value, str):
        return TracedText(value, GIVEN * len(value))
    if isinstance(value, dict):
        return {name: given(item) for name, item in value.items()}
    return [given(item) for item in value] if isinstance(value, list | tuple) else value


class TracedText(str):
    """A `str` whose slices, joins and changes of case keep the marks of its characters."""

    __slots__ = ("_marks",)
    _marks: str

    def __new__(cls, text: str = "", marks: str | None = None) -> "TracedText":
        """marks: of each character; without them the text's own."""
        self = str.__new__(cls, text)
        self._marks = marks_of(text) if marks is None else marks
        return self

    def __str__(self) -> str:
        return self

    def _part(self, start: int, end: int) -> "TracedText":
        return TracedText(str.__getitem__(self, slice(start, end)), self._marks[start:end])

    def __getitem__(self, key: SupportsIndex | slice) -> "TracedText":  # type: ignore[override]
        return TracedText(super().__getitem__(key), self._marks[key])

    def __iter__(self) -> Iterator["TracedText"]:  # type: ignore[override]
        return map(TracedText, super().__iter__(), self._marks)

    def __add__(self, other: str) -> str:
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented  # jinja's Markup adds itself
        return TracedText(str.__add__(self, other), self._marks + marks_of(other))

    def __radd__(self, other: str) -> str:
        return TracedText(str.__add__(other, self), marks_of(other) + self._marks)

    def __mul__(self, number: SupportsIndex) -> "TracedText":  # type: ignore[override]
        return TracedText(super().__mul__(number), self._marks * number)  # type: ignore[operator]

    __rmul__ = __mul__

    def join(self, texts: Iterable[str]) -> "TracedText":  # type: ignore[override]
        texts = list(texts)
        return TracedText(super().join(texts), self._marks.join(map(marks_of, texts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:  # type: ignore[override]
        if not old:
            return super().replace(old, new, count)
        pieces = self.split(old, count)
        return TracedText(str.join(new, pieces), marks_of(new).join(map(marks_of, pieces)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._parts(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:  # type: ignore[override]
        return self._parts(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:  # type: ignore[override]
        lines = self._parts(super().splitlines(True), "")
        if keepends:
            return lines
        plain = super().splitlines()
        return [line[: len(text)] for line, text in zip(lines, plain, strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:  # type: ignore[override]
        return tuple(self._parts(super().partition(sep), ""))  # type: ignore[return-value]

    def rpartition(self, sep: str) -> tuple[str, str, str]:  # type: ignore[override]
        return tuple(self._parts(super().rpartition(sep), ""))  # type: ignore[return-value]

    def _parts(self, texts: Iterable[str], sep: str | None) -> list[str]:
        """These pieces of the text, in their order. sep: what stands between two of them; None for
        any white space."""
        parts: list[str] = []
        start = 0
        for text in texts:
            if sep is None:
                start = self.index(text, start)
            parts.append(self._part(start, start + len(text)))
            start += len(text) + len(sep or "")
        return parts

    def lstrip(self, chars: str | None = None) -> "TracedText":  # type: ignore[override]
        return self._part(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "TracedText":  # type: ignore[override]
        return self._part(0, len(super().rstrip(chars)))

    def strip(self, chars: str | None = None) -> "TracedText":  # type: ignore[override]
        return self.rstrip(chars).lstrip(chars)

    def removeprefix(self, prefix: str) -> "TracedText":  # type: ignore[override]
        return self._part(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> "TracedText":  # type: ignore[override]
        return self._part(0, len(super().removesuffix(suffix)))

    def _recased(self, text: str) -> str:
        """Letter by letter the same text; `ß` alone becomes two."""
        return TracedText(text, self._marks) if len(text) == len(self) else text

    def upper(self) -> str:  # type: ignore[override]
        return self._recased(super().upper())

    def lower(self) -> str:  # type: ignore[override]
        return self._recased(super().lower())

    def title(self) -> str:  # type: ignore[override]
        return self._recased(super().title())

    def capitalize(self) -> str:  # type: ignore[override]
        return self._recased(super().capitalize())

    def swapcase(self) -> str:  # type: ignore[override]
        return self._recased(super().swapcase())
