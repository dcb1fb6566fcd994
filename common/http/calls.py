"""What the event loop lets an engine's thread do between two steps."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from common.distributed.group import RankError


@dataclass(frozen=True)
class Call:
    """A message to the engine's thread: run this, where nothing else uses the engine."""

    run: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)

    def answer(self) -> None:
        """In the engine's thread. Raises what ends the engine: a lost GPU or rank."""
        if not self.result.set_running_or_notify_cancel():
            return  # nobody waits for it any more
        try:
            self.result.set_result(self.run())
        except Exception as error:
            self.result.set_exception(error)
            if isinstance(error, torch.AcceleratorError | RankError):
                raise

    async def answered(self, end: Callable[[], str | None]) -> Any:
        """On the event loop: what `run` has given. Raises what it has raised, and RankError when the
        engine has ended, of which `end` says why."""
        result = asyncio.wrap_future(self.result)
        while not (await asyncio.wait({result}, timeout=1.0))[0]:
            if (reason := end()) is not None:
                raise RankError(reason)
        return result.result()
