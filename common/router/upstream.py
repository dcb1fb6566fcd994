"""HTTP to one replica, over connections that can be cut all at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
from yarl import URL

from common.router.request import RoutedRequest

CONNECT_SECONDS = 30.0
IDLE_SECONDS = 3.0  # that a connection is kept: uvicorn drops those that were idle for 5
MAX_READING = 8 << 20  # bytes of an answer that the router reads for itself


class UpstreamFailed(Exception):
    """A replica did not do its part. `answer` is what it said, if it said anything."""

    def __init__(self, text: str, answer: "Answer | None" = None) -> None:
        super().__init__(text)
        self.answer = answer


class Answer:
    """A whole answer."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


class Upstream:
    """The connections to one replica. Made on the event loop that uses it.

    api_key: what the replica asks for; None where it asks for nothing.
    timeout: seconds without a byte after which an answer is given up.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = url
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._under_way: set[asyncio.Timeout] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=timeout
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),  # the client's, or none
            trust_env=False,  # no proxy between the router and its replicas
        )

    @contextlib.asynccontextmanager
    async def send(self, request: RoutedRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head; leaving before its end drops the connection, and so the request.

        Raises UpstreamFailed, inside the context too.
        """
        assert request.target.startswith("/"), request.target  # so it names no other host
        headers = [*request.forwarded_headers(), *self._headers.items()]
        try:
            async with (
                self._until_closed(),
                self._session.request(
                    request.method,
                    URL(self.url + request.target, encoded=True),
                    headers=headers,
                    data=request.body or None,
                    allow_redirects=False,
                ) as response,
            ):
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamFailed(f"{type(error).__name__}: {error}") from error

    async def get(self, path: str, timeout: float) -> tuple[int, bytes]:
        """Status and body of a GET. Raises UpstreamFailed."""
        try:
            async with self._session.get(
                self.url + path,
                headers=self._headers | {"Accept": "*/*"},
                timeout=aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
            ) as response:
                body = bytearray()
                async for data in response.content.iter_any():
                    body += data
                    if len(body) > MAX_READING:
                        raise UpstreamFailed(f"{path} gives more than {MAX_READING} bytes")
                return response.status, bytes(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamFailed(f"{path}: {type(error).__name__}: {error}") from error

    @contextlib.asynccontextmanager
    async def _until_closed(self) -> AsyncIterator[None]:
        """TimeoutError for what is under way when the line is cut. (A session that is closed lets it
        wait.)"""
        async with asyncio.timeout(None) as limit:
            self._under_way.add(limit)
            try:
                yield
            finally:
                self._under_way.discard(limit)

    async def close(self) -> None:
        """Cut all connections. What waits for an answer gets UpstreamFailed."""
        now = asyncio.get_running_loop().time()
        for limit in self._under_way:
            limit.reschedule(now)
        await self._session.close()
