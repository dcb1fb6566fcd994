"""The router's app: what is forwarded, what it answers itself, and how it begins and ends."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from common.http import page
from common.http.app import make_app, unless_disconnected
from common.http.middleware import ClientGone
from common.http.run import ServerConfig
from common.router.exchange import Exchange
from common.router.metrics import scrape
from common.router.request import RoutedRequest

STOPPING_SECONDS = 0.2  # between looks at whether the server is to end
COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
OTHERS = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/"),
    ("GET", "/v1/models/{name:path}"),
    ("GET", "/version"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
)
TRACES = ("/trace", "/trace.jsonl", "/trace.perfetto.json")

Forward = Callable[[Exchange], Coroutine[Any, Any, None]]


class Forwarded(Response):
    """An answer that another server gives; when the client goes away, that one is told."""

    def __init__(self, request: RoutedRequest, forward: Forward, *, endless: bool = False) -> None:
        self.request, self.forward, self.endless = request, forward, endless
        self.headers_added: dict[str, str] = {}
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.request, send, endless=self.endless)
        exchange.headers |= self.headers_added
        work = self.forward(exchange)
        if self.endless:
            work = until_stopping(scope["app"], work)
        try:
            await unless_disconnected(Request(scope, receive), work)
        except ClientGone:
            if not exchange.started:
                raise


async def until_stopping(app: FastAPI, work: Coroutine[Any, Any, None]) -> None:
    """Work that ends by itself, or when the server is to end."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done() and not app.state.stopping:
            await asyncio.wait({task}, timeout=STOPPING_SECONDS)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def routed(request: Request) -> RoutedRequest:
    scope = request.scope
    target = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    if scope["query_string"]:
        target += "?" + scope["query_string"].decode("latin-1")
    return RoutedRequest(scope["method"], target, scope["headers"], await request.body())


def create_app(router: Any, config: ServerConfig) -> FastAPI:
    """router: has `complete(exchange)`, `forward(choose, exchange)`, `replicas`, `policy`."""
    app = make_app(config, lifespan=router.replicas.kept)

    async def health() -> JSONResponse:
        """200 as long as requests can be answered."""
        available, count = len(router.replicas.available()), len(router.replicas.replicas)
        status = {"status": "ok" if available else "unhealthy"}
        return JSONResponse(
            status | {"available": available, "engines": count}, 200 if available else 503
        )

    async def metrics() -> Response:
        return await scrape(router)

    async def completions(request: Request) -> Response:
        return Forwarded(await routed(request), router.complete)

    async def others(request: Request) -> Response:
        """What any replica may answer."""
        return Forwarded(await routed(request), partial(router.forward, least_loaded))

    async def traces(request: Request) -> Response:
        """The steps of the engine that `?engine=` names, or of the first."""
        engine = request.query_params.get("engine")

        def named(some: list[Any]) -> Any | None:
            return next((r for r in some if engine in (None, "", str(r.index))), None)

        forwarded = Forwarded(await routed(request), partial(router.forward, named), endless=True)
        indices = (str(replica.index) for replica in router.replicas.replicas)
        forwarded.headers_added["x-engines"] = ",".join(indices)
        return forwarded

    def add(method: str, path: str, endpoint: Any) -> None:
        methods = [method, "HEAD"] if path == "/health" else [method]
        app.add_api_route(path, endpoint, methods=methods, response_model=None)

    add("GET", "/health", health)
    add("GET", "/metrics", metrics)
    for path in COMPLETIONS:
        add("POST", path, completions)
    for method, path in OTHERS:
        add(method, path, others)
    for path in TRACES:
        add("GET", path, traces)
    page.mount(app)
    return app


def least_loaded(some: list[Any]) -> Any:
    return min(some, key=lambda replica: replica.load)
