"""The HTTP server: answers are streamed as server-sent events, token by token, or sent whole.

A client that goes away, streaming or not, has its request aborted.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request

from common.distributed import launched_rank
from common.http import page
from common.http.app import Admission, Frontend, unless_disconnected
from common.http.errors import ApiError
from common.http.events import EventStream
from common.http.responses import Job, to_json
from common.http.run import ServerConfig, serve
from common.http.sleep_routes import add_sleep_routes, check_awake
from common.kv_transfer.ticket import HEADER
from common.options import parse, peek
from common.sampling import MAX_N

from . import proxy, worker
from .async_engine import AsyncEngine
from .config import EngineConfig
from .engine import LLMEngine


def create_app(engine: LLMEngine, config: ServerConfig) -> FastAPI:
    async_engine = AsyncEngine(engine)
    frontend = Frontend(
        engine,
        config,
        streaming=True,
        max_n=MAX_N,
        prompt_logprobs=True,
        cache_salt=True,
        speculative=engine.config.speculative != "off",
        health=async_engine.problem,
        lifespan=async_engine.lifespan,
    )
    admission = Admission(config.max_waiting + engine.config.max_num_seqs)

    async def answer(job: Job, request: Request) -> dict[str, Any] | EventStream:
        check_awake(engine, engine.config.sleep_requests)
        admission.check(job.num_choices)
        job.kv_ticket = engine.connector.ticket_of(request.headers.get(HEADER))
        if job.stream:
            return EventStream(events(job))
        return await unless_disconnected(request, whole(job))

    async def whole(job: Job) -> dict[str, Any]:
        with admission.admit(job.num_choices):
            return await job.collect(async_engine.generate(job.requests()))

    async def events(job: Job) -> AsyncIterator[str]:
        try:
            with admission.admit(job.num_choices):
                async for chunk in job.chunks(async_engine.generate(job.requests())):
                    yield to_json(chunk)
            yield "[DONE]"
        except ApiError as error:
            yield to_json(error.body())

    frontend.route(answer)
    frontend.add_trace(engine.trace, engine.runner.expert_stats)
    frontend.add_metrics(async_engine.metrics)
    add_sleep_routes(frontend.app, engine, async_engine.call)
    frontend.app.add_api_route("/kv_transfer", engine.connector.describe, methods=["GET"])
    page.mount(frontend.app)
    return frontend.app


def main() -> None:
    if peek("role") == "proxy":
        return proxy.main()
    engine_config, server_config = parse([EngineConfig, ServerConfig], description=__doc__)
    if launched_rank() > 0:  # torchrun has started it, beside rank 0
        worker.main()
    serve(lambda: create_app(LLMEngine(engine_config), server_config), server_config)


if __name__ == "__main__":
    main()
