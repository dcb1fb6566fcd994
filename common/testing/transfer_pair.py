"""A prefill and a decode engine in one process, which take turns, as one engine to look at."""

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from common.kv_transfer.ticket import Ticket, new_ticket
from common.requests import Request, check_request
from common.testing.parts import module_of
from common.testing.schedules import known_requests

MODEL = "random:tiny-llama"
SECRET = "a secret of two dozen letters"
SMALL = {
    "model": MODEL,
    "threads": 1,
    "block_size": 4,
    "num_blocks": 40,
    "max_num_batched_tokens": 20,
}
KNOWN = known_requests(MODEL)
LONG = 10  # of these, one of 40 tokens, which is two slices


def engine(role: str, part: int = 13, **options: Any) -> Any:
    own = {"kv_min_tokens": 4} if role == "decode" else {"kv_lease": 20.0}
    flags = SMALL | own | {"role": role, "kv_secret": SECRET} | options
    return module_of(part, "engine").LLMEngine(module_of(part, "config").EngineConfig(**flags))


class Pair:
    """A prefill and a decode engine, as one engine. `turns` says who takes a step."""

    def __init__(self, prefill: Any, decode: Any) -> None:
        self.prefill, self.decode = prefill, decode
        self.inbox: deque[Request | str] = deque()
        prefill.connector.serve(self.take, self.inbox.append)
        self.turns: Callable[[], tuple[bool, bool]] = lambda: (True, True)
        self.kv, self.scheduler, self.stats = decode.kv, decode.scheduler, decode.stats
        self.has_unfinished, self.abort = decode.has_unfinished, decode.abort
        self.num_poisoned = 0

    def take(self, request: Request) -> None:
        check_request(request, self.prefill.max_model_len, self.prefill.vocab_size)
        self.inbox.append(request)

    @property
    def ticket(self) -> Ticket:
        return new_ticket(self.prefill.connector.describe()["address"])

    def add_request(self, request: Request) -> None:
        self.decode.add_request(dataclasses.replace(request, kv_ticket=self.ticket))

    def step_prefill(self) -> None:
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, str):
                self.prefill.abort(message)
            else:
                self.prefill.add_request(message)
        if self.prefill.has_unfinished():
            self.prefill.step()
            self.poison(self.prefill)
        self.prefill.check_integrity()

    def step(self) -> list[Any]:
        for_prefill, for_decode = self.turns()
        if for_prefill:
            self.step_prefill()
        outputs = self.decode.step() if for_decode else []
        self.poison(self.decode)
        return outputs

    def poison(self, engine: Any) -> None:
        """Large numbers where nothing lies that anybody may find."""
        held = getattr(engine.scheduler.cache, "key_of", {})
        free = [block for block in engine.kv.pool.free_blocks if block not in held]
        if not engine.in_flight:  # a step under way may yet write to one, or read it
            engine.kv.data[free] = 1e4 if engine.kv.data.is_floating_point() else 127
            self.num_poisoned += len(free)

    def check_integrity(self) -> None:
        self.prefill.check_integrity()
        self.decode.check_integrity()

    def settle(self) -> None:
        """Nothing is held on either side, after some steps."""
        deadline = time.monotonic() + 20
        while self.prefill.has_unfinished() or self.inbox or self.decode.has_unfinished():
            assert time.monotonic() < deadline, (self.prefill.stats(), self.decode.stats())
            self.step_prefill()
            self.decode.step()
        self.prefill.step()
        self.check_integrity()
        for one in (self.prefill, self.decode):
            assert one.stats()["num_used_blocks"] == 0, one.stats()
        assert not self.prefill.connector.asked and not self.decode.connector.wanted

    def run(self, number: int, **options: Any) -> list[int]:
        """The output of a known request."""
        known = KNOWN[number]
        self.add_request(Request(f"r{random.random()}", known.prompt, known.params, **options))
        return self.finish()

    def finish(self) -> list[int]:
        tokens = []
        while self.has_unfinished():
            for output in self.step():
                tokens += output.token_ids
        return tokens

    def counts(self) -> dict[str, float]:
        return dict(self.decode.connector.outcomes.counts)

    def close(self) -> None:
        self.decode.shutdown()
        self.prefill.shutdown()


def pair(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, part: int = 13
) -> Pair:
    first = engine("prefill", part, **(prefill or {}))
    return Pair(first, engine("decode", part, **(decode or {})))
