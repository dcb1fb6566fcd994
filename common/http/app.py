"""The app that every part starts from: health, models, checked requests, errors in one form."""

import asyncio
import contextlib
import dataclasses
import os
import reprlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableSequence, Sequence
from importlib import metadata
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from common.http.errors import ApiError, field_error, internal_error
from common.http.metrics_routes import make_registry, render
from common.http.middleware import ClientGone, Guard, split_list
from common.http.request_log import add_request_log
from common.http.responses import Job, to_json
from common.http.run import ServerConfig
from common.http.schemas import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    check_logprobs,
)
from common.http.structured import compiled, grammar_of
from common.http.tokenize_routes import add_tokenize_routes
from common.http.tools.formats import format_of
from common.http.tools.schemas import ToolChatRequest
from common.http.tools.use import ToolUse, told
from common.http.trace_routes import ExpertStats, add_trace_routes
from common.metrics import EngineMetrics
from common.models.tokenizer import Tokenizer
from common.requests import check_prompt
from common.structured.compiler import GrammarCompiler
from common.structured.grammar import Grammar
from common.trace import Trace

T = TypeVar("T")

TOKENIZING_THREADS = 2


def installed_version() -> str:
    """This project's version; a tree that is not installed has none."""
    try:
        return metadata.version("fifteen-engines")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclasses.dataclass(frozen=True)
class Seat:
    """Which of several HTTP processes this is. places: what each has admitted, in memory that they share;
    None: there is one process."""

    own: int = 0
    places: MutableSequence[int] | None = None

    @property
    def is_alone(self) -> bool:
        return self.places is None


ALONE = Seat()


