"""The HTTP server: answers are streamed as server-sent events, token by token, or sent whole.

A client that goes away, streaming or not, has its request aborted.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse

from common.completions import OutputProcessor
from common.http import page
from common.http.app import Admission, Frontend, unless_disconnected
from common.http.errors import ApiError, failure
from common.http.responses import Job, to_json
from common.http.run import ServerConfig, serve
from common.options import parse

from .async_engine import AsyncEngine
from .config import EngineConfig
from .engine import LLMEngine


def create_app(engine: LLMEngine, config: ServerConfig) -> FastAPI:
    async_engine = AsyncEngine(engine)
    frontend = Frontend(
        engine,
        config,
        streaming=True,
        max_n=1,
        health=async_engine.problem,
        lifespan=async_engine.lifespan,
    )
    admission = Admission(config.max_waiting + 1)

    async def answer(job: Job, request: Request) -> dict[str, Any] | EventSourceResponse:
        admission.check(len(job.prompts))
        if job.stream:
            return EventSourceResponse(events(job), sep="\n", send_timeout=60)
        return await unless_disconnected(request, whole(job))

    async def whole(job: Job) -> dict[str, Any]:
        outputs: dict[int, OutputProcessor] = {}
        with admission.admit(len(job.prompts)):
            async for index, output, _ in async_engine.generate(job.prompts, job.params):
                outputs[index] = output
        return job.response([outputs[index].completion(index) for index in sorted(outputs)])

    async def events(job: Job) -> AsyncIterator[str]:
        try:
            with admission.admit(len(job.prompts)):
                async for chunk in chunks(job):
                    yield to_json(chunk)
            yield "[DONE]"
        except ApiError as error:
            yield to_json(error.body())

    async def chunks(job: Job) -> AsyncIterator[dict[str, Any]]:
        outputs: dict[int, OutputProcessor] = {}
        for chunk in job.opening_chunks():
            yield chunk
        async for index, output, delta in async_engine.generate(job.prompts, job.params):
            outputs[index] = output
            if delta.finish_reason == "error":
                raise failure(delta.error)
            if job.has_news(delta):
                yield job.chunk(index, delta)
        if job.include_usage:
            yield job.usage_chunk(list(outputs.values()))

    frontend.route(answer)
    frontend.add_trace(engine.trace)
    page.mount(frontend.app)
    return frontend.app


def main() -> None:
    engine_config, server_config = parse([EngineConfig, ServerConfig], description=__doc__)
    serve(lambda: create_app(LLMEngine(engine_config), server_config), server_config)


if __name__ == "__main__":
    main()
