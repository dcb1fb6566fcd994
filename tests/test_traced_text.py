"""Marks follow their characters through whatever is done to a text, or are given up."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.traced_text import GIVEN, OWN, UNKNOWN, TracedText, marks_of, own
from common.models.traced_text import given as from_message

LOWER, UPPER = "abcxyz éß\n", "ABCXYZ "


def traced(text: str) -> TracedText:
    """Small letters and all else are given, capitals are the template's; a mark is known by its
    letter as long as no case is changed."""
    return TracedText(text, "".join(OWN if c.isupper() else GIVEN for c in text))


def check(result: Any, plain: Any) -> None:
    """The same value as `str` gives, and each character with its mark, or with none."""
    assert result == plain
    if isinstance(plain, str):
        assert len(marks_of(result)) == len(plain)
        for character, mark in zip(str(result), marks_of(result), strict=True):
            right = OWN if character.isupper() else GIVEN
            assert mark in (right, UNKNOWN), (plain, marks_of(result))
    elif isinstance(plain, list | tuple):
        for part, plain_part in zip(result, plain, strict=True):
            check(part, plain_part)


TEXT = st.text(LOWER + UPPER, max_size=14)
SHORT = st.text(LOWER + UPPER, min_size=1, max_size=2)
NUMBER = st.integers(-3, 6)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "slice": lambda t, a, b, i, j: t[i:j],
    "step": lambda t, a, b, i, j: t[:: i or -1],
    "item": lambda t, a, b, i, j: t[i] if -len(t) <= i < len(t) else "",
    "letters": lambda t, a, b, i, j: list(t),
    "reversed": lambda t, a, b, i, j: list(reversed(t)),
    "add": lambda t, a, b, i, j: t + a + b,
    "times": lambda t, a, b, i, j: t * i + 2 * t,
    "join": lambda t, a, b, i, j: t.join([a, b, a]),
    "replace": lambda t, a, b, i, j: t.replace(a, b),
    "replace some": lambda t, a, b, i, j: t.replace(a, b, i),
    "replace nothing": lambda t, a, b, i, j: t.replace("", b),
    "split": lambda t, a, b, i, j: t.split(),
    "split some": lambda t, a, b, i, j: t.split(None, i),
    "split at": lambda t, a, b, i, j: t.split(a),
    "split at some": lambda t, a, b, i, j: t.split(a, j),
    "rsplit": lambda t, a, b, i, j: t.rsplit(None, i),
    "rsplit at": lambda t, a, b, i, j: t.rsplit(a, i),
    "lines": lambda t, a, b, i, j: t.splitlines(),
    "lines with ends": lambda t, a, b, i, j: t.splitlines(True),
    "partition": lambda t, a, b, i, j: t.partition(a),
    "rpartition": lambda t, a, b, i, j: t.rpartition(a),
    "strip": lambda t, a, b, i, j: t.strip(),
    "strip of": lambda t, a, b, i, j: t.strip(a + b),
    "lstrip": lambda t, a, b, i, j: t.lstrip(a),
    "rstrip": lambda t, a, b, i, j: t.rstrip(b),
    "removeprefix": lambda t, a, b, i, j: t.removeprefix(a),
    "removesuffix": lambda t, a, b, i, j: t.removesuffix(a),
    "center": lambda t, a, b, i, j: t.center(9),
    "format": lambda t, a, b, i, j: (t + "%s") % a,
    "str": lambda t, a, b, i, j: str(t),
}


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=100)
@given(text=TEXT, a=SHORT, b=SHORT, i=NUMBER, j=NUMBER)
def test_marks_stay_with_their_characters(
    name: str, text: str, a: str, b: str, i: int, j: int
) -> None:
    operation = OPERATIONS[name]
    plain = operation(text, a, b, i, j)
    check(operation(traced(text), traced(a), traced(b), i, j), plain)
    check(operation(traced(text), a, b, i, j), plain)
    check(operation(text, traced(a), traced(b), i, j), plain)


@settings(max_examples=200)
@given(text=st.text("abAB ßİŉ", max_size=8), marks=st.data())
def test_a_change_of_case(text: str, marks: st.DataObject) -> None:
    """Letter by letter, or marks are given up where a letter becomes two."""
    drawn = marks.draw(st.text(OWN + GIVEN, min_size=len(text), max_size=len(text)))
    for change in (str.upper, str.lower, str.title, str.capitalize, str.swapcase):
        result = getattr(TracedText(text, drawn), change.__name__)()
        assert result == change(text)
        expected = drawn if len(result) == len(text) else UNKNOWN * len(result)
        assert marks_of(result) == expected


def test_a_text_with_jinjas_markup() -> None:
    from markupsafe import Markup

    for left, right in ((own("<"), Markup("<b>")), (Markup("<b>"), own("<"))):
        plain = Markup.__add__(left, right) if isinstance(left, Markup) else "<" + Markup("<b>")
        assert left + right == plain
        assert OWN not in marks_of(left + right)


def test_errors_are_those_of_str() -> None:
    for wrong in (lambda t: t + 1, lambda t: t.join([1]), lambda t: t["a"], lambda t: t.split("")):
        with pytest.raises((TypeError, ValueError)) as plain:
            wrong("a")  # type: ignore[arg-type, no-untyped-call]
        with pytest.raises(plain.type):
            wrong(own("a"))  # type: ignore[no-untyped-call]


def test_everything_in_a_message_is_given() -> None:
    value = from_message({"a": ["b", {"c": "de"}], "f": 1, "g": None})
    assert value == {"a": ["b", {"c": "de"}], "f": 1, "g": None}
    assert marks_of(value["a"][0]) + marks_of(value["a"][1]["c"]) == GIVEN * 3
