"""A server that speaks OpenAI's wire format, and has vLLM's metrics, in a process of its own.

    python -m common.testing.stand_ins.server --port 0 --model m --tokens 8 --interval 0.01

A request's `metadata` asks for faults, and what is posted to `/fault` asks for them in every request:
`status` answers with it; `cut_after` breaks the connection after
so many tokens, 0 before the first; `error_after` ends the stream with an error event; `hang` says
nothing more after so many tokens; `tokens`, `interval` and `first` (seconds) are as on the command line.
A cut comes in mid-event. `ill`, posted, is told at `/health`.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from typing import Any

from aiohttp import web

CHUNK = 'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":%s,"choices":[%s]}\n\n'


class StandIn:
    """counts: requests, finished and aborted ones, by name. last: the last completion's headers."""

    def __init__(
        self,
        model: str,
        *,
        tokens: int = 8,
        interval: float = 0.0,
        first: float = 0.0,
        api_key: str | None = None,
    ) -> None:
        self.model, self.api_key = model, api_key
        self.defaults = {"tokens": tokens, "interval": interval, "first": first}
        self.counts: Counter[str] = Counter()
        self.running = 0
        self.fault: dict[str, str] = {}
        self.last: dict[str, str] = {}
        self.app = web.Application(client_max_size=16 << 20, middlewares=[self.check_key])
        self.app.router.add_get("/health", self.health)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_get("/stats", self.stats)
        self.app.router.add_post("/fault", self.set_fault)
        self.app.router.add_post("/tokenize", self.tokenize)
        self.app.router.add_post("/v1/completions", self.complete)
        self.app.router.add_post("/v1/chat/completions", self.complete)

    @web.middleware
    async def check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if self.api_key and request.path != "/health" and given != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "no"}}, status=401)
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.fault.get("ill") else 200)

    async def set_fault(self, request: web.Request) -> web.Response:
        self.fault = await request.json()
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response({**self.counts, "running": self.running, "last": self.last})

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"count": 3, "tokens": [1, 2, 3]})

    async def metrics(self, request: web.Request) -> web.Response:
        label = f'{{engine="0",model_name="{self.model}"}}'
        lines = [
            "# HELP vllm:num_requests_running Requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{label} {float(self.running)}",
            "# HELP vllm:num_requests_waiting Requests waiting to be processed.",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting{label} 0.0",
            "# HELP vllm:request_success_total Requests that ended.",
            "# TYPE vllm:request_success_total counter",
            f'vllm:request_success_total{{engine="0",finished_reason="stop"}} {self.counts["finished"]}',
            "# TYPE process_resident_memory_bytes gauge",
            "process_resident_memory_bytes 1.0",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.counts["requests"] += 1
        self.last = {name.lower(): value for name, value in request.headers.items()}
        self.running += 1
        try:
            response = await self.answer(request, body)
            self.counts["finished"] += 1
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.counts["aborted"] += 1
            raise
        finally:
            self.running -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked = self.fault | (body.get("metadata") or {})
        if status := int(asked.get("status", 0)):
            headers = {"Retry-After": "1"} if asked.get("busy") else {}
            error = {"error": {"message": f"asked for {status}", "type": "x", "param": None}}
            return web.json_response(error, status=status, headers=headers)
        options = {k: type(v)(asked.get(k, v)) for k, v in self.defaults.items()}
        tokens, interval, first = options["tokens"], options["interval"], options["first"]
        if not body.get("stream"):
            await asyncio.sleep(first + interval * tokens)
            if "cut_after" in asked:
                request.transport.abort()
            text = "".join(f" {n}" for n in range(tokens))
            return web.json_response(
                {"model": self.model, "choices": [{"index": 0, "text": text}], "usage": {}}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            await self.event(response, '{"index":0,"delta":{"role":"assistant","content":""}}')
        await asyncio.sleep(first)
        for number in range(tokens + 1):
            if asked.get("cut_after") == str(number):
                await response.write(b'data: {"half of an ev')
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            if asked.get("error_after") == str(number):
                error = {"error": {"message": "out of order", "type": "server_error"}}
                await response.write(b"data: " + json.dumps(error).encode() + b"\n\n")
                return response
            if asked.get("hang") == str(number):
                await asyncio.sleep(3600)
            if number < tokens:
                text = f'"delta":{{"content":" {number}"}}' if chat else f'"text":" {number}"'
                await self.event(response, f'{{"index":0,{text},"finish_reason":null}}')
                if interval:
                    await asyncio.sleep(interval)
        text = '"delta":{}' if chat else '"text":""'
        await self.event(response, f'{{"index":0,{text},"finish_reason":"stop"}}')
        await response.write(b"data: [DONE]\n\n")
        return response

    async def event(self, response: web.StreamResponse, choice: str) -> None:
        await response.write((CHUNK % (json.dumps(self.model), choice)).encode())


async def serve(stand_in: StandIn, host: str, port: int, begin: float) -> None:
    """Until SIGTERM; then what runs comes to its end."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    runner = web.AppRunner(stand_in.app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=2048)
    await site.start()
    address = f"http://{host}:{runner.addresses[0][1]}"
    print(f"Ready after {time.monotonic() - begin:.1f} s: {address}", flush=True)
    await stopped.wait()
    await site.stop()
    while stand_in.running:
        await asyncio.sleep(0.01)
    await runner.cleanup()


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--first", type=float, default=0.0)
    parser.add_argument("--api-key")
    args = vars(parser.parse_args())
    port = args.pop("port")
    asyncio.run(serve(StandIn(**args), "127.0.0.1", port, begin))


if __name__ == "__main__":
    sys.exit(main())
