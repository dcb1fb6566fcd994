"""A sender or receiver of KV in a process of its own, to be killed, stopped and measured.

A `Nursery` is a process that has imported everything and starts no thread; it forks workers, which so
are there in milliseconds. `Worker` is one of them, or a process by itself. A worker reads a job in JSON on the
first line of its standard input, then calls, one a line; a line of its standard output is an answer or
an event (a prompt has come, a transfer was cancelled).
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.kernels.cpu.compile import compile_kernel
from common.kv_transfer import PrefillRequest, Receiver, Sender, allocate_shared

SECRET = b"a secret for tests"


class Nursery:
    """Where workers come from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "common.testing.kv_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._socket = ours

    def fork(self, stdin: int, stdout: int) -> int:
        """A new worker with these descriptors; its process id."""
        socket.send_fds(self._socket, [b"f"], [stdin, stdout])
        return int(self._socket.recv(20))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class Worker:
    """job: role (sender or receiver), shape, seed of the contents or None for zeros, and the keyword
    arguments of Sender or Receiver. `auto`: the sender computes each prompt at once, into its blocks
    `auto` in turn."""

    def __init__(self, nursery: Nursery | None = None, **job: Any) -> None:
        (stdin, self._in), (self._out, stdout) = os.pipe(), os.pipe()
        if nursery is None:
            command = [sys.executable, "-m", "common.testing.kv_worker"]
            self.pid = subprocess.Popen(command, stdin=stdin, stdout=stdout).pid
        else:
            self.pid = nursery.fork(stdin, stdout)
        os.close(stdin)
        os.close(stdout)
        self.events: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.begin(job)
        self.address: str = self._answers.get(timeout=60)

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of the sender or receiver, or of the process: peek, poison."""
        self.begin([name, *arguments])
        return self.answer()

    def begin(self, what: Any) -> None:
        """A call whose answer is for later."""
        os.write(self._in, (json.dumps(what) + "\n").encode())

    def answer(self) -> Any:
        return self._answers.get(timeout=60)

    def event(self) -> list[Any]:
        """The next one: ["prefill", id, num_blocks] or ["cancel", id]."""
        return self.events.get(timeout=30)

    def stop(self) -> None:
        """It stands still when this returns: the signal reaches its threads one by one, and later."""
        os.kill(self.pid, signal.SIGSTOP)
        while any(state != "T" for state in thread_states(self.pid)):
            time.sleep(0.0001)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """It is gone when this returns."""
        os.kill(self.pid, signal.SIGKILL)
        self._reader.join(timeout=60)

    def close(self) -> None:
        if self._reader.is_alive():
            self.kill()
        os.close(self._in)
        os.close(self._out)

    def _read(self) -> None:
        with os.fdopen(os.dup(self._out)) as lines:
            for line in lines:
                kind, value = json.loads(line)
                (self.events if kind == "event" else self._answers).put(value)


def thread_states(pid: int) -> list[str]:
    """R runs, S sleeps, T is stopped (proc(5)); a thread that has ended meanwhile is left out."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return states


def contents(shape: list[int], seed: int | None, shared: bool = False) -> Tensor:
    """A cache of random float32, each byte pattern its own; zeros without a seed."""
    cache = allocate_shared(tuple(shape), torch.float32) if shared else torch.zeros(shape)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        cache.view(torch.int32).random_(1, 1 << 30, generator=generator)
    return cache


class Process:
    """The worker's inside."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self.auto: list[int] | None = job.pop("auto", None)
        role, shape, seed = job.pop("role"), job.pop("shape"), job.pop("seed", None)
        job = {"fingerprint": {"model": "test"}, "secret": SECRET, **job}
        self.cache = contents(shape, seed, role == "sender" and job["transport"] == "shm")
        self.end: Sender | Receiver
        if role == "sender":
            job |= {"on_prefill": self.on_prefill, "on_cancel": self.on_cancel}
            self.end = Sender([self.cache], **job)
        else:
            self.end = Receiver([self.cache], **job)
        self.say("answer", getattr(self.end, "address", ""))

    def on_prefill(self, request: PrefillRequest) -> None:
        if self.auto is None:
            self.say("event", ["prefill", request.transfer_id, request.num_blocks])
            return
        assert isinstance(self.end, Sender)
        blocks = self.auto[: request.num_blocks]
        for layer in range(self.cache.shape[1]):
            self.end.ready(request.transfer_id, blocks, layer, len(blocks))
        self.end.finish(request.transfer_id, len(blocks))

    def on_cancel(self, transfer_id: str) -> None:
        self.say("event", ["cancel", transfer_id])

    def say(self, kind: str, value: Any) -> None:
        with self._lock:
            print(json.dumps([kind, value]), flush=True)

    def answer(self, name: str, *arguments: Any) -> Any:
        if name == "peek":  # the sum of a block's integers
            return int(self.cache[arguments[0]].view(torch.int32).sum())
        if name == "poison":
            self.cache[arguments[0]] = float("nan")
            return None
        result = getattr(self.end, name)(*arguments)
        if name == "finished":
            return [[f.transfer_id, f.num_blocks, f.error] for f in result]
        return result


def serve_calls() -> None:
    process = Process(json.loads(sys.stdin.readline()))
    for line in iter(sys.stdin.readline, ""):
        process.say("answer", process.answer(*json.loads(line)))


def fork_workers(nursery: socket.socket) -> None:
    """Until the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, descriptors, _, _ = socket.recv_fds(nursery, 1, 2)
        if not asked:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            nursery.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            sys.stdin = os.fdopen(0)
            serve_calls()
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        nursery.send(str(pid).encode())


def main() -> None:
    if len(sys.argv) > 1:
        compile_kernel("copy_pieces")
        fork_workers(socket.socket(fileno=int(sys.argv[1])))
    else:
        serve_calls()
    os._exit(0)


if __name__ == "__main__":
    main()
