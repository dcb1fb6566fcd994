"""A soak: open-loop load near saturation for a long time, with clients that leave.

`python -m common.testing.soak --part 6 --minutes 15`. First the server's capacity is measured with a
closed loop; then requests of every kind arrive at random (a Poisson process) at --load of it. Some
clients disconnect after a few tokens, some before the first. What must hold at the end: every
other request got its whole answer, nothing is running or waiting, no block of the KV cache is
held, and the memory of the server's processes is what it was after the first tenth.

    python -m common.testing.soak --part 15 --everything --fault-every 20

has a server with all that part 15 can do at once on one machine, whose requests also ask for grammars and
tools, and kills one of its two HTTP processes every so many seconds. A request that ends wrongly within a
second of such a fault is counted apart.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from common.bench.serving.sse import SSEParser
from common.testing.server import server_process

GROWTH = 1.05  # of memory, between the first tenth and the end
EXPLAINED = 1.0  # seconds around a fault in which a request may end wrongly
SMALL = ("--num-blocks", "80", "--block-size", "4", "--max-num-seqs", "8", "--threads", "1")
EVERYTHING = (
    *("--speculative", "ngram", "--prefix-cache", "radix", "--offload", "both"),
    *("--quantization", "int8", "--activations", "int8", "--kv-cache-dtype", "int8"),
    *("--engine-core", "process", "--api-server-count", "2"),
    *("--num-blocks", "240"),  # a prompt with tools takes 90 of them
)
WORD = r"[a-z]{1,20}( [a-z]{1,20}){0,3}"
TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}


@dataclass
class Soak:
    """What has happened so far. done: outcome -> how many requests. has_text: requests may ask for
    grammars and tools. faults: when each was, in seconds of `time.perf_counter`."""

    url: str
    rng: random.Random
    has_text: bool = False
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """A request of some kind, on completions."""
        rng = self.rng
        length = rng.choice([1, 8, 20, 60, 150])
        kinds = [{}, {"n": 2}, {"logprobs": 3}, {"frequency_penalty": 1.0}, {"temperature": 0}]
        kinds += [{"seed": 7}, {"stop_token_ids": list(range(0, 256, 40))}]
        kinds += 2 * [{"guided_regex": WORD, "ignore_eos": False}] if self.has_text else []
        return {
            "prompt": [rng.randrange(2, 256) for _ in range(rng.randint(1, length))],
            "max_tokens": rng.randint(1, 40),
            "ignore_eos": True,
            "stream": rng.random() < 0.6,
            **rng.choice(kinds),
        }

    async def request(self, client: httpx.AsyncClient, may_leave: bool) -> None:
        """One request to its end, or until its client has had enough."""
        if self.has_text and self.rng.random() < 0.1:
            return await self.tool_call(client)
        body = self.body()
        begin = time.perf_counter()
        wrong = partial(self.check, begin)
        patience = self.rng.choice([0, 1, 3]) if may_leave and self.rng.random() < 0.15 else None
        try:
            if not body["stream"]:
                timeout = None if patience is None else 0.02 * patience + 0.005
                answer = await client.post("/v1/completions", json=body, timeout=timeout)
                if answer.status_code != 200:
                    return wrong(False, answer.text)
                counted = answer.json()["usage"]["completion_tokens"]
                wrong(0 < counted <= body["max_tokens"] * body.get("n", 1), f"{counted} tokens")
                self.done["whole"] += 1
                return
            events: list[str] = []
            async with client.stream("POST", "/v1/completions", json=body, timeout=None) as answer:
                wrong(answer.status_code == 200, str(answer.status_code))
                parser = SSEParser()  # a text may have what httpx takes for the end of a line
                async for piece in answer.aiter_bytes():
                    events += [event.data for event in parser.feed(piece)]
                    if patience is not None and len(events) >= patience:
                        self.done["left"] += 1
                        return
            wrong(events[-1:] == ["[DONE]"], f"the stream ends with {events[-1:]}")
            if not events or events[-1] != "[DONE]":
                return
            finished = [json.loads(event)["choices"] for event in events[:-1]]
            reasons = [c["finish_reason"] for choices in finished for c in choices]
            ends = [reason for reason in reasons if reason is not None]
            text = "".join(c.get("text") or "" for choices in finished for c in choices)
            if "guided_regex" in body and ends == ["stop"]:
                wrong(re.fullmatch(WORD, text) is not None, f"{text!r} is not of the grammar")
            wrong(len(ends) == body.get("n", 1), f"finish reasons: {ends}")
            self.done["streamed"] += 1
        except httpx.TimeoutException:
            self.done["left"] += 1
        except httpx.HTTPError as error:
            wrong(False, repr(error))

    async def tool_call(self, client: httpx.AsyncClient) -> None:
        """A chat whose answer must be a call of a tool."""
        begin = time.perf_counter()
        body = {"messages": [{"role": "user", "content": "Look."}], "max_tokens": 150}
        body |= {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
        body |= {"seed": self.rng.randrange(100)}
        try:
            answer = await client.post("/v1/chat/completions", json=body, timeout=None)
            if answer.status_code != 200:
                return self.check(begin, False, answer.text)
            [choice] = answer.json()["choices"]
            calls = choice["message"].get("tool_calls") or []
            is_call = bool(calls) and calls[0]["function"]["name"] == TOOL["name"]
            self.check(begin, is_call or choice["finish_reason"] == "length", str(choice)[:200])
            self.done["called"] += 1
        except httpx.HTTPError as error:
            self.check(begin, False, repr(error))

    def check(self, begin: float, holds: bool, message: str) -> None:
        """begin: of the request. What does not hold is an error unless a fault explains it."""
        if holds:
            return
        now = time.perf_counter()
        if any(begin - EXPLAINED < fault < now + EXPLAINED for fault in self.faults):
            self.done["faulted"] += 1
            return
        self.done["error"] += 1
        since = f", {begin - self.faults[-1]:.1f} s after a fault" if self.faults else ""
        self.errors.append(f"{message[:200]} (begun {now - begin:.1f} s ago{since})")

    async def inject(self, pid: int, every: float) -> None:
        """Kill one of the server's HTTP processes every so many seconds."""
        while True:
            await asyncio.sleep(every)
            found = [p for p in psutil.Process(pid).children() if "api_server" in str(p.cmdline())]
            if not found:  # they start again
                continue
            self.faults.append(time.perf_counter())
            self.rng.choice(found).send_signal(signal.SIGKILL)

    async def closed_loop(self, client: httpx.AsyncClient, seconds: float, clients: int) -> float:
        """Requests a second that the server can do."""
        end, before = time.perf_counter() + seconds, self.done.total()

        async def one() -> None:
            while time.perf_counter() < end:
                await self.request(client, may_leave=False)

        begin = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return (self.done.total() - before) / (time.perf_counter() - begin)

    async def open_loop(self, client: httpx.AsyncClient, seconds: float, rate: float) -> None:
        """Requests that arrive whether or not the last ones are done."""
        begin, tasks, at = time.perf_counter(), set(), 0.0
        while at < seconds:
            at += self.rng.expovariate(rate)
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            task = asyncio.create_task(self.request(client, may_leave=True))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


