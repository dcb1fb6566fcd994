"""A soak of prefill and decode workers: load at 0.8 of what they can do, and a fault every few seconds.

`python -m common.testing.disagg_soak --minutes 15 --every 20`. A proxy starts one worker of each kind. Faults
take turns: a worker is killed, or stopped for a while and goes on, or the connections between the
workers are cut. Clients leave all the time. What must hold: every answer is whole and has the tokens
that it has without faults; only a stream that had begun on a decode worker that was killed may end,
and then with an error. At the end nothing runs or waits, no block is held on either side, no thread or
file is left over, and after the end no process and no name in /dev/shm.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from common.testing.disagg_workers import DECODE, PREFILL, Workers, cut_connections
from common.testing.server import RunningServer
from common.testing.soak import metric, own_memory

PART = 13
NUM_PROMPTS, MAX_TOKENS = 24, 24
VOCABULARY = 512  # of the tiny models
KILL, STOP, STOP_LONG, CUT = "kill", "stop", "stop long", "cut"
NO_WORKER = ": no worker"  # that the fault could be done to
FAULTS = (
    (CUT, PREFILL), (STOP_LONG, PREFILL), (KILL, PREFILL), (STOP, DECODE), (CUT, DECODE),
    (KILL, DECODE), (STOP, PREFILL), (CUT, PREFILL), (STOP_LONG, DECODE),
)  # fmt: skip
STOP_SECONDS, LONG_SECONDS = 0.7, 3.0  # shorter and longer than what a decode worker waits
FLAGS = (
    "--role", "proxy", "--num-prefill", "1", "--num-decode", "1", "--kv-timeout", "1.5",
    "--kv-lease", "3", "--kv-min-tokens", "8", "--health-interval", "0.2", "--num-blocks", "160",
    "--block-size", "4", "--max-num-seqs", "8", "--threads", "1", "--max-waiting", "5000",
)  # fmt: skip
RESTART_SECONDS = 15.0  # within which there is a worker again
SETTLE_SECONDS = 15.0  # leases, and what is still on its way
SPARE_FILES, SPARE_THREADS = 12, 6  # that idle connections and pools may have more at the end


@dataclass
class Soak:
    """What has happened so far. done, faults: what -> how often."""

    client: httpx.AsyncClient
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    answers: dict[int, list[str]] = field(default_factory=dict)  # prompt's number: its tokens
    killed: list[float] = field(default_factory=list)  # times at which a decode worker was
    turns: list[tuple[str, str]] = field(default_factory=lambda: list(FAULTS))  # the next is first

    def body(self, number: int, *, stream: bool) -> dict[str, Any]:
        """One of the prompts, greedy: its answer is known."""
        draw = random.Random(f"prompt {number}")
        length = draw.choice([3, 12, 40, 90, 160])
        return {
            "prompt": [draw.randrange(2, VOCABULARY) for _ in range(length)],
            "max_tokens": draw.randint(2, MAX_TOKENS),
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": stream,
        }

    async def learn(self) -> None:
        """Each prompt's answer, before the first fault."""
        for number in range(NUM_PROMPTS):
            answer = await self.client.post(
                "/v1/completions", json=self.body(number, stream=False), timeout=60
            )
            answer.raise_for_status()
            self.answers[number] = answer.json()["choices"][0]["logprobs"]["tokens"]

    async def request(self, may_leave: bool = True) -> None:
        number, began = self.rng.randrange(NUM_PROMPTS), time.monotonic()
        stream = self.rng.random() < 0.5
        leaves = self.rng.choice([0, 1, 3]) if may_leave and self.rng.random() < 0.15 else None
        tokens: list[str] = []
        try:
            if stream:
                kind = await self.streamed(number, leaves, tokens)
            else:
                kind = await self.whole(number, leaves, tokens)
        except httpx.TimeoutException:
            kind = "left" if leaves is not None else "no answer in time"
        except httpx.HTTPError as error:
            kind = repr(error)
        if kind in ("whole", "streamed") and tokens != self.answers[number]:
            kind = f"other tokens: {tokens}, not {self.answers[number]}"
        if kind == "broken off":
            expected = self.answers[number][: len(tokens)]
            if tokens != expected or not any(at >= began - 1 for at in self.killed):
                kind = f"a stream broke off after {len(tokens)} tokens, and no worker was killed"
        self.done[kind if kind in ("whole", "streamed", "left", "broken off") else "error"] += 1
        if kind not in ("whole", "streamed", "left", "broken off"):
            self.errors.append(f"{time.monotonic() - began:.1f} s: {kind}"[:300])

    async def whole(self, number: int, leaves: int | None, tokens: list[str]) -> str:
        timeout = 60.0 if leaves is None else 0.005 + 0.02 * leaves
        body = self.body(number, stream=False)
        answer = await self.client.post("/v1/completions", json=body, timeout=timeout)
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text}"
        tokens += answer.json()["choices"][0]["logprobs"]["tokens"]
        return "whole"

    async def streamed(self, number: int, leaves: int | None, tokens: list[str]) -> str:
        """ "broken off": an error event after the first token."""
        body, last = self.body(number, stream=True), ""
        async with self.client.stream("POST", "/v1/completions", json=body, timeout=60) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code}: {(await answer.aread()).decode()}"
            async for line in answer.aiter_lines():
                if leaves is not None and len(tokens) >= leaves:
                    return "left"
                if not line.startswith("data: "):
                    continue
                last = line[6:]
                if last == "[DONE]":
                    continue
                event = json.loads(last)
                if "error" in event:
                    return "broken off" if tokens else f"an error before a token: {last}"
                for choice in event["choices"]:
                    tokens += (choice.get("logprobs") or {}).get("tokens", [])
        return "streamed" if last == "[DONE]" else f"the stream ends with {last!r}"

    async def closed_loop(self, seconds: float, clients: int) -> float:
        """Requests a second that the workers can do."""
        begin, before = time.perf_counter(), self.done.total()

        async def one() -> None:
            while time.perf_counter() < begin + seconds:
                await self.request(may_leave=False)

        await asyncio.gather(*(one() for _ in range(clients)))
        return (self.done.total() - before) / (time.perf_counter() - begin)

    async def open_loop(self, seconds: float, rate: float) -> None:
        begin, tasks, at = time.perf_counter(), set(), 0.0
        while at < seconds:
            at += self.rng.expovariate(rate)
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            task = asyncio.create_task(self.request())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def fault(self, kind: str, worker: str, workers: Workers) -> None:
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            process = await asyncio.to_thread(workers.find, worker)
            other = await asyncio.to_thread(workers.find, DECODE if worker == PREFILL else PREFILL)
            if (process and other) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        if process is None or other is None:
            self.faults[f"{kind} {worker}{NO_WORKER}"] += 1
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            if kind == KILL:
                self.killed += [time.monotonic()] if worker == DECODE else []
                process.kill()
            elif kind == CUT:
                cut = await asyncio.to_thread(cut_connections, process, other)
                kind = kind if cut else "nothing to cut at"
            else:
                process.suspend()
                await asyncio.sleep(STOP_SECONDS if kind == STOP else LONG_SECONDS)
                process.resume()
        self.faults[f"{kind} {worker}"] += 1

    async def all_faults(self, workers: Workers, seconds: float, every: float) -> None:
        """One after the other. A kill waits until both workers are well: each request has a worker that
        can finish it."""
        end, faults = time.monotonic() + seconds, self.turns
        while time.monotonic() + every < end:
            await asyncio.sleep(every)
            are_well = await asyncio.to_thread(workers.are_well)
            number = next(i for i, (kind, _) in enumerate(faults) if are_well or kind != KILL)
            faults.append(faults.pop(number))
            await self.fault(*faults[-1], workers)

    async def load_and_faults(
        self, workers: Workers, seconds: float, every: float, rate: float
    ) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.all_faults(workers, seconds, every))
            group.create_task(self.open_loop(seconds, rate))


