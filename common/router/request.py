"""A request as the router sees it: bytes to hand on, and the few fields that decide where to."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

PIECE_CHARACTERS, PIECE_TOKENS = 64, 16  # of a prompt as text, and as token ids

# What concerns one connection only (RFC 9110, 7.6.1), and what is between the client and the router.
NOT_FORWARDED = frozenset(
    (b"accept-encoding", b"authorization", b"connection", b"content-length", b"cookie", b"expect",
     b"host", b"keep-alive", b"origin", b"proxy-authorization", b"proxy-connection", b"referer",
     b"te", b"trailer", b"transfer-encoding", b"upgrade", b"x-kv-transfer")
)  # fmt: skip
NOT_RETURNED = frozenset(
    (b"connection", b"content-length", b"date", b"keep-alive", b"server", b"trailer",
     b"transfer-encoding", b"www-authenticate")
)  # fmt: skip


@dataclass
class RoutedRequest:
    """One request. target: path and query as the client wrote them. headers: names in lower case."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    added: dict[str, str] = field(default_factory=dict)  # headers of the router's own

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The JSON object of the body; empty where there is none: the replica will say so."""
        try:
            fields = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def pieces(self) -> Iterator[int]:
        """A hash for each piece of the prompt, over all that comes before it too.

        What follows the last whole piece has none. A prompt under another salt shares nothing, as in
        an engine's cache. Two prompts of one hash are possible: no more than a guess may rest on it.
        """
        prompt = self.fields.get("messages", self.fields.get("prompt"))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
            prompt = prompt[0]  # of several: they run on one engine
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            chat = (message for message in prompt if isinstance(message, dict))
            prompt = "\0".join(f"{m.get('role')}\0{m.get('content')}" for m in chat)
        if not isinstance(prompt, str | list):
            return
        size = PIECE_CHARACTERS if isinstance(prompt, str) else PIECE_TOKENS
        before = hash(str(self.fields.get("cache_salt")))
        for begin in range(0, len(prompt) - size + 1, size):
            before = hash((before, str(prompt[begin : begin + size])))
            yield before

    def header(self, name: bytes) -> str | None:
        return next((v.decode("latin-1") for n, v in self.headers if n == name), None)

    def forwarded_headers(self) -> list[tuple[str, str]]:
        """Those that a replica should see. It gets a key of the router's own."""
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.headers
            if name not in NOT_FORWARDED
        ]
        return [*kept, *self.added.items()]
