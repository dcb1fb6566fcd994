"""asyncio on one side, the engine's thread on the other, and messages in between.

The event loop must never wait for the model, and the engine never for a client. So what passes
between them is plain messages: requests go in, outputs come back by
`loop.call_soon_threadsafe`. Each stream has a queue of its own and ends by itself, aborts its
requests when it is dropped: a client that goes away costs at most the steps under way.
"""

import asyncio
import contextlib
import logging
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.completions import Delta, OutputProcessor, RequestOutput
from common.distributed.group import RankError
from common.http.calls import Call
from common.metrics import EngineMetrics
from common.requests import Request, check_request

from .engine import LLMEngine

logger = logging.getLogger(__name__)

# A step is hundreds of small calls into torch. Each lets go of the interpreter's lock, and beside a
# busy Python thread waits for it again: 5 ms each time by default, which makes steps many times
# longer. The same holds for the event loop beside any thread that is busy in Python.
SWITCH_INTERVAL = 0.0002  # seconds
JOIN_SECONDS = 20.0  # for a step to end; one that hangs must not keep the process alive


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


class Shutdown:
    """The engine's thread is to end."""


class AsyncEngine:
    """Runs an engine in a thread; completions are asynchronous streams."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.metrics = EngineMetrics(engine.stats, engine.max_model_len)
        self.inbox: queue.SimpleQueue[Request | AbortRequest | Call | Shutdown] = (
            queue.SimpleQueue()
        )
        self.streams: dict[str, tuple[int, asyncio.Queue[tuple[int, RequestOutput]]]] = {}
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopped = False
        engine.connector.serve(self._take, lambda id: self.inbox.put(AbortRequest(id)))

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """The engine's thread lives as long as this context."""
        self.loop = asyncio.get_running_loop()
        previous = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.thread.start()
        try:
            yield
        finally:
            self.inbox.put(Shutdown())
            await asyncio.to_thread(self.thread.join, JOIN_SECONDS)
            sys.setswitchinterval(previous)

    def problem(self) -> str | None:
        """What is wrong with the engine, or None while it lives."""
        return self.engine.problem() or ("the engine has stopped" if self.stopped else None)

    async def call(self, run: Callable[[], Any]) -> Any:
        """What `run` gives in the engine's thread, where it has the engine for itself. Raises what it
        raises, and RankError when the engine has ended."""
        call = Call(run)
        self.inbox.put(call)
        return await call.answered(lambda: self.problem() if self.stopped else None)

    async def generate(
        self, requests: list[Request]
    ) -> AsyncIterator[tuple[int, OutputProcessor, Delta]]:
        """Run requests side by side; yields (index of the request, its output so far, what is new)
        as tokens are born.

        Dropping the iterator aborts what is unfinished.
        """
        inbox: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        tokenizer = self.engine.tokenizer
        outputs = [OutputProcessor(tokenizer, r.params, r.prompt_token_ids) for r in requests]
        self.metrics.on_requests(requests)
        try:
            for index, request in enumerate(requests):
                self.streams[request.request_id] = (index, inbox)
                self.inbox.put(request)
            if self.problem():
                self._fail_streams()
            while not all(output.finished for output in outputs):
                index, new = await inbox.get()
                output = outputs[index]
                delta = output.process(new)
                self.metrics.on_output(new.request_id, delta)
                if output.finished:
                    self._close(new.request_id, abort=not new.finished)
                yield index, output, delta
        finally:
            for request in requests:
                self._close(request.request_id, abort=True)

    def _close(self, request_id: str, abort: bool) -> None:
        """Forget a request; abort it in the engine if it is still under way there."""
        self.metrics.on_close(request_id)
        if abort and request_id in self.streams:
            self.inbox.put(AbortRequest(request_id))
        self.streams.pop(request_id, None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """On the event loop: hand outputs to their streams; an output without one is dropped."""
        for output in outputs:
            index, inbox = self.streams.get(output.request_id, (0, None))
            if inbox is not None:
                inbox.put_nowait((index, output))

    def _fail_streams(self) -> None:
        """On the event loop: the engine is gone; every stream ends with `error`."""
        self._deliver([RequestOutput(id, finish_reason="error") for id in self.streams])

    def _run(self) -> None:
        """The engine's thread: take what is in the inbox, wait when idle, step."""
        try:
            while True:
                for message in self._messages():
                    if isinstance(message, Shutdown):
                        return
                    self._handle(message)
                outputs = self._step()
                self.metrics.on_step(self.engine.trace.last_record)
                if outputs:
                    self.loop.call_soon_threadsafe(self._deliver, outputs)
        except RankError as error:
            logger.error("the engine has ended: %s", error)
        finally:
            self.stopped = True  # before the streams are told: a later request sees it
            self.engine.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self.loop.call_soon_threadsafe(self._fail_streams)

    def _take(self, request: Request) -> None:
        """A request that another worker sends; its outputs go nowhere. Raises ValueError."""
        if self.engine.sleep_level:
            raise ValueError("the worker sleeps")
        check_request(request, self.engine.max_model_len, self.engine.vocab_size)
        self.inbox.put(request)

    def _messages(self) -> list[Any]:
        """What has come in; waits for something when the engine is idle."""
        messages = []
        with contextlib.suppress(queue.Empty):
            if not self.engine.has_unfinished():
                messages.append(self.inbox.get())
            while True:
                messages.append(self.inbox.get_nowait())
        return messages

    def _handle(self, message: Request | AbortRequest | Call) -> None:
        if isinstance(message, Call):
            return message.answer()
        if isinstance(message, AbortRequest):
            self.engine.abort(message.request_id)
            return
        try:
            self.engine.add_request(message)
        except Exception:
            logger.exception("request %s was not taken", message.request_id)
            failed = RequestOutput(message.request_id, finish_reason="error")
            self.loop.call_soon_threadsafe(self._deliver, [failed])

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