def held(pid: int) -> dict[str, int]:
    """Files, without connections by TCP, of which clients keep as many as they like; threads; bytes."""
    process = psutil.Process(pid)
    num_files = process.num_fds() - len(process.net_connections("tcp"))
    return {"files": num_files, "threads": process.num_threads(), "bytes": own_memory(pid)}


async def settle(server: RunningServer, workers: Workers) -> dict[str, float]:
    """What is left after a while: blocks held (share of the caches), running, waiting."""
    names = {
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "kv_usage": "vllm:kv_cache_usage_perc",
    }
    deadline, found = time.monotonic() + 60.0, {"running": 1.0}
    while time.monotonic() < deadline and not await asyncio.to_thread(workers.are_well):
        await asyncio.sleep(0.2)
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(found.values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.3)
        found = {key: metric(server.base_url, name) for key, name in names.items()}
    return found


async def soak(
    server: RunningServer, seconds: float, every: float, load: float, seed: int
) -> dict[str, Any]:
    """Run it against a proxy that is ready. Returns what there is to judge by."""
    workers, pids = Workers(server), {}
    # Kept for less time than the server keeps them: else one is used while it is being closed.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=server.base_url, limits=limits) as client:
        run = Soak(client, random.Random(seed))
        await run.learn()
        capacity = await run.closed_loop(min(10.0, seconds / 8), clients=12)
        print(f"Capacity: {capacity:.1f} requests/s; load: {load * capacity:.1f}", file=sys.stderr)
        # What a backlog takes is not given back, so memory is first looked at after some faults.
        await run.load_and_faults(workers, 0.25 * seconds, every, load * capacity)
        await settle(server, workers)
        for kind in (PREFILL, DECODE):
            if process := await asyncio.to_thread(workers.find, kind):
                pids[process.pid] = kind
        pids[server.process.pid] = "proxy"
        early = {pid: held(pid) for pid in pids}
        await run.load_and_faults(workers, 0.6 * seconds, every, load * capacity)
    left = await settle(server, workers)
    workers.note()
    late = {pid: held(pid) for pid in pids if psutil.pid_exists(pid)}
    return {
        "capacity_rps": capacity,
        "done": dict(run.done),
        "faults": dict(run.faults),
        "errors": run.errors,
        "left": left,
        "growth": [
            {"process": pids[pid], "early": early[pid], "late": late[pid]} for pid in sorted(late)
        ],
        "workers": workers,
    }


