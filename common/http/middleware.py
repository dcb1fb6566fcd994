"""What stands before the app and refuses by default.

Foreign hosts and origins (a page in the user's browser must not reach a server on their machine),
missing keys, and bodies that are too large, of too many values, or too slow. (How many requests
there is room for is `Admission`'s business, in `app.py`.)
"""

import asyncio
import hmac

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.http.errors import ApiError
from common.http.page import is_public
from common.http.run import ServerConfig

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_SECONDS = 60.0  # for a request's body to arrive
SIGNS = (b",", b":", b"[", b"{")  # each value of a JSON text comes after one
MAX_SIGNS = 300_000  # in one body; reading so many values stops the event loop for 0.1 s


def split_list(text: str) -> frozenset[str]:
    return frozenset(part.strip().lower() for part in text.split(",") if part.strip())


class Guard:
    """Refuses what must not reach the app, and hands bodies over whole."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.config = app, config
        self.hosts: frozenset[str] | None = None
        if config.allowed_hosts is not None:
            self.hosts = split_list(config.allowed_hosts)
        elif config.is_loopback:
            self.hosts = frozenset((*LOOPBACK, config.host.lower()))
        elif config.host not in ("0.0.0.0", "::", "[::]"):
            self.hosts = frozenset({config.host.lower(), f"[{config.host.lower().strip('[]')}]"})
        self.origins = split_list(config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # no WebSockets here: the handshake is refused
        try:
            self._check_headers(scope)
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                receive = await self._read_body(scope, receive)
        except ApiError as error:
            headers = {**error.headers, "Connection": "close"}
            response = JSONResponse(error.body(), error.status, headers)
            return await response(scope, receive, send)
        except ClientGone:
            return None
        await self.app(scope, receive, send)

    def _check_headers(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"authorization", b"content-length") and name in headers:
                raise ApiError(400, f"the header {name.decode()} is given twice")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(403, "this Host is not served here; see --allowed-hosts")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        own = origin.partition("://")[2] == host and origin.startswith(("http://", "https://"))
        if origin and not own and origin not in self.origins:
            raise ApiError(403, "requests from this Origin are refused; see --allowed-origins")
        if self.config.api_key is not None and not self._is_open(scope):
            scheme, space, key = headers.get(b"authorization", b"").partition(b" ")
            given = scheme.lower() + space + key  # a scheme has no case (RFC 9110, 11.1)
            if not hmac.compare_digest(given, b"bearer " + self.config.api_key.encode()):
                raise ApiError(
                    401,
                    "a valid API key is needed: 'Authorization: Bearer …'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        """What needs no key: health, and the page, which holds nothing secret."""
        path = scope["path"]
        return scope["method"] in ("GET", "HEAD") and (path == "/health" or is_public(path))

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body within limits of size and time; return a `receive` that has it."""
        limit = self.config.max_body_size
        too_large = ApiError(413, f"the request body is larger than {limit} bytes")
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > limit:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, f"the request body took more than {BODY_SECONDS:g} s") from None
        num_signs = sum(map(body.count, SIGNS))
        if num_signs > MAX_SIGNS:
            raise ApiError(
                413,
                f"the request body has {num_signs} commas, colons and open brackets; it may have"
                f" {MAX_SIGNS}",
            )
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        return receive_whole


class ClientGone(Exception):
    """The client closed the connection before its request was read."""
