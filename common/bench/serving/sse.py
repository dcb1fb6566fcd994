"""Server-sent events, parsed as they come: bytes in, finished events out.

Chunk borders fall anywhere, inside a line, a CRLF or a UTF-8 character, so lines are cut as bytes
and decoded whole. The rules are the HTML standard's: CR, LF and CRLF end a line, an empty line
ends an event, lines of data are joined by a line feed, a line that starts with a colon is a
comment (servers send them to keep a connection open), an event without data is dropped.
"""

import re
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\r|\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Event:
    """One server-sent event. `name` is "message" unless the server named it."""

    data: str
    name: str = "message"


class SSEParser:
    """Feed it chunks in order; it returns the events that each chunk completes."""

    def __init__(self) -> None:
        self._line = b""  # the beginning of a line whose end has not come
        self._data: list[str] = []
        self._name = ""
        self._at_start = True
        self._after_cr = False  # the last chunk ended in CR: an LF that follows belongs to it

    def feed(self, chunk: bytes) -> list[Event]:
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
            if not chunk:
                return []
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._line = LINE_END.split(self._line + chunk)
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> Event | None:
        """Take one whole line; the event it ends, if it ends one."""
        if self._at_start:
            line = line.removeprefix(BYTE_ORDER_MARK)
            self._at_start = False
        if not line:
            event = Event("\n".join(self._data), self._name or "message") if self._data else None
            self._data, self._name = [], ""
            return event
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        return None
