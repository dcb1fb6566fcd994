"""Part 09 with real processes: what becomes of requests, and of the machine, when a rank is lost."""

import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import torch

from common.distributed import RankError
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy
from common.testing.parts import module_of
from common.testing.server import RunningServer

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [[(7 * i) % 500 + 2 for i in range(count)] for count in (1, 5, 30, 200)]
TIMEOUT = 3.0  # seconds: --rank-timeout
# A stopped rank that nobody waits for is missed after the timeout and two of its signs of life.
DEADLINE = TIMEOUT + 2 * TIMEOUT / 4 + 3.0  # and as much as a busy machine may add


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def children(pid: int) -> list[int]:
    return sorted(child.pid for child in psutil.Process(pid).children(recursive=True))


def segments() -> set[str]:
    return set(os.listdir("/dev/shm"))


def wait_until(condition: Callable[[], Any], seconds: float) -> float:
    """Seconds until it holds. Raises AssertionError when they are over."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"in vain for {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - begin


def listening(pids: list[int]) -> set[str]:
    found: set[str] = set()
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(f"{connection.laddr.ip}:{connection.laddr.port}")
    return found


class Served:
    """A server of some ranks, and clients of it."""

    def __init__(self, size: int) -> None:
        self.segments = segments()
        flags = "--num-blocks", "200", "--max-num-seqs", "4", "--rank-timeout", str(TIMEOUT)
        self.server = RunningServer(9, "--model", MODEL, "--tp", str(size), *flags)
        self.server.wait_until_ready()
        self.url, self.pid = self.server.base_url, self.server.process.pid
        self.workers = children(self.pid)
        assert len(self.workers) == size - 1
        self.ends: list[tuple[float, str]] = []  # when and how each stream ended
        self.clients: list[threading.Thread] = []
        self.num_tokens = 0

    def stream(self, max_tokens: int = 700) -> None:
        """One client, in a thread."""
        self.clients.append(threading.Thread(target=self._stream, args=(max_tokens,)))
        self.clients[-1].start()

    def _stream(self, max_tokens: int) -> None:
        body = {"model": MODEL, "prompt": [3, 4, 5], "max_tokens": max_tokens, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        last = ""
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=body, timeout=60
            ) as answer:
                for line in filter(None, answer.iter_lines()):
                    self.num_tokens += 1
                    last = line
        except httpx.TransportError as error:
            last = type(error).__name__
        self.ends.append((time.monotonic(), last))

    def keep_busy(self) -> None:
        """More requests than run at once; tokens flow, and the engine calls itself healthy."""
        for _ in range(7):
            self.stream()
        wait_until(lambda: self.num_tokens > 20, 30)
        assert self.health().status_code == 200

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=10)

    def ended(self) -> list[tuple[float, str]]:
        for client in self.clients:
            client.join(60)
            assert not client.is_alive(), "a request without an end"
        return self.ends

    def check_nothing_is_left(self) -> None:
        wait_until(lambda: not any(map(is_alive, [self.pid, *self.workers])), 5)
        assert segments() == self.segments

    def close(self) -> None:
        for pid in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.kill()


@pytest.fixture
def serve() -> Iterator[Callable[[int], Served]]:
    started: list[Served] = []

    def start(size: int) -> Served:
        started.append(Served(size))
        return started[-1]

    yield start
    for served in started:
        served.close()


def lose(served: Served, rank: int, how: signal.Signals, busy: bool) -> float:
    """Lose a rank. Returns seconds until the server says so; requests have ended by then."""
    if busy:
        served.keep_busy()
    os.kill(served.workers[rank - 1], how)
    begin = time.monotonic()
    wait_until(lambda: served.health().status_code == 503, DEADLINE)
    seconds = time.monotonic() - begin
    said = served.health().json()["reason"]
    killed = f"rank {rank} was killed by SIGKILL"
    assert said == killed if how == signal.SIGKILL else said.startswith(f"rank {rank} "), said
    for end, last in served.ended():
        assert end - begin < DEADLINE and last.startswith('data: {"error"'), last
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": MODEL, "prompt": [3]})
    assert answer.status_code >= 500, answer.text
    assert served.server.stop() == 0
    lines = served.server.output.splitlines()
    assert lines[-1] == f"the engine has ended: {said}" and len(lines) < 4, lines
    served.check_nothing_is_left()
    return seconds


LOSSES = [
    pytest.param(3, 2, signal.SIGKILL, True),
    pytest.param(2, 1, signal.SIGSTOP, True),
    pytest.param(2, 1, signal.SIGSTOP, False),
]


@pytest.mark.parametrize(("size", "rank", "how", "busy"), LOSSES)
def test_a_rank_is_lost(
    size: int, rank: int, how: signal.Signals, busy: bool, serve: Callable
) -> None:
    """Every request ends with an error in time, and the server says what is wrong, and can end."""
    served = serve(2 if size == 3 else size)
    assert listening([served.pid, *served.workers]) == {f"127.0.0.1:{served.server.port}"}
    lose(served, min(rank, len(served.workers)), how, busy)


@pytest.mark.long
def test_twenty_losses_in_a_row(serve: Callable, capsys: pytest.CaptureFixture) -> None:
    generator = random.Random(9)
    for cycle in range(20):
        how = (signal.SIGKILL, signal.SIGSTOP)[cycle % 2]
        size, busy = 2 if cycle % 4 < 2 else 4, generator.random() < 0.7
        seconds = lose(serve(size), generator.randint(1, size - 1), how, busy)
        with capsys.disabled():
            print(f"cycle {cycle}: {size} ranks, {how.name}, busy {busy}: {seconds:.2f} s")


def test_ranks_end_with_rank_0(serve: Callable) -> None:
    """Killed; with one of the others stopped, which can read nothing."""
    served = serve(2)
    served.keep_busy()
    os.kill(served.workers[0], signal.SIGSTOP)
    os.kill(served.pid, signal.SIGKILL)
    assert all("Error" in last for _, last in served.ended())
    served.check_nothing_is_left()


def test_sigterm_to_all_drains(serve: Callable) -> None:
    """As systemd and torchrun send it. Then one that Ctrl-C ends."""
    served = serve(2)
    served.stream(max_tokens=300)
    wait_until(lambda: served.num_tokens > 5, 30)
    for pid in (*served.workers, served.pid):
        os.kill(pid, signal.SIGTERM)
    assert served.server.stop() == 0
    assert [last for _, last in served.ended()] == ["data: [DONE]"] and served.num_tokens > 300
    served.check_nothing_is_left()
