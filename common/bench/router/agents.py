"""Agents that talk to a server: trees of requests, each prompt its parent's and what that generated."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.bench import BenchError
from common.bench.ladder import known_vocab_size
from common.bench.prefix.requests import Request
from common.bench.prefix.workloads import Draw, Sizes, agent
from common.bench.serving.sse import SSEParser

if TYPE_CHECKING:
    import aiohttp


@dataclass
class Record:
    """One request. ttft: seconds. engine: the one that answered."""

    engine: str = ""
    ttft: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Run:
    seconds: float
    records: list[Record] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens that was found in a cache."""
        found = sum(record.cached_tokens for record in self.records)
        return found / sum(record.prompt_tokens for record in self.records)


async def run_agents(url: str, model: str, sizes: Sizes, count: int, seed: int) -> Run:
    """So many trees at once, each level of a tree when its parents have ended. Raises BenchError."""
    import aiohttp

    trees, names = make_trees(model, sizes, count, seed), token_ids_by_name(model)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        begin = time.perf_counter()
        agents = [Agent(session, tree, str(n), names) for n, tree in enumerate(trees)]
        await asyncio.gather(*(one.run() for one in agents))
        seconds = time.perf_counter() - begin
    return Run(seconds, [record for one in agents for record in one.records])


def make_trees(model: str, sizes: Sizes, count: int, seed: int) -> list[list[Request]]:
    vocab_size = known_vocab_size(model)
    return [agent(Draw(f"agent {n}", vocab_size, seed), sizes)[1] for n in range(count)]


def token_ids_by_name(model: str) -> dict[str, int]:
    """What a completion's log probabilities call its tokens -> their ids."""
    from common.models.checkpoint import resolve
    from common.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(resolve(model))
    if tokenizer is None:
        return {}
    return {tokenizer.token_name(i): i for i in reversed(range(known_vocab_size(model)))}


class Agent:
    """One tree."""

    def __init__(
        self,
        session: "aiohttp.ClientSession",
        requests: list[Request],
        name: str,
        names: dict[str, int],
    ) -> None:
        self.session, self.requests, self.name, self.names = session, requests, name, names
        self.records: list[Record] = []
        self.whole: dict[str | None, list[int]] = {
            None: []
        }  # prompt and output of those that ended

    async def run(self, parent: str | None = None) -> None:
        children = [request for request in self.requests if request.parent == parent]

        async def one(request: Request) -> None:
            await self.send(request)
            await self.run(request.request_id)

        await asyncio.gather(*map(one, children))

    async def send(self, request: Request) -> None:
        prompt = self.whole[request.parent] + request.prompt_token_ids
        body = {
            "prompt": prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,  # so that the tokens are named
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record, tokens, parser = Record(), [], SSEParser()
        begin = time.perf_counter()
        headers = {"x-session-id": self.name}
        async with self.session.post("/v1/completions", json=body, headers=headers) as response:
            record.engine = response.headers.get("x-engine", "")
            async for data in response.content.iter_any():
                for event in parser.feed(data):
                    self.take(event.data, record, tokens, begin)
        if len(tokens) != request.max_tokens:
            raise BenchError(f"{request.request_id}: {len(tokens)} of {request.max_tokens} tokens")
        self.records.append(record)
        self.whole[request.request_id] = prompt + tokens

    def take(self, data: str, record: Record, tokens: list[int], begin: float) -> None:
        if data == "[DONE]":
            return
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise BenchError(str(chunk["error"]))
        for choice in chunk["choices"]:
            for name in (choice.get("logprobs") or {}).get("tokens", []):
                if not tokens:
                    record.ttft = time.perf_counter() - begin
                prefix, _, number = name.partition("token_id:")
                tokens.append(int(number) if number and not prefix else self.names[name])
        if usage := chunk.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
