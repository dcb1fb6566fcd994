"""The HTTP server: requests wait at a lock, and each gets its answer when it is whole.

A client that goes away is not noticed: its completion runs to the end.
"""

import asyncio

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from common.http.app import Admission, Frontend
from common.http.responses import Job
from common.http.run import ServerConfig, serve
from common.options import parse

from .config import EngineConfig
from .engine import LLMEngine


def create_app(engine: LLMEngine, config: ServerConfig) -> FastAPI:
    frontend = Frontend(engine, config, streaming=False, max_n=1)
    admission = Admission(config.max_waiting + 1)
    lock = asyncio.Lock()

    async def answer(job: Job, request: Request) -> dict[str, object]:
        with admission.admit(job.num_choices):
            async with lock:
                outputs = await run_in_threadpool(engine.generate, job.prompts, job.params, False)
        return job.response(outputs)

    frontend.route(answer)
    return frontend.app


def main() -> None:
    engine_config, server_config = parse([EngineConfig, ServerConfig], description=__doc__)
    serve(lambda: create_app(LLMEngine(engine_config), server_config), server_config)


if __name__ == "__main__":
    main()
