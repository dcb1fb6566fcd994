"""A sender or receiver of KV in a process of its own, to be killed, stopped and measured.

`Worker` starts one and calls it; `python -m common.testing.kv_worker` is the process: a job in JSON on the
first line of its standard input, then calls, one a line; a line of its standard output is an answer or
an event (a prompt has come, a transfer was cancelled).
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from common.kv_transfer import PrefillRequest, Receiver, Sender, allocate_shared

SECRET = b"a secret for tests"


class Worker:
    """job: role (sender or receiver), shape, seed of the contents or None for zeros, and the keyword
    arguments of Sender or Receiver. `auto`: the sender computes each prompt at once, into its blocks
    `auto` in turn."""

    def __init__(self, **job: Any) -> None:
        command = [sys.executable, "-m", "common.testing.kv_worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        self.events: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._write(job)
        self.address: str = self._answers.get(timeout=60)

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of the sender or receiver, or of the process: peek."""
        self._write([name, *arguments])
        return self._answers.get(timeout=60)

    def event(self, timeout: float = 30) -> list[Any]:
        """The next one: ["prefill", id, num_blocks] or ["cancel", id]."""
        return self.events.get(timeout=timeout)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _write(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, value = json.loads(line)
            (self.events if kind == "event" else self._answers).put(value)


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


def main() -> None:
    process = Process(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        process.say("answer", process.answer(*json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    main()
