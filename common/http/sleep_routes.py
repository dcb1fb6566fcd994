"""`POST /sleep`, `POST /wake_up`, `GET /is_sleeping`: named and called as in vLLM.

A server that has no clients for a while gives its memory back and keeps its process. Like every
route, these ask for the key where there is one.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI

from common.distributed.group import RankError
from common.http.errors import ApiError
from common.memory import SleepError

LEVELS = (1, 2)


class Sleeper(Protocol):
    """An engine, as its own thread sees it."""

    sleep_level: int  # 0: awake

    def sleep(self, level: int) -> dict[str, Any]:
        """Returns what is to be told. Raises SleepError and RankError."""

    def wake_up(self) -> dict[str, Any]:
        """As `sleep`."""


def add_sleep_routes(
    app: FastAPI,
    engine: Sleeper,
    call: Callable[[Callable[[], Any]], Awaitable[Any]],
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """call: what it is given runs in the engine's thread. timed: a context around each operation,
    `sleep` or `wake`."""

    async def attempt(operation: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            with timed(operation):
                told = await call(work)
        except SleepError as error:
            raise ApiError(500, str(error), code="sleep_failed") from None
        except RankError as error:
            raise ApiError(503, str(error), code="engine_dead") from None
        return {"is_sleeping": engine.sleep_level > 0, "level": engine.sleep_level, **told}

    async def sleep(level: str = "1") -> dict[str, Any]:
        """Level 1 keeps the weights where they cost less; level 2 will read them anew."""
        if level not in map(str, LEVELS):
            raise ApiError(400, f"level must be 1 or 2, not {level!r:.40}", param="level")
        return await attempt("sleep", partial(engine.sleep, int(level)))

    async def wake_up() -> dict[str, Any]:
        return await attempt("wake", engine.wake_up)

    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": engine.sleep_level > 0}

    app.add_api_route("/sleep", sleep, methods=["POST"])
    app.add_api_route("/wake_up", wake_up, methods=["POST"])
    app.add_api_route("/is_sleeping", is_sleeping, methods=["GET"])


def check_awake(engine: Sleeper, requests: str) -> None:
    """Raises ApiError 503 while an engine sleeps, where `requests` are refused then."""
    if engine.sleep_level and requests == "refuse":
        message = "the engine sleeps: POST /wake_up wakes it"
        raise ApiError(503, message, code="sleeping", headers={"Retry-After": "1"})