def family(pid: int) -> list[int]:
    """A process and all its children."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


async def together(pid: int, count: int) -> None:
    """Until so many processes have been there for a while: the one killed last is back, and has
    loaded what it loads. At most a minute."""
    begin = time.perf_counter()
    while len(family(pid)) < count and time.perf_counter() < begin + 45:
        await asyncio.sleep(0.1)
    await asyncio.sleep(15)


def memory(pid: int) -> int:
    """Bytes that belong to a process and its children alone, swapped out or not."""
    return sum(map(own_memory, family(pid)))


def own_memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def idle(url: str) -> None:
    """Until nothing runs or waits; at most half a minute."""
    for _ in range(300):
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        if not any(metric(url, name) for name in names):
            return
        await asyncio.sleep(0.1)


async def soak(
    url: str,
    pid: int,
    seconds: float,
    load: float,
    seed: int,
    has_text: bool = False,
    fault_every: float = 0.0,
) -> dict[str, Any]:
    """Run it against a server. fault_every: seconds between two faults; 0: none. Returns what there is to
    judge by."""
    run = Soak(url, random.Random(seed), has_text)
    # Kept for less time than the server keeps them: else one is used while it is being closed.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:
        capacity = await run.closed_loop(client, min(20.0, seconds / 5), clients=16)
        print(f"Capacity: {capacity:.1f} requests/s; load: {load * capacity:.1f}", file=sys.stderr)
        await run.open_loop(client, seconds / 10, load * capacity)
        early, processes = memory(pid), len(family(pid))
        faults = asyncio.create_task(run.inject(pid, fault_every)) if fault_every else None
        await run.open_loop(client, seconds * 9 / 10, load * capacity)
        if faults is not None:
            faults.cancel()
            await together(pid, processes)
        await idle(url)
    return {
        "capacity_rps": capacity,
        "done": dict(run.done),
        "errors": run.errors,
        "faults": len(run.faults),
        "early_bytes": early,
        "late_bytes": memory(pid),
        "running": metric(url, "vllm:num_requests_running"),
        "waiting": metric(url, "vllm:num_requests_waiting"),
        "kv_usage": metric(url, "vllm:kv_cache_usage_perc"),
        "preemptions": metric(url, "vllm:num_preemptions_total"),
    }


def complaints(result: dict[str, Any], growth: float = GROWTH) -> list[str]:
    """What should not be. growth: of memory, that may be."""
    found = [f"error: {error}" for error in result["errors"][:5]]
    found += [f"{result['done'].get('error', 0)} errors"] if result["errors"] else []
    for name in ("running", "waiting", "kv_usage"):
        found += [f"{name} is {result[name]} at the end"] if result[name] else []
    if result["late_bytes"] > growth * result["early_bytes"]:
        found.append(
            f"memory: {result['early_bytes'] >> 10} KiB, then {result['late_bytes'] >> 10}"
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--model", default="random:tiny-llama")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--load", type=float, default=0.9, help="share of the capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everything", action="store_true", help="all that part 15 has, at once")
    parser.add_argument("--fault-every", type=float, default=0.0, help="seconds (default: never)")
    args = parser.parse_args(argv)
    if args.fault_every and not args.everything:
        parser.error("--fault-every needs --everything, whose server has HTTP processes to kill")
    flags = [*SMALL, "--max-waiting", "5000", *(EVERYTHING if args.everything else ())]
    with contextlib.ExitStack() as stack:
        model = args.model
        if args.everything:
            from common.testing.structured import write_model

            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = write_model(Path(folder) / "model")
        server = stack.enter_context(server_process(args.part, "--model", model, *flags))
        url, pid, seconds = server.base_url, server.process.pid, 60 * args.minutes
        more = args.everything, args.fault_every
        result = asyncio.run(soak(url, pid, seconds, args.load, args.seed, *more))
    print(json.dumps(result | {"errors": result["errors"][:5]}))
    for complaint in complaints(result):
        print(complaint, file=sys.stderr)
    return 1 if complaints(result) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
