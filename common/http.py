"""The HTTP side that every part shares: one guarded app, one way to start it, one form of error.

`Guard` stands before everything and refuses by default: foreign hosts and origins (a page in the
user's browser must not reach a server on their machine), missing keys, bodies that are too large
or too slow. `Frontend` reads requests into jobs. `serve` binds, loads, serves and drains.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.api import (
    MAX_CHOICES,
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    Job,
    field_error,
    internal_error,
)
from common.cli import option, validate
from common.inspector import is_public
from common.prompts import check_prompt
from common.tokenizer import Tokenizer

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADER_SECONDS = 20.0  # for a request's headers to arrive
BODY_SECONDS = 60.0  # for its body


@dataclass(frozen=True)
class ServerConfig:
    """Where and for whom the server listens."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = option(8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    served_model_name: str | None = option(
        None, "the model's name in the API (default: the name given by --model)"
    )
    api_key: str | None = option(
        None,
        "key that clients must send as 'Authorization: Bearer …' (default: the environment"
        " variable ENGINE_API_KEY; none: no key is asked for)",
    )
    max_waiting: int = option(
        256, "completions that may wait for their turn; beyond it a request gets a 503", minimum=0
    )
    max_body_size: int = option(8 << 20, "largest request body in bytes", minimum=1024)
    shutdown_timeout: int = option(
        30, "seconds that running requests have to finish after SIGTERM", minimum=0
    )
    allowed_hosts: str | None = option(
        None,
        "comma-separated Host names to answer to (default: loopback names when listening on"
        " loopback, else any)",
    )
    allowed_origins: str = option(
        "",
        "comma-separated browser origins, such as http://localhost:3000, beside the server's own",
    )
    access_log: bool = option(False, "log each request")

    def __post_init__(self) -> None:
        if self.api_key is None and "ENGINE_API_KEY" in os.environ:
            object.__setattr__(self, "api_key", os.environ["ENGINE_API_KEY"])
        validate(self)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key must not be empty (it would admit everyone)")

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


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
            given = headers.get(b"authorization", b"")
            wanted = b"Bearer " + self.config.api_key.encode()
            if not hmac.compare_digest(given, wanted):
                raise ApiError(
                    401,
                    "a valid API key is needed: 'Authorization: Bearer …'",
                    code="invalid_api_key",
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
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        return receive_whole


class ClientGone(Exception):
    """The client closed the connection before its request was read."""


class Admission:
    """Counts the completions under way and refuses beyond a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold `count` places. Raises ApiError 503 with Retry-After when they are not free."""
        if self.count + count > self.limit:
            raise ApiError(
                503,
                f"the server is full: {self.count} completions are running or waiting",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        self.count += count
        try:
            yield
        finally:
            self.count -= count


class Frontend:
    """The app with the routes that need no engine, and the way from a request to a `Job`.

    engine: anything with `config.model`, `tokenizer`, `max_model_len`, `vocab_size`.
    streaming, max_n: what this part can do.
    health: None while all is well, else what is wrong.
    """

    def __init__(
        self,
        engine: Any,
        config: ServerConfig,
        *,
        streaming: bool,
        max_n: int,
        health: Callable[[], str | None] = lambda: None,
        lifespan: Any = None,
    ) -> None:
        self.tokenizer: Tokenizer | None = engine.tokenizer
        self.max_model_len: int = engine.max_model_len
        self.vocab_size: int = engine.vocab_size
        self.streaming, self.max_n, self.health = streaming, max_n, health
        name = engine.config.model
        self.model = config.served_model_name or (
            os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
        )
        self.created = int(time.time())
        self.app = FastAPI(
            title="Fifteen Engines", docs_url=None, redoc_url=None, lifespan=lifespan
        )
        self.app.add_middleware(Guard, config=config)
        self.app.add_exception_handler(ApiError, _answer_api_error)
        self.app.add_exception_handler(HTTPException, _answer_http_exception)
        self.app.add_exception_handler(RequestValidationError, _answer_validation_error)
        self.app.add_exception_handler(Exception, _answer_exception)
        self.app.add_api_route("/health", self._health, methods=["GET"])
        self.app.add_api_route("/v1/models", self._models, methods=["GET"])
        self.app.add_api_route("/v1/models/{name:path}", self._one_model, methods=["GET"])

    async def _health(self) -> JSONResponse:
        problem = self.health()
        if problem:
            return JSONResponse({"status": "unhealthy", "reason": problem}, 503)
        return JSONResponse({"status": "ok"})

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def _one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "fifteen-engines",
            "max_model_len": self.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise ApiError(
                404,
                f"the model {shown!r} does not exist; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def route(self, answer: Callable[[Job, Request], Awaitable[Any]]) -> None:
        """Add the two routes that complete text; `answer` gets the checked job."""

        async def completions(body: CompletionRequest, request: Request) -> Any:
            return await answer(await self.read(body), request)

        async def chat_completions(body: ChatCompletionRequest, request: Request) -> Any:
            return await answer(await self.read(body), request)

        for path, handler in (
            ("/v1/completions", completions),
            ("/v1/chat/completions", chat_completions),
        ):
            self.app.add_api_route(path, handler, methods=["POST"], response_model=None)

    async def read(self, request: CompletionRequest | ChatCompletionRequest) -> Job:
        """Check a request and turn it into tokens. Raises ApiError."""
        self._check_model(request.model)
        request.check(self.streaming, self.max_n)
        params = request.sampling_params()
        chat = isinstance(request, ChatCompletionRequest)
        texts: list[Any] = [request.messages] if chat else request.prompts()
        if len(texts) * params.n > MAX_CHOICES:
            raise ApiError(
                400,
                f"prompt asks for {len(texts)} x n={params.n} completions;"
                f" one request may ask for {MAX_CHOICES}",
                param="prompt",
            )
        try:
            # In a thread: tokenizing a long prompt takes longer than other clients should wait.
            prompts = await run_in_threadpool(lambda: [self._tokens(text) for text in texts])
            for prompt in prompts:
                check_prompt(prompt, params, self.max_model_len, self.vocab_size)
        except ValueError as error:
            raise field_error(str(error)) from None
        options = request.stream_options
        return Job(
            chat=chat,
            model=self.model,
            prompts=prompts,
            params=params,
            stream=bool(request.stream),
            include_usage=bool(options and options.include_usage),
            tokenizer=self.tokenizer,
        )

    def _tokens(self, prompt: str | list[Any]) -> list[int]:
        """Text, token ids or messages to token ids. Raises ValueError."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return prompt
        name = "prompt" if isinstance(prompt, str) else "messages"
        if self.tokenizer is None:
            raise ValueError(f"{name}: {self.model} has no tokenizer; send token ids as prompt")
        messages = [] if isinstance(prompt, str) else [message.as_dict() for message in prompt]
        size = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in messages)
        if size > self.max_model_len * self.tokenizer.longest_token:
            raise ValueError(
                f"{name} has {size} characters, more than the context of"
                f" {self.max_model_len} tokens can hold"
            )
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(messages)


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path here", 405: "this path does not take that method"}
    text = message.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, text).body(), error.status_code, error.headers)


async def _answer_exception(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(internal_error().body(), 500)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not where:
        reason = first.get("ctx", {}).get("error") or first["msg"]
        answer = ApiError(400, f"the body is not the JSON object that is needed: {reason}")
    elif where[0] in ("prompt", "stop"):
        kinds = "a string, a list of token ids, or a list of either"
        kinds = kinds if where[0] == "prompt" else "a string or a list of strings"
        given = "missing" if first["type"] == "missing" else "not that"
        answer = ApiError(400, f"{where[0]} must be {kinds}; it is {given}", param=str(where[0]))
    else:
        path = str(where[0])
        for part in where[1:]:
            if isinstance(part, int):
                path += f"[{part}]"
            elif part in first.get("input", {}) or first["type"] in ("missing", "extra_forbidden"):
                path += f".{part}"
        value = repr(first.get("input"))
        value = "" if first["type"] == "missing" else f", not {value[:80]}"
        answer = ApiError(400, f"{path}: {first['msg']}{value}", param=path)
    return JSONResponse(answer.body(), 400)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, less patient: headers that do not arrive in time end the connection."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._header_timer is not None:
            self._header_timer.cancel()

    def _watch_headers(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif not waiting and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that says, in one line, when and where it is ready."""

    on_ready: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address. Ends the process with one line when it cannot."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host.strip("[]"), config.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"error: cannot listen on {config.host} port {config.port}: {reason}")
    return sock


def serve(build: Callable[[], FastAPI], config: ServerConfig) -> None:
    """Bind, build the app (which loads the model), and serve until SIGTERM or Ctrl+C.

    After SIGTERM no new connection is taken and running requests have `shutdown_timeout` seconds.
    Bad models and busy ports end the process with one line and status 1.
    """
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A stream is cut by the timeout below, not the moment SIGTERM arrives.
    AppStatus.disable_automatic_graceful_drain()
    sock = bind(config)
    try:
        app = build()
        server = _Server(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                log_level="info" if config.access_log else "warning",
                access_log=config.access_log,
                timeout_graceful_shutdown=config.shutdown_timeout,
                server_header=False,
            )
        )
        host, port = sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host

        def ready() -> None:
            seconds = time.monotonic() - start
            print(f"Ready after {seconds:.1f} s: http://{host}:{port}", flush=True)
            if not config.is_loopback and config.api_key is None:
                print("Anyone who can reach this address can use it: see --api-key", flush=True)

        server.on_ready = ready
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not server.started:
        sys.exit(f"error: cannot listen on {config.host} port {port}: address already in use")