class Admission:
    """Counts the completions under way and refuses beyond a limit."""

    def __init__(self, limit: int, seat: Seat = ALONE) -> None:
        self.limit, self.own = limit, seat.own
        self.places = [0] if seat.places is None else seat.places
        self.on_refused: Callable[[int], None] = lambda count: None

    @property
    def count(self) -> int:
        """Of all processes."""
        return sum(self.places)

    def check(self, count: int) -> None:
        """Raises ApiError 503 with Retry-After unless `count` places are free; 400 when there are
        not so many at all."""
        if count > self.limit:
            raise ApiError(
                400,
                f"n times the number of prompts is {count}: one request may ask for {self.limit}"
                " completions here",
                param="n",
            )
        if self.count + count > self.limit:
            raise self._full(count)

    def _full(self, count: int) -> ApiError:
        self.on_refused(count)
        return ApiError(
            503,
            f"the server is full: {self.count} completions are running or waiting",
            code="overloaded",
            headers={"Retry-After": "1"},
        )

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold `count` places. Raises ApiError as `check` does."""
        self.check(count)
        self.places[self.own] += count
        try:
            if self.count > self.limit:  # another process has admitted at the same moment
                raise self._full(count)
            yield
        finally:
            self.places[self.own] -= count


async def unless_disconnected(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; it is cancelled when the client goes away, and ClientGone raised."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(coroutine), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


def make_app(config: ServerConfig, lifespan: Any = None) -> FastAPI:
    """An app without routes: what stands before every one, and errors in one form."""
    app = FastAPI(title="Fifteen Engines", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stopping = False  # set by the server when it is to end
    app.add_middleware(Guard, config=config)
    if origins := split_list(config.allowed_origins):
        app.add_middleware(  # browsers ask before they send JSON or a key
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(ClientGone, _answer_client_gone)
    app.add_exception_handler(Exception, _answer_exception)
    return app


class Frontend:
    """The app with the routes that need no engine, and the way from a request to a `Job`.

    engine: anything with `config.model`, `tokenizer`, `max_model_len`, `vocab_size`, and
    `sampling_defaults` where its model has any.
    streaming, max_n, cache_salt, speculative, prompt_logprobs: what this part can do.
    grammars: compiles what outputs must be like, where this part can keep to it.
    tool_call_parser: how calls of tools are read, where this part can.
    health: None while all is well, else what is wrong.
    """

    def __init__(
        self,
        engine: Any,
        config: ServerConfig,
        *,
        streaming: bool,
        max_n: int,
        cache_salt: bool = False,
        speculative: bool = False,
        prompt_logprobs: bool = False,
        grammars: GrammarCompiler | None = None,
        tool_call_parser: str | None = None,
        health: Callable[[], str | None] = lambda: None,
        lifespan: Any = None,
    ) -> None:
        self.tokenizer: Tokenizer | None = engine.tokenizer
        self.max_model_len: int = engine.max_model_len
        self.vocab_size: int = engine.vocab_size
        if self.tokenizer is not None:  # while the rest starts, and not while requests wait
            threading.Thread(target=self.tokenizer.prepare, daemon=True).start()
        self.sampling_defaults: dict[str, Any] = getattr(engine, "sampling_defaults", {})
        self.streaming, self.max_n, self.health = streaming, max_n, health
        self.tokenizing_threads = CapacityLimiter(TOKENIZING_THREADS)
        self.cache_salt, self.speculative = cache_salt, speculative
        self.prompt_logprobs = prompt_logprobs
        self.timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.grammars, self.tool_format = grammars, None
        if grammars is not None:
            grammars.prepare()
        if tool_call_parser is not None:
            template = self.tokenizer.chat_template if self.tokenizer else None
            self.tool_format = format_of(template, tool_call_parser)
        name = engine.config.model
        self.model = config.served_model_name or (
            os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
        )
        self.created = int(time.time())
        self.app = make_app(config, lifespan)
        self.app.add_api_route("/health", self._health, methods=["GET", "HEAD"])
        self.app.add_api_route("/version", self._version, methods=["GET"])
        self.app.add_api_route("/v1/models", self._models, methods=["GET"])
        self.app.add_api_route("/v1/models/", self._models, methods=["GET"])
        self.app.add_api_route("/v1/models/{name:path}", self._one_model, methods=["GET"])
        add_tokenize_routes(self)

    async def _health(self) -> JSONResponse:
        problem = self.health()
        if problem:
            return JSONResponse({"status": "unhealthy", "reason": problem}, 503)
        return JSONResponse({"status": "ok"})

    async def _version(self) -> dict[str, str]:
        return {"version": installed_version()}

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def _one_model(self, name: str) -> dict[str, Any]:
        self.check_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "fifteen-engines",
            "max_model_len": self.max_model_len,
        }

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here; None is the one that is."""
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

        async def respond(
            body: CompletionRequest | ChatCompletionRequest, request: Request
        ) -> Response:
            job = await self.read(body)
            if (life := request.scope.get("life")) is not None:
                life.job = job
            whole = await answer(job, request)
            if isinstance(whole, Response):
                return whole
            # In a thread: half a million log probabilities take seconds.
            text = await run_in_threadpool(to_json, whole)
            return Response(text, media_type="application/json")

        async def completions(body: CompletionRequest, request: Request) -> Response:
            return await respond(body, request)

        chat_request = ChatCompletionRequest if self.tool_format is None else ToolChatRequest

        async def chat_completions(body: chat_request, request: Request) -> Response:
            return await respond(body, request)

        for path, handler in (
            ("/v1/completions", completions),
            ("/v1/chat/completions", chat_completions),
        ):
            self.app.add_api_route(path, handler, methods=["POST"], response_model=None)

    def add_trace(self, trace: Trace, experts: ExpertStats | None = None) -> None:
        """Add `GET /trace`, the engine's steps as they happen, and those kept as `/trace.jsonl` and
        `/trace.perfetto.json`. experts: which of them were chosen how often, where there are any."""
        add_trace_routes(self.app, trace, experts)

    def add_metrics(
        self,
        metrics: EngineMetrics,
        admission: Admission | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
        own_process: bool = True,
    ) -> None:
        """Add `GET /metrics`: the engine's numbers and this process's, for Prometheus to read.

        admission: with it, all of vLLM's metrics that there are (`common/vllm_metrics.py`), those of
        HTTP requests among them, and `GET /trace.requests.jsonl`.
        refresh: awaited before each answer, to have the numbers of an engine in another process.
        own_process: as `make_registry` takes it.
        """
        registry = make_registry(metrics, self.model, admission is not None, own_process)
        if admission is not None:
            admission.on_refused = metrics.on_refused
            self.timed = add_request_log(self.app, registry if own_process else None).timed

        async def scrape(request: Request) -> Response:
            if refresh is not None:
                await refresh()
            content, kind = render(registry, ", ".join(request.headers.getlist("accept")))
            return Response(content, headers={"Content-Type": kind})

        self.app.add_api_route("/metrics", scrape, methods=["GET"], response_model=None)

    async def tokenizing(self, work: Callable[[], T]) -> T:
        """Work on texts, in a thread: it takes longer than other clients should wait. Few at a time,
        since what each of them runs in Python slows the engine's thread down."""
        return await to_thread.run_sync(work, limiter=self.tokenizing_threads)

    async def read(self, request: CompletionRequest | ChatCompletionRequest) -> Job:
        """Check a request and turn it into tokens. Raises ApiError."""
        marks = {"read": time.perf_counter()}
        self.check_model(request.model)
        request.check(
            self.streaming,
            self.max_n,
            cache_salt=self.cache_salt,
            speculative=self.speculative,
            prompt_logprobs=self.prompt_logprobs,
            structured=self.grammars is not None,
        )
        asked = None
        if self.grammars is not None:
            asked = await self.tokenizing(lambda: grammar_of(request.model_extra or {}))
        use = self._tool_use(request, asked)
        params = request.sampling_params(self.sampling_defaults)
        chat = isinstance(request, ChatCompletionRequest)
        texts: list[Any] = [request.messages] if chat else request.prompts()
        if len(texts) * params.n > MAX_CHOICES:
            field = "n" if params.n > 1 else "prompt"
            raise ApiError(
                400,
                f"{field} asks for {len(texts)} x n={params.n} completions;"
                f" one request may ask for {MAX_CHOICES}",
                param=field,
            )
        template_options = request.template_options() if chat else {}
        if use is not None:
            template_options["use"] = use
        try:
            marks["tokenize"] = time.perf_counter()
            prompts = await self.tokenizing(
                lambda: [self._tokens(text, **template_options) for text in texts]
            )
            marks["tokenized"] = time.perf_counter()
            room = self.max_model_len - max(map(len, prompts))
            if not chat and request.max_tokens is None and room > 0:
                # Nobody asked for the default: near the context's end it is what is left.
                params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
            for prompt in prompts:
                check_prompt(prompt, params, self.max_model_len, self.vocab_size)
        except ValueError as error:
            raise field_error(str(error)) from None
        check_logprobs(prompts, params, self.max_model_len, chat)
        grammar = None
        if use is not None and use.is_forced:
            asked = await self.tokenizing(use.grammar)
        if asked is not None:
            grammar = await compiled(self.grammars, *asked)
        options = request.stream_options
        echoes = None
        if not chat and request.echo:
            echoes = await self.tokenizing(lambda: self._texts(texts))
        return Job(
            chat=chat,
            model=self.model,
            prompts=prompts,
            params=params,
            stream=bool(request.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            tokenizer=self.tokenizer,
            cache_salt=request.cache_salt,
            may_draft=request.speculative is not False,
            echoes=echoes,
            is_prompt_alone=not chat and request.is_prompt_alone,
            prompt_logprobs=request.prompt_logprobs,
            marks=marks,
            grammar=grammar,
            tools=use,
        )

    def _tool_use(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        asked: tuple[str, Grammar] | None,
    ) -> ToolUse | None:
        """What the model may call, if anything. Raises ApiError."""
        if not isinstance(request, ToolChatRequest) or self.tool_format is None:
            return None
        use = ToolUse.of(request, *self.tool_format)
        if use is not None and asked is not None:
            text = (
                f"{asked[0]} and tools exclude each other; with tool_choice none they go together"
            )
            raise ApiError(400, text, param=asked[0])
        return use

    def _texts(self, prompts: list[str | list[int]]) -> list[str]:
        """Prompts as text, those that were sent as token ids too."""
        if self.tokenizer is None:
            return [""] * len(prompts)
        return [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, False)
            for prompt in prompts
        ]

    def _tokens(
        self, prompt: str | list[Any], use: ToolUse | None = None, **template_options: Any
    ) -> list[int]:
        """Text, token ids or messages to token ids. use: the tools of a chat. Raises ValueError."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return prompt
        name = "prompt" if isinstance(prompt, str) else "messages"
        if self.tokenizer is None:
            raise ValueError(f"{name}: {self.model} has no tokenizer; send token ids as prompt")
        messages = [] if isinstance(prompt, str) else [message.as_dict() for message in prompt]
        if self.tool_format is not None and not isinstance(prompt, str):
            if not self.tool_format[1]:  # the template knows no tools
                messages = told(messages, use)
            elif use is not None:
                template_options["tools"] = use.tools
        size = len(prompt) if isinstance(prompt, str) else size_of(messages)
        size += size_of(template_options.get("tools", []))
        if size > self.max_model_len * self.tokenizer.longest_token:
            raise ValueError(
                f"{name} has {size} characters, more than the context of"
                f" {self.max_model_len} tokens can hold"
            )
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(messages, **template_options)


def size_of(messages: list[dict[str, Any]]) -> int:
    """Characters of messages or tools."""
    sizes = (
        len(m["content"]) if m.keys() <= {"role", "content"} else len(str(m)) for m in messages
    )
    return sum(sizes)


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such path here", 405: "this path does not take that method"}
    text = message.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, text).body(), error.status_code, error.headers)


async def _answer_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number for "client closed request"


async def _answer_exception(request: Request, error: Exception) -> JSONResponse:
    # uvicorn closes the connection after an exception: the client must not use it again.
    return JSONResponse(internal_error().body(), 500, {"Connection": "close"})


def _most_exact(errors: Sequence[Any]) -> Any:
    """The first error; where a value may be of several kinds, the one that goes deepest into it."""
    place = errors[0]["loc"][:-1]
    return max(
        (error for error in errors if error["loc"][: len(place)] == place),
        key=lambda error: len(error["loc"]),
    )


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = _most_exact(error.errors())
    where = [part for part in first["loc"] if part != "body"]
    if "json" not in request.headers.get("content-type", ""):
        answer = ApiError(400, "the body must be JSON; send Content-Type: application/json")
    elif first["type"] == "json_invalid" or not where:
        reason = first.get("ctx", {}).get("error") or first["msg"]
        answer = ApiError(400, f"the body is not the JSON object that is needed: {reason}")
    elif where[0] in ("prompt", "stop") and request.url.path.startswith("/v1/"):
        kinds = "a string, a list of token ids, or a list of either"
        kinds = kinds if where[0] == "prompt" else "a string or a list of strings"
        given = "missing" if first["type"] == "missing" else "not that"
        answer = ApiError(400, f"{where[0]} must be {kinds}; it is {given}", param=str(where[0]))
    else:
        path, node = str(where[0]), error.body.get(where[0])
        for part in where[1:]:
            if isinstance(part, int) and isinstance(node, list) and part < len(node):
                path, node = f"{path}[{part}]", node[part]
            elif isinstance(node, dict) and (part in node or first["type"] == "missing"):
                path, node = f"{path}.{part}", node.get(part)
            # else it is no key but the name of a type that a value may have
        path = path[:100].encode("ascii", "backslashreplace").decode()
        value = reprlib.repr(first.get("input"))  # cut: it may be megabytes, or nested deep
        value = "" if first["type"] == "missing" else f", not {value[:80]}"
        answer = ApiError(400, f"{path}: {first['msg']}{value}", param=path)
    return JSONResponse(answer.body(), 400)
