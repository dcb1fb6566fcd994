"""Server-sent events, as every part's server sends them."""

from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent

PING_SECONDS = 15
SEND_SECONDS = 60  # after which a client that does not read is taken as gone


class Nothing(ServerSentEvent):
    """Two empty lines: by the standard no event, and no part of one."""

    def encode(self) -> bytes:
        return b"\n\n"


class EventStream(EventSourceResponse):
    """A stream of events. Every 15 s it has two empty lines more, so that nobody between takes the
    connection as idle.

    Comments would do as well, and are usual. But `vllm bench serve` takes a comment that arrives by itself
    for the beginning of the next event, and loses all that follow.
    """

    def __init__(self, events: AsyncIterator[Any], ping: float = PING_SECONDS) -> None:
        """events: texts, or dicts of an event's fields. ping: seconds between two empty lines."""
        own = {"send_timeout": SEND_SECONDS, "ping_message_factory": Nothing}
        super().__init__(events, sep="\n", ping=ping, **own)
