"""Part 09 with real processes: what becomes of requests, and of the machine, when a rank is lost."""

import contextlib
import gc
import os
import random
import re
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
from common.models.checkpoint import load_config, resolve
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.leaks import shared_names
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
        self.segments = shared_names()
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
        assert shared_names() <= self.segments

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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_rank_is_lost(how: signal.Signals, serve: Callable) -> None:
    """Every request ends with an error in time, and the server says what is wrong, and can end. (One
    that is lost while nothing is computed: see below, and the long form.)"""
    served = serve(2)
    assert listening([served.pid, *served.workers]) == {f"127.0.0.1:{served.server.port}"}
    lose(served, 1, how, busy=True)


@pytest.mark.long
@pytest.mark.parametrize("cycle", range(20))
def test_twenty_losses_in_a_row(cycle: int, serve: Callable, capsys: pytest.CaptureFixture) -> None:
    generator = random.Random(cycle)
    how = (signal.SIGKILL, signal.SIGSTOP)[cycle % 2]
    size, busy = 2 if cycle % 4 < 2 else 4, generator.random() < 0.7
    seconds = lose(serve(size), generator.randint(1, size - 1), how, busy)
    with capsys.disabled():
        print(f" {size} ranks, {how.name}, {'busy' if busy else 'idle'}: {seconds:.2f} s")


def test_ranks_end_with_rank_0(serve: Callable) -> None:
    """Killed; with one of the others stopped, which can read nothing."""
    served = serve(2)
    served.keep_busy()
    os.kill(served.workers[0], signal.SIGSTOP)
    os.kill(served.pid, signal.SIGKILL)
    assert all("Error" in last for _, last in served.ended())
    served.check_nothing_is_left()


def test_sigterm_to_all_drains(serve: Callable) -> None:
    """As systemd and torchrun send it."""
    served = serve(2)
    served.stream(max_tokens=150)
    wait_until(lambda: served.num_tokens > 5, 30)
    for pid in (*served.workers, served.pid):
        os.kill(pid, signal.SIGTERM)
    assert served.server.stop() == 0
    assert [last for _, last in served.ended()] == ["data: [DONE]"] and served.num_tokens > 150
    served.check_nothing_is_left()


# In one process with the engine.


def make_engine(size: int = 2, **flags: Any) -> Any:
    flags = {"num_blocks": 64, "rank_timeout": TIMEOUT} | flags
    config = module_of(9, "config").EngineConfig(
        model=MODEL, tensor_parallel_size=size, threads=1, **flags
    )
    return module_of(9, "engine").LLMEngine(config)


def workers_of(engine: Any) -> list[int]:
    return [process.pid for process in engine.runner.ranks.children.processes]


def tokens_of(engine: Any) -> list[list[int]]:
    return [c.token_ids for c in engine.generate(PROMPTS, GREEDY, progress=False)]


def anonymous_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Any]]:
    """Three, made at once in threads that end; the last is the collector's."""
    load_config(resolve(MODEL))  # transformers' own first import is not for several threads at once
    made: list[Any] = []
    flags: list[dict[str, Any]] = [{"size": 4}, {}, {"speculative": "self", "num_blocks": 40}]
    threads = [threading.Thread(target=lambda f=f: made.append(make_engine(**f))) for f in flags]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.sort(key=lambda engine: -engine.runner.ranks.size)
    yield made
    for engine in made:
        engine.shutdown()


def test_engines_side_by_side(engines: list[Any]) -> None:
    """Several in one process, of several sizes, in several threads."""
    assert [engine.runner.ranks.size for engine in engines] == [4, 2, 2]
    found: list[list[list[int]]] = []
    calls = [lambda e=e: found.extend(tokens_of(e) for _ in range(3)) for e in engines]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and all(tokens == found[0] for tokens in found)
    assert check_greedy(MODEL, list(zip(PROMPTS, found[0], strict=True))).is_right


def test_memory_is_steady_and_aborts_leave_nothing(engines: list[Any]) -> None:
    """Many requests, half of them aborted in the middle; then one like any other."""
    engine = engines[1]
    generator = random.Random(3)
    processes = [os.getpid(), *workers_of(engine)]
    held: list[list[int]] = []
    expected = tokens_of(engine)
    for number in range(160):
        prompt = [generator.randrange(2, 512) for _ in range(generator.randint(1, 60))]
        engine.add_request(Request(f"r{number}", prompt, GREEDY))
        for _ in range(2):
            engine.step()
        if number % 2:
            engine.abort(f"r{number - generator.randint(0, 3)}")
        if number in (80, 159):
            held.append([anonymous_bytes(pid) for pid in processes])
    while engine.has_unfinished():
        engine.step()
    engine.check_integrity()
    assert tokens_of(engine) == expected
    growth = [after - before for before, after in zip(*held, strict=True)]
    assert all(bytes_ < 4 << 20 for bytes_ in growth), growth


