"""Turns an output's text into calls, piece by piece as it is generated.

Each character is looked at once or twice, so 100 KB of hostile output takes as long as any 100 KB.
Nesting depth is counted, without recursion, and nothing is evaluated. Text that turns out not to be a
call is passed on as content, unchanged.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

from common.http.tools.formats import ToolFormat

WHITE = " \t\r\n"
LONGEST_NAME = 256
ARGUMENTS = ("arguments", "parameters")


class CallReader:
    """Reads one call's object, character by character.

    name: None until it is known. `take` gives the new part of the arguments: an object's text as it is
    written, or a string's contents.
    """

    def __init__(self) -> None:
        self.raw: list[str] = []
        self.name: str | None = None
        self.is_done = self.is_broken = False
        self._where = "start"
        self._key = ""
        self._value: list[str] = []  # the string or value being read
        self._new: list[str] = []  # the part of the arguments that `take` gives next
        self._depth = 0  # within a value
        self._in_string = self._is_escaped = False

    def take(self) -> str:
        new, self._new = "".join(self._new), []
        return new

    def push(self, character: str) -> None:
        """Read one character. Not to be called once the call is done or broken."""
        self.raw.append(character)
        if self._in_string or self._where == "value":
            self._read(character)
        elif character not in WHITE:
            self._step(character)

    def _step(self, character: str) -> None:
        """A character between two values."""
        match self._where, character:
            case "start", "{":
                self._where = "key"
            case "key", '"':
                self._in_string, self._value = True, [character]
            case "colon", ":":
                self._where, self._value = "value", []
            case "comma", ",":
                self._where = "key"
            case (("key" | "comma"), "}"):
                self.is_done = True
            case _:
                self.is_broken = True

    def _read(self, character: str) -> None:
        """A character in a string or a value."""
        if self._in_string:
            self._keep(character)
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                if self._depth == 0:
                    self._ended()
        elif self._depth == 0 and character in ",}":
            if self._value:
                self._ended()
            self._step(character) if not self.is_broken else None
        elif self._depth > 0 or self._value or character not in WHITE:
            self._keep(character)
            if character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._ended()

    def _keep(self, character: str) -> None:
        """Keep a character. Arguments that are an object are given out at once instead of being kept."""
        is_first = not self._value
        if is_first or self._key not in ARGUMENTS or self._value[0] != "{":
            self._value.append(character)
        if self._key in ARGUMENTS and self._where == "value" and self._value[0] == "{":
            self._new.append(character)

    def _ended(self) -> None:
        """A string or a value has ended."""
        text, was = "".join(self._value), self._where
        self._where = "colon" if was == "key" else "comma"
        if was == "value" and self._key in ARGUMENTS:
            if text.startswith("{"):
                return
            text = text if text.startswith('"') else '"{}"' if text.strip() == "null" else ""
        elif was == "value" and self._key != "name":
            return
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, str):
            self.is_broken = True
        elif was == "key":
            self._key = value
        elif self._key in ARGUMENTS:
            self._new.append(value.encode(errors="replace").decode())
        elif value.isprintable() and 0 < len(value) <= LONGEST_NAME:
            self.name = value
        else:
            self.is_broken = True


class ToolParser:
    """Follows one output. `push` and `end` give OpenAI's deltas, in order."""

    def __init__(self, shape: ToolFormat, names: Collection[str], is_parallel: bool) -> None:
        """names: of the tools. Where calls need no mark, an object with any other name is taken as an
        answer in JSON, and not as a call."""
        self.shape, self.names, self.is_parallel = shape, frozenset(names), is_parallel
        self.num_calls = 0
        self._mode: Callable[[str, int], int] = self._text if shape.is_marked else self._begin
        self._held = ""  # text that may be the beginning of a mark
        self._raw: list[str] = []  # text that is content if no call follows
        self._is_kept = True  # whether text around calls goes into `_raw`; not after the first
        self._space: list[str] = []  # white space that is content if content follows
        self._is_marked = shape.is_marked
        self._reader: CallReader | None = None
        self._is_open = False  # whether the reader's call was given out
        self._has_arguments = False  # whether some of its arguments were
        self._deltas: list[dict[str, Any]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        text, self._held = self._held + text, ""
        place = 0
        while place < len(text):
            place = self._mode(text, place)
        return self._take()

    def end(self) -> list[dict[str, Any]]:
        """The last deltas of an output. The beginning of a further, unfinished call is dropped."""
        if self._reader is not None and not self._is_open:
            self._raw += self._reader.raw
        if not self.num_calls:
            self._content("".join(self._raw) + self._held)
            if self._space:
                self._deltas.append({"content": "".join(self._space)})
        self._raw, self._held, self._space, self._reader = [], "", [], None
        return self._take()

    def _take(self) -> list[dict[str, Any]]:
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each mode reads a text from a place on, and returns the place where the next mode goes on.

    def _begin(self, text: str, place: int) -> int:
        """Only white space has come so far."""
        if text[place] in WHITE:
            self._raw.append(text[place])
            return place + 1
        if text[place] == "{" or (text[place] in self.shape.between and text[place] == "["):
            rest = text[place:]
            if rest != self.shape.begin and self.shape.begin.startswith(rest):
                self._held = rest
                return len(text)
            if not rest.startswith(self.shape.begin):
                self._mode = self._between
                return place
        self._content("".join(self._raw))
        self._raw, self._mode = [], self._text
        return place

    def _text(self, text: str, place: int) -> int:
        """Content, up to the mark."""
        mark = self.shape.begin
        found = text.find(mark, place)
        if found >= 0:
            self._content(text[place:found])
            self._raw, self._is_kept, self._is_marked = [mark], True, True
            self._mode = self._between
            return found + len(mark)
        size = suffix_size(text[place:], mark)
        self._content(text[place : len(text) - size])
        self._held = text[len(text) - size :]
        return len(text)

    def _between(self, text: str, place: int) -> int:
        """Before, between or after calls."""
        character, end = text[place], self.shape.end
        if character == "{":
            self._reader, self._is_open, self._mode = CallReader(), False, self._call
            return place
        if end and character == end[0]:
            rest = text[place : place + len(end)]
            if rest == end and not self._is_kept:
                self._mode = self._text
                return place + len(end)
            if rest != end and end.startswith(rest):
                self._held = rest
                return len(text)
        if character in WHITE or character in self.shape.between:
            if self._is_kept:
                self._raw.append(character)
            return place + 1
        self._content("".join(self._raw))
        self._raw, self._mode = [], self._text
        return place

    def _call(self, text: str, place: int) -> int:
        reader = self._reader
        assert reader is not None
        while place < len(text) and not (reader.is_done or reader.is_broken):
            reader.push(text[place])
            place += 1
        is_name = reader.name is not None and (self._is_marked or reader.name in self.names)
        if is_name and not self._is_open and not reader.is_broken:
            self._open(reader.name)
        if self._is_open and (new := reader.take()):
            self._add_arguments(new)
        if reader.is_done or reader.is_broken:
            self._reader = None
            if self._is_open:
                if not self._has_arguments and reader.is_done:
                    self._add_arguments("{}")
                self._mode = self._between if self.is_parallel else self._nothing
            else:
                self._content("".join(self._raw) + "".join(reader.raw))
                self._raw, self._mode = [], self._text
        return place

    def _nothing(self, text: str, place: int) -> int:
        """Drop everything after the only call."""
        return len(text)

    def _open(self, name: str | None) -> None:
        self._is_open, self._has_arguments, self._is_kept = True, False, False
        self._raw, self._space = [], []
        function = {"name": name, "arguments": ""}
        call = {"index": self.num_calls, "id": self.shape.new_id(), "type": "function"}
        self._deltas.append({"tool_calls": [call | {"function": function}]})
        self.num_calls += 1

    def _add_arguments(self, text: str) -> None:
        self._has_arguments = True
        call = {"index": self.num_calls - 1, "function": {"arguments": text}}
        self._deltas.append({"tool_calls": [call]})

    def _content(self, text: str) -> None:
        shown = text.rstrip(WHITE)
        if shown:
            self._deltas.append({"content": "".join([*self._space, shown])})
            self._space = []
        if len(shown) < len(text):
            self._space.append(text[len(shown) :])


def suffix_size(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def whole_message(parser: ToolParser, text: str) -> dict[str, Any]:
    """An output's message: its content, and its calls if there are any."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    pieces: list[list[str]] = []
    for delta in [*parser.push(text), *parser.end()]:
        content.append(delta.get("content", ""))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({name: call[name] for name in ("id", "type", "function")})
                pieces.append([])
            else:
                pieces[call["index"]].append(call["function"]["arguments"])
    for call, arguments in zip(calls, pieces, strict=True):
        call["function"]["arguments"] = "".join(arguments)
    shown = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": shown}
    return message | {"content": shown or None, "tool_calls": calls} if calls else message
