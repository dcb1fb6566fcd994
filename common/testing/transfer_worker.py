"""A prefill or a decode engine in a process of its own, for tests: in a chosen state of a transfer it ends, or
stops, by its own hand. So a test need not hit the moment.

Processes are forked from a server that has imported all there is to import: a start takes a tenth of a second.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
from typing import Any

from common.requests import Request, check_request
from common.testing.parts import module_of

PREFILL_STATES = {
    "asked": "the prompt has come, and is not in the queue yet",
    "computing": "the first layer of the first slice is told",
    "slice": "the first layer of the second slice is told",
    "computed": "all is told but that it is all, and blocks are held",
    "read": "the peer has read all; blocks are held still",
}
DECODE_STATES = {
    "asked": "the prompt is on its way to the prefill worker",
    "loading": "there are blocks for it, and the fetch has begun",
    "reading": "the first pieces are here",
    "arrived": "all is here, and the sequence does not run yet",
    "running": "the first token is drawn",
}


class Worker:
    """One such process, and a pipe to it."""

    def __init__(self, role: str, options: dict[str, Any], state: str, signal_number: int) -> None:
        """options: fields of its EngineConfig. state: in which it sends itself the signal, once."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common.testing.transfer_worker", "part13.engine"])
        self.pipe, theirs = context.Pipe()
        arguments = (role, options, state, signal_number, theirs)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.address = self.pipe.recv()

    def wait_for_state(self, seconds: float = 20.0) -> None:
        """Until it has ended or stopped."""
        deadline = time.monotonic() + seconds
        while self.process_state() not in "TZX":
            assert time.monotonic() < deadline, "the worker does not come to that state"
            time.sleep(0.002)

    def process_state(self) -> str:
        """A letter, as in /proc."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(
    role: str, options: dict[str, Any], state: str, signal_number: int, pipe: Connection
) -> None:
    """The process: requests come through the pipe, and their tokens go back."""
    config = module_of(13, "config").EngineConfig(role=role, **options)
    engine = module_of(13, "engine").LLMEngine(config)
    inbox: deque[Request | str] = deque()
    is_over = [False]

    def signal() -> None:
        if not is_over[0]:
            is_over[0] = True
            os.kill(os.getpid(), signal_number)

    def take(request: Request) -> None:
        check_request(request, engine.max_model_len, engine.vocab_size)
        inbox.append(request)
        if role == "prefill" and state == "asked":
            signal()

    engine.connector.serve(take, inbox.append)
    (watch_prefill if role == "prefill" else watch_decode)(engine, state, signal)
    pipe.send(engine.connector.describe()["address"])
    tokens: dict[str, list[int]] = {}
    while True:
        while pipe.poll(0 if engine.has_unfinished() or inbox else 0.002):
            inbox.append(pipe.recv())
        while inbox:
            message = inbox.popleft()
            if isinstance(message, str):
                engine.abort(message)
            else:
                engine.add_request(message)
        for output in engine.step() if engine.has_unfinished() else []:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if role == "decode" and state == "running":
                signal()
            if output.finished and not output.request_id.startswith("prefill-"):
                pipe.send((output.request_id, tokens.pop(output.request_id)))
        engine.check_integrity()


def after(owner: Any, name: str, then: Callable[..., None]) -> None:
    """Call `then` with the arguments of each call of a method, when that has returned."""
    method = getattr(owner, name)

    @wraps(method)
    def wrapped(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        then(*args)
        return result

    setattr(owner, name, wrapped)


def watch_prefill(engine: Any, state: str, signal: Callable[[], None]) -> None:
    connector, steps = engine.connector, []
    method = connector.save_kv_layer

    def saved(layer: int) -> None:
        is_asked = bool(connector.saves)
        method(layer)
        if is_asked and layer == 0:
            steps.append(layer)
            if (state, len(steps)) in (("computing", 1), ("slice", 2)):
                signal()

    engine.runner.model.on_saved = saved
    if state == "computed":  # not after `finish`: by then the peer may have read all
        finish = connector.sender.finish
        connector.sender.finish = lambda *told: (signal(), finish(*told))
    if state == "read":
        method_of_finished = connector.get_finished

        def get_finished() -> list[str]:
            finished = method_of_finished()
            if finished:  # its thread is about to tell the peer that the blocks were held
                connector.sender._loop.call(signal)
            return finished

        connector.get_finished = get_finished


def watch_decode(engine: Any, state: str, signal: Callable[[], None]) -> None:
    receiver = engine.connector.receiver
    if state in ("asked", "loading"):
        name = "request" if state == "asked" else "fetch"
        after(receiver, name, lambda *_: signal())
    elif state == "reading":
        after(receiver, "copied", lambda *_: signal())
    elif state == "arrived":
        after(engine.connector, "update_connector_output", lambda done: done and signal())
