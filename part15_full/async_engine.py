"""asyncio on one side, the engine's loop on the other, and messages in between.

The event loop must never wait for the model, and the engine never for a client. So what passes
between them is plain messages: requests go in, outputs come back by
`loop.call_soon_threadsafe`. Each stream has a queue of its own and ends by itself, aborts its
requests when it is dropped: a client that goes away costs at most the steps under way.

The engine's loop runs in a thread here, or in another process. Then the thread reads what that one says.
"""

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from common.completions import Delta, OutputProcessor, RequestOutput
from common.distributed.group import RankError
from common.engine_core.client import RemoteEngine
from common.metrics import EngineMetrics
from common.requests import Request
from common.trace import StepRecord

from .engine import LLMEngine
from .engine_core import SWITCH_INTERVAL, AbortRequest, EngineCore

logger = logging.getLogger(__name__)

JOIN_SECONDS = 20.0  # for a step to end; one that hangs must not keep the process alive


class AsyncEngine:
    """Completions as asynchronous streams, of an engine in a thread here or in another process."""

    def __init__(self, engine: LLMEngine | RemoteEngine) -> None:
        self.engine = engine
        self.metrics = EngineMetrics(engine.stats, engine.max_model_len)
        if isinstance(engine, RemoteEngine):
            self.core, self.observe = engine, self.metrics.on_scheduled
            engine.metrics = self.metrics
        else:
            self.core, self.observe = EngineCore(engine), self.metrics.on_step
        self.streams: dict[str, tuple[int, asyncio.Queue[tuple[int, RequestOutput]]]] = {}
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stopped = False

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
            self.core.stop()
            await asyncio.to_thread(self.thread.join, JOIN_SECONDS)
            sys.setswitchinterval(previous)

    def problem(self) -> str | None:
        """What is wrong with the engine, or None while it lives."""
        return self.core.problem() or ("the engine has stopped" if self.stopped else None)

    async def call(self, run: Callable[[], Any]) -> Any:
        """What `run` gives in the engine's loop, where it has the engine for itself. Raises what it
        raises, and RankError when the engine has ended."""
        return await self.core.call(run, lambda: self.problem() if self.stopped else None)

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
                self.core.put(request)
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
            self.core.put(AbortRequest(request_id))
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
        """The engine's thread, or the thread that reads what its process says."""
        try:
            self.core.run(self._emit)
        except RankError as error:
            logger.error("the engine has ended: %s", error)
        finally:
            self.stopped = True  # before the streams are told: a later request sees it
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self.loop.call_soon_threadsafe(self._fail_streams)
            self.core.close()

    def _emit(self, record: StepRecord | None, outputs: list[RequestOutput]) -> None:
        """In the engine's thread: what a step brought."""
        self.observe(record)
        if outputs:
            self.loop.call_soon_threadsafe(self._deliver, outputs)