def test_an_engine_that_is_dropped_takes_its_ranks_along(engines: list[Any]) -> None:
    [worker] = workers_of(engines[2])
    del engines[2]
    wait_until(lambda: gc.collect() is not None and not is_alive(worker), 10)


def test_a_worker_that_fails_says_why(engines: list[Any]) -> None:
    """An order that makes no sense fails in one rank of four."""
    engine = engines[0]
    engine.runner.ranks.control.send([0, 1])
    for _ in range(2):
        with pytest.raises(RankError, match=r"^rank \d ended: .+$") as caught:
            tokens_of(engine)
        engine.drop_requests()
    assert engine.problem() == str(caught.value)
    workers = workers_of(engine)
    engine.shutdown()
    assert not any(map(is_alive, workers))


def test_a_stopped_rank_is_missed_while_nothing_is_computed(engines: list[Any]) -> None:
    engine = engines[1]
    [worker] = workers_of(engine)
    os.kill(worker, signal.SIGSTOP)
    wait_until(engine.problem, DEADLINE)
    silent = r"^rank 1 gives no sign of life for 3 s \(process \d+ is stopped.* of CPU time\)$"
    assert re.match(silent, engine.problem())
    with pytest.raises(RankError, match=silent):
        tokens_of(engine)
    engine.shutdown()
    assert not is_alive(worker)


# Starts that must fail.


def without_ranks(config: dict[str, Any]) -> str:
    """The one line with which an engine does not start, before it starts a process."""
    before = children(os.getpid())
    with pytest.raises(ValueError) as caught:
        make_engine(**config)
    assert children(os.getpid()) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_ranks_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    said = without_ranks({"size": 3})
    assert said.startswith("tensor_parallel_size is 3: 4 query heads and 2 KV heads cannot be")
    assert without_ranks({"size": 0}) == "tensor_parallel_size must be at least 1, not 0"
    assert "rank_timeout must be at least 1" in without_ranks({"rank_timeout": 0.0})
    missing = {"speculative": "draft", "draft_model": "/nowhere"}
    assert without_ranks(missing).startswith("model '/nowhere' is no folder")
    ranks = module_of(9, "ranks")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = torch.device("cuda")
    monkeypatch.setattr(ranks, "resolve_device", lambda *_: (gpu, torch.bfloat16))
    assert without_ranks({}) == "2 ranks from cuda:0 on, but torch sees 1 GPUs"


def test_a_rank_with_another_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had changed between: one line with the field and both values, and no process."""
    ranks, before = module_of(9, "ranks"), children(os.getpid())
    fingerprint = ranks.fingerprint
    monkeypatch.setattr(ranks, "fingerprint", lambda c: fingerprint(c) | {"checkpoint": "old"})
    with pytest.raises(ValueError, match=r"^checkpoint differs: old on rank 0, \w{16} on rank 1$"):
        make_engine()
    assert children(os.getpid()) == before


def test_a_cache_that_does_not_fit_is_one_line(serve: Callable) -> None:
    command = [sys.executable, "-m", "part09.server", "--model", MODEL, "--tp", "2", "--port", "0"]
    done = subprocess.run(
        [*command, "--kv-cache-memory", "100"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: 100 bytes are there for the KV cache, and a block of 16 tokens")


# torchrun.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def by_torchrun(rank: int, port: int, *more: str) -> RunningServer:
    """A rank as torchrun starts it on a host of its own."""
    values = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    flags = "--model", MODEL, "--tp", "2", "--num-blocks", "64", "--rank-timeout", "5", *more
    return RunningServer(9, *flags, env=values | {"MASTER_PORT": str(port)})


def test_ranks_of_two_hosts() -> None:
    """Two processes that meet at MASTER_ADDR; all get SIGTERM at once, and rank 0 drains."""
    port = free_port()
    both = [by_torchrun(rank, port) for rank in range(2)]
    try:
        both[0].wait_until_ready()
        body = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 120, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        url, lines = f"{both[0].base_url}/v1/completions", 0
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                lines, last = lines + 1, line
                if lines == 5:
                    for server in both:
                        server.process.send_signal(signal.SIGTERM)
        assert last == "data: [DONE]" and lines > 120
        assert [server.process.wait(30) for server in both] == [0, 0]
    finally:
        for server in both:
            server.kill()


@pytest.mark.long
def test_torchrun_itself() -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    command = [sys.executable, "-m", *launcher, "-m", "part09.server", "--model", MODEL]
    command += ["--tp", "2", "--port", str(port := free_port()), "--num-blocks", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/health").status_code == 200
            return False

        wait_until(answers, 120)
        body = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 9}
        answer = httpx.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        workers = children(process.pid)
        process.terminate()
        process.communicate(timeout=60)
    assert not any(map(is_alive, workers))
