"""An engine in another process, as an HTTP process sees it.

It has what a server asks of an `LLMEngine` (settings, tokeniser, trace, `stats`, `sleep`) and what
`AsyncEngine` asks of the engine's loop (`put`, `run`, `call`). Its numbers are those of the core's last
message, which comes every half second.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from common.completions import RequestOutput
from common.distributed.group import RankError
from common.distributed.health import Health
from common.http.calls import Call
from common.kv_transfer.options import secret_of
from common.kv_transfer.ticket import accept_ticket
from common.memory import SleepError
from common.metrics import Counts, EngineMetrics
from common.models.checkpoint import resolve
from common.models.tokenizer import Tokenizer
from common.requests import Request
from common.structured.compiler import GrammarCompiler
from common.trace import StepRecord, Trace

REFRESH_SECONDS = 2.0  # to wait for the core's numbers; after that the last ones are shown
ERRORS = {"SleepError": SleepError, "RankError": RankError}

Emit = Callable[[StepRecord | None, list[RequestOutput]], None]


class RemoteEngine:
    """One HTTP process's end of the line to the core."""

    def __init__(
        self,
        connect: Callable[[str], None],
        health: Health,
        config: Any,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """connect, health: as `Link` takes them. config: the part's EngineConfig, as the core was given
        it. release: called when the core is not needed any more. Raises ValueError where the core is
        lost."""
        from common.engine_core import messages
        from common.engine_core.link import Link

        self.messages, self.health, self.release = messages, health, release
        try:
            self.link = Link(connect, health, config.rank_timeout)
            self.received = self.link.receive()
            welcome = next(self.received)
        except RankError as error:
            raise ValueError(str(error)) from None
        self.about: dict[str, Any] = welcome.about
        self.config = type(config)(**self.about["config"])
        self.max_model_len: int = self.about["max_model_len"]
        self.vocab_size: int = self.about["vocab_size"]
        self.sampling_defaults: dict[str, Any] = self.about["sampling_defaults"]
        self.tokenizer = Tokenizer.load(resolve(self.config.model))
        # Grammars that fail here never reach the core. The core compiles the others again.
        compiler = GrammarCompiler(self.tokenizer, self.vocab_size, self.about["eos_token_ids"])
        self.grammars = SimpleNamespace(compiler=compiler)
        self.trace = Trace(state=welcome.state)
        self.runner = SimpleNamespace(expert_stats=self._expert_stats)
        secret = secret_of(config) if config.role == "decode" else None
        self.connector = SimpleNamespace(
            describe=lambda: self.about["connector"],
            ticket_of=lambda header: accept_ticket(header, secret),
        )
        self.numbers = itertools.count(1)
        self.calls: dict[int, Future[Any]] = {}  # questions to the core, by number
        self.metrics: EngineMetrics | None = None  # of this process; set when it begins to serve
        self.status: dict[str, Any] = {}
        self._beat(0)
        while not self.status:  # so that there are numbers from the first scrape on
            self._handle(next(self.received), lambda record, outputs: None)

    # What a server asks of an engine.

    def stats(self) -> dict[str, Any]:
        return self.status

    def _expert_stats(self) -> dict[str, Any]:
        return {name: value for name, value in self.status.items() if "expert" in name}

    @property
    def sleep_level(self) -> int:
        return self.status["sleep_level"]

    def sleep(self, level: int) -> Awaitable[dict[str, Any]]:
        return self._ask("sleep", level)

    def wake_up(self) -> Awaitable[dict[str, Any]]:
        return self._ask("wake_up")

    async def _ask(self, method: str, *arguments: int) -> Any:
        """Call a method of the engine; returns its result. Raises SleepError and RankError."""
        call, number = self._expect()
        self.link.send(self.messages.Ask(number, method, list(arguments)))
        return await call.answered(self._end)

    def _end(self) -> str | None:
        """Why no more messages are read; None while they are."""
        return self.problem() or ("the server is shutting down" if self.link.closing else None)

    async def refresh(self) -> None:
        """Get the core's current numbers, where it answers in time."""
        call, number = self._expect()
        with contextlib.suppress(TimeoutError, RankError):
            self._beat(number)
            await asyncio.wait_for(call.answered(self._end), REFRESH_SECONDS)
        self.calls.pop(number, None)

    def _expect(self) -> tuple[Call, int]:
        call, number = Call(lambda: None), next(self.numbers)
        self.calls[number] = call.result
        return call, number

    # What AsyncEngine asks of a loop.

    def problem(self) -> str | None:
        """Why the core is lost; None while it lives."""
        return self.health.problem

    def put(self, message: Any) -> None:
        """Send a request, or an abort (an object with a request_id). When the core is lost, `run`
        raises."""
        make = self.messages.Add if isinstance(message, Request) else self.messages.Abort
        with contextlib.suppress(RankError):
            argument = message if isinstance(message, Request) else message.request_id
            self.link.send(make(argument))

    async def call(self, run: Callable[[], Awaitable[Any]], end: Callable[[], str | None]) -> Any:
        """Await `sleep` or `wake_up`; returns the core's answer."""
        return await run()

    def run(self, emit: Emit) -> None:
        """Hand on the core's messages until `stop`. Raises RankError when the core is lost."""
        self.link.on_look = lambda: self._beat(0)
        for message in self.received:
            self._handle(message, emit)

    def _beat(self, number: int) -> None:
        counts: Counts = self.metrics.counts() if self.metrics is not None else {}
        self.link.send(self.messages.Beat(number, self.link.num_read(), counts))

    def _handle(self, message: Any, emit: Emit) -> None:
        match message:
            case self.messages.Step():
                for record in message.records:
                    self.trace.keep(record)
                    emit(record, [])
                if message.outputs:
                    emit(None, self.messages.outputs_of(message))
            case self.messages.Status(number, stats, counts):
                self.status = stats
                if self.metrics is not None:
                    self.metrics.others = counts
                self._settle(number, stats)
            case self.messages.Answer(number, value, error, raised):
                failed = ERRORS.get(raised, RuntimeError)(error) if raised else None
                self._settle(number, value, failed)
            case self.messages.Welcome():  # the core had taken this process as lost
                self.trace.restart(message.state)

    def _settle(self, number: int, value: Any, error: Exception | None = None) -> None:
        future = self.calls.pop(number, None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_exception(error) if error is not None else future.set_result(value)

    def stop(self) -> None:
        """Let `run` end."""
        self.link.close()

    def close(self) -> None:
        """Release the core, after `run` has ended."""
        self.release()
