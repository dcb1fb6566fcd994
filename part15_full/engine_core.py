"""The engine core: a loop that takes requests and aborts, runs steps, and hands on their outputs.

    --engine-core thread                       --engine-core process
    event loop --inbox--> EngineCore.run       HTTP process --ZeroMQ--> inbox --> EngineCore.run
        ^------------- emit --'                     ^----------- ZeroMQ -- emit --'

In a thread of the HTTP process the loop shares the interpreter with tokenising, chat templates and JSON.
In a process of its own (`python -m part15.engine_core`) a step waits for none of these. The loop is the
same in both forms, and exchanges the same messages.
"""

import contextlib
import logging
import queue
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.completions import RequestOutput
from common.distributed.group import RankError
from common.http.calls import Call
from common.requests import Request, check_request
from common.trace import StepRecord

from .config import EngineConfig
from .engine import LLMEngine

if TYPE_CHECKING:
    from common.engine_core.child import Parent

logger = logging.getLogger(__name__)

# A step is hundreds of small calls into torch. Each lets go of the interpreter's lock, and beside a
# busy Python thread waits for it again: 5 ms each time by default, which makes steps many times
# longer. The same holds for the event loop beside any thread that is busy in Python.
SWITCH_INTERVAL = 0.0002  # seconds


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


class Shutdown:
    """Ends the loop."""


Emit = Callable[[StepRecord | None, list[RequestOutput]], None]


class EngineCore:
    """An engine's loop. One thread runs it; any thread may put messages into its inbox."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.inbox: queue.SimpleQueue[Request | AbortRequest | Call | Shutdown] = (
            queue.SimpleQueue()
        )
        self.put = self.inbox.put
        engine.connector.serve(self._take, self.abort)

    def abort(self, request_id: str) -> None:
        self.put(AbortRequest(request_id))

    def stop(self) -> None:
        """Let `run` end after the step under way."""
        self.put(Shutdown())

    def problem(self) -> str | None:
        """Which rank is lost; None while all ranks live."""
        return self.engine.problem()

    async def call(self, run: Callable[[], Any], end: Callable[[], str | None]) -> Any:
        """Call `run` between two steps; returns its result.

        end: says why the loop has ended, or None while it runs. Raises RankError when it has.
        """
        self.put(call := Call(run))
        return await call.answered(end)

    async def refresh(self) -> None:
        """Nothing to do: in this process the engine's numbers are always current."""

    def run(self, emit: Emit) -> None:
        """Take messages from the inbox, wait when idle, step; `emit` gets each step's record and outputs.

        Raises RankError when a rank is lost.
        """
        while True:
            for message in self._messages():
                if isinstance(message, Shutdown):
                    return
                self._handle(message, emit)
            outputs = self._step()
            emit(self.engine.trace.last_record, outputs)

    def close(self) -> None:
        """When `run` has ended."""
        self.engine.shutdown()

    def _take(self, request: Request) -> None:
        """A request that another worker sends; its outputs go nowhere. Raises ValueError."""
        if self.engine.sleep_level:
            raise ValueError("the worker sleeps")
        check_request(request, self.engine.max_model_len, self.engine.vocab_size)
        self.put(request)

    def _messages(self) -> list[Any]:
        """The messages in the inbox; waits for one when the engine is idle."""
        messages = []
        with contextlib.suppress(queue.Empty):
            if not self.engine.has_unfinished():
                messages.append(self.inbox.get())
            while True:
                messages.append(self.inbox.get_nowait())
        return messages

    def _handle(self, message: Request | AbortRequest | Call, emit: Emit) -> None:
        if isinstance(message, Call):
            return message.answer()
        if isinstance(message, AbortRequest):
            self.engine.abort(message.request_id)
            return
        try:
            self.engine.add_request(message)
        except Exception:
            logger.exception("request %s was not taken", message.request_id)
            emit(None, [RequestOutput(message.request_id, finish_reason="error")])

    def _step(self) -> list[RequestOutput]:
        """One step; an exception ends the requests it ran, not the engine."""
        try:
            return self.engine.step()
        except (torch.AcceleratorError, RankError):  # the GPU is lost, or another rank
            raise
        except Exception:
            logger.exception("a step failed")
            self.engine.fail_step()
            return []


def describe(engine: LLMEngine) -> dict[str, Any]:
    """What an HTTP process must know about an engine."""
    return {
        "config": asdict(engine.config),
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocab_size,
        "sampling_defaults": engine.sampling_defaults,
        "eos_token_ids": sorted(engine.eos_token_ids),
        "connector": engine.connector.describe(),
    }


def serve(parent: "Parent", settings: dict[str, Any]) -> None:
    """Run an engine for HTTP processes until the parent ends. Raises ValueError and RankError."""
    from common.engine_core.serving import CoreServer

    engine = LLMEngine(EngineConfig(**settings))
    core, timeout = EngineCore(engine), engine.config.rank_timeout
    callbacks = core.put, core.abort, core.stop
    server = CoreServer(parent, engine, describe(engine), timeout, *callbacks)
    sys.setswitchinterval(SWITCH_INTERVAL)  # beside the thread that reads messages
    try:
        server.run(core.run)
    finally:
        core.close()


if __name__ == "__main__":
    from common.engine_core.process import run_core

    run_core(serve)
