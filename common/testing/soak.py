"""A soak: open-loop load near saturation for a long time, with clients that leave.

`python -m common.testing.soak --part 6 --minutes 15`. First the server's capacity is measured with a
closed loop; then requests of every kind arrive at random (a Poisson process) at --load of it. Some
clients disconnect after a few tokens, some before the first. What must hold at the end: every
other request got its whole answer, nothing is running or waiting, no block of the KV cache is
held, and the memory of the process is what it was after the first tenth.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common.testing.server import server_process

GROWTH = 1.05  # of memory, between the first tenth and the end


@dataclass
class Soak:
    """What has happened so far. done: outcome -> how many requests."""

    url: str
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """A request of some kind."""
        rng = self.rng
        length = rng.choice([1, 8, 20, 60, 150])
        kinds = [{}, {"n": 2}, {"logprobs": 3}, {"frequency_penalty": 1.0}, {"temperature": 0}]
        kinds += [{"seed": 7}, {"stop_token_ids": list(range(0, 512, 40))}]
        return {
            "prompt": [rng.randrange(2, 512) for _ in range(rng.randint(1, length))],
            "max_tokens": rng.randint(1, 40),
            "ignore_eos": True,
            "stream": rng.random() < 0.6,
            **rng.choice(kinds),
        }

    async def request(self, client: httpx.AsyncClient, may_leave: bool) -> None:
        """One request to its end, or until its client has had enough."""
        body = self.body()
        patience = self.rng.choice([0, 1, 3]) if may_leave and self.rng.random() < 0.15 else None
        try:
            if not body["stream"]:
                timeout = None if patience is None else 0.02 * patience + 0.005
                answer = await client.post("/v1/completions", json=body, timeout=timeout)
                if answer.status_code != 200:
                    return self.check(False, answer.text)
                counted = answer.json()["usage"]["completion_tokens"]
                self.check(
                    0 < counted <= body["max_tokens"] * body.get("n", 1), f"{counted} tokens"
                )
                self.done["whole"] += 1
                return
            events: list[str] = []
            async with client.stream("POST", "/v1/completions", json=body, timeout=None) as answer:
                self.check(answer.status_code == 200, str(answer.status_code))
                async for line in answer.aiter_lines():
                    if patience is not None and len(events) >= patience:
                        self.done["left"] += 1
                        return
                    if line.startswith("data: "):
                        events.append(line[6:])
            self.check(events[-1:] == ["[DONE]"], f"the stream ends with {events[-1:]}")
            finished = [json.loads(event)["choices"] for event in events[:-1]]
            reasons = [c["finish_reason"] for choices in finished for c in choices]
            ends = [reason for reason in reasons if reason is not None]
            self.check(len(ends) == body.get("n", 1), f"finish reasons: {ends}")
            self.done["streamed"] += 1
        except httpx.TimeoutException:
            self.done["left"] += 1
        except httpx.HTTPError as error:
            self.check(False, repr(error))

    def check(self, holds: bool, message: str) -> None:
        if not holds:
            self.done["error"] += 1
            self.errors.append(message[:200])

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


def memory(pid: int) -> int:
    """Bytes that belong to a process alone, swapped out or not."""
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


async def soak(url: str, pid: int, seconds: float, load: float, seed: int) -> dict[str, Any]:
    """Run it against a server. Returns what there is to judge by."""
    run = Soak(url, random.Random(seed))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:
        capacity = await run.closed_loop(client, min(20.0, seconds / 5), clients=16)
        print(f"Capacity: {capacity:.1f} requests/s; load: {load * capacity:.1f}", file=sys.stderr)
        await run.open_loop(client, seconds / 10, load * capacity)
        early = memory(pid)
        await run.open_loop(client, seconds * 9 / 10, load * capacity)
        await idle(url)
    return {
        "capacity_rps": capacity,
        "done": dict(run.done),
        "errors": run.errors,
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
    args = parser.parse_args(argv)
    pool = ["--num-blocks", "80", "--block-size", "4", "--max-num-seqs", "8", "--threads", "1"]
    pool += ["--max-waiting", "5000"]
    with server_process(args.part, "--model", args.model, *pool) as server:
        url, pid = server.base_url, server.process.pid
        result = asyncio.run(soak(url, pid, 60 * args.minutes, args.load, args.seed))
    print(json.dumps(result | {"errors": result["errors"][:5]}))
    for complaint in complaints(result):
        print(complaint, file=sys.stderr)
    return 1 if complaints(result) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