def complaints(result: dict[str, Any], growth: float) -> list[str]:
    """What should not be. growth: of memory, that may be, of processes that were there all the time."""
    found = [f"error: {error}" for error in result["errors"][:8]]
    found += [f"{len(result['errors'])} errors"] if result["errors"] else []
    found += [f"{name} is {value} at the end" for name, value in result["left"].items() if value]
    for one in result["growth"]:
        early, late = one["early"], one["late"]
        most = {
            "files": early["files"] + SPARE_FILES,
            "threads": early["threads"] + SPARE_THREADS,
            "bytes": growth * early["bytes"],
        }
        found += [
            f"{one['process']}: {early[name]} {name}, then {late[name]}"
            for name in most
            if late[name] > most[name]
        ]
    return found


@contextlib.contextmanager
def proxy(*flags: str, model: str = "random:tiny-llama") -> Iterator[RunningServer]:
    """A proxy with its workers; afterwards ended by SIGTERM, or killed with all of them."""
    server = RunningServer(PART, "--model", model, *FLAGS, *flags)
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        if server.process.poll() is None:
            for process in psutil.Process(server.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
            server.kill()


def run_soak(
    seconds: float, every: float, load: float, seed: int, growth: float, *flags: str
) -> tuple[dict[str, Any], list[str]]:
    """(what happened, what should not be), after all processes have ended."""
    with proxy(*flags) as server:
        result = asyncio.run(soak(server, seconds, every, load, seed))
        found = complaints(result, growth)
    workers = result.pop("workers")
    deadline = time.monotonic() + 10.0
    while workers.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    found += [f"process {pid} is left" for pid in workers.left()]
    found += [f"{path} is left" for path in sorted(workers.shared) if Path(path).exists()]
    return result, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--load", type=float, default=0.8, help="share of the capacity")
    parser.add_argument("--transfer", default="shm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    flags = ("--kv-transfer", args.transfer)
    result, found = run_soak(60 * args.minutes, args.every, args.load, args.seed, 1.1, *flags)
    print(json.dumps(result | {"errors": result["errors"][:8]}))
    for complaint in found:
        print(complaint, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
