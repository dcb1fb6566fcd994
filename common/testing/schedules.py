"""Random schedules: requests that come, go and crowd each other, and must not change each other.

Every request is one of a fixed set whose output is known: what part 01 gives for it alone, which the
oracle has checked. Whatever else happens meanwhile, an engine must give just that.
"""

import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

from common.completions import TokenLogprobs
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import PARTS, engine_of

NUM_TOKENS = 24  # of each known output
MODELS = ("random:tiny-llama", "random:tiny-qwen3")
KINDS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, temperature=0.9, top_p=0.9),
    SamplingParams(seed=2**63, temperature=1.3, top_k=20),
    SamplingParams(seed=-3, min_p=0.02, presence_penalty=0.7, frequency_penalty=0.4),
)


@dataclass(frozen=True)
class Known:
    """A request and its whole output."""

    prompt: list[int]
    params: SamplingParams
    output: list[int]
    choice: int = 0

    def cut(self, max_tokens: int, stop_at: int | None) -> tuple[SamplingParams, list[int], str]:
        """(parameters, expected output, expected finish reason) of a shorter request.

        stop_at: the token at this place of the output ends it, if it has not come before.
        """
        params = replace(self.params, max_tokens=max_tokens, ignore_eos=True)
        output = self.output[:max_tokens]
        if stop_at is None:
            return params, output, "length"
        stop = self.output[stop_at]
        params = replace(params, stop_token_ids=(stop,))
        if stop in output:
            return params, output[: output.index(stop) + 1], "stop"
        return params, output, "length"


@cache
def known_requests(model: str, longest: int = 40) -> list[Known]:
    """A dozen requests, greedy and seeded, with prompts of 1 to `longest` tokens."""
    generator = random.Random(7)
    prompts = [
        [generator.randrange(2, 512) for _ in range(length)]
        for length in (1, 2, 3, 7, 8, 9, 15, 16, 17, 30, longest, longest)
    ]
    prompts[-1][: longest // 2] = prompts[-2][: longest // 2]  # two begin alike
    kinds = [KINDS[i % len(KINDS)] for i in range(len(prompts))]
    params = [replace(kind, max_tokens=NUM_TOKENS, ignore_eos=True) for kind in kinds]
    completions = engine_of(PARTS[0], model).generate(prompts, params, progress=False)
    outputs = [completion.token_ids for completion in completions]
    rows = list(zip(prompts, outputs, params, strict=True))
    greedy = [(prompt, output) for prompt, output, kind in rows if kind.temperature == 0]
    seeded = [row for row in rows if row[2].temperature > 0]
    for verdict in (check_greedy(model, greedy), check_seeded(model, seeded)):
        assert verdict.is_right, verdict
    return [Known(prompt, kind, output) for prompt, output, kind in rows]


@dataclass(frozen=True)
class Event:
    """What happens before some steps: a request comes, and perhaps another is aborted."""

    request: int
    max_tokens: int
    stop_at: int | None
    abort: int | None  # the n-th of the requests so far, finished or not
    num_steps: int


def events(most: int = 14) -> st.SearchStrategy[list[Event]]:
    event = st.builds(
        Event,
        request=st.integers(0, 11),
        max_tokens=st.integers(1, NUM_TOKENS),
        stop_at=st.none() | st.integers(0, NUM_TOKENS - 1),
        abort=st.none() | st.none() | st.integers(0, most - 1),
        num_steps=st.integers(0, 12),
    )
    return st.lists(event, min_size=1, max_size=most)


@dataclass
class Drive:
    """Drives an engine through a schedule and holds each output against what is known.

    known: instead of the model's known requests. more: further parameters of every request.
    """

    engine: Any
    model: str
    known: list[Known] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, Known] = field(default_factory=dict)
    expected: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    scores: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # of prompts
    reasons: dict[str, str] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    num_steps: int = 0

    def run(self, schedule: list[Event]) -> None:
        """The whole schedule, then steps until all is quiet. Raises AssertionError."""
        known = self.known or known_requests(self.model)
        for number, event in enumerate(schedule):
            one = known[event.request]
            params, *expected = one.cut(event.max_tokens, event.stop_at)
            request_id, params = f"r{number}", replace(params, **self.more)
            self.engine.add_request(Request(request_id, one.prompt, params, one.choice))
            self.requests[request_id] = one
            self.expected[request_id] = (expected[0], expected[1])
            self.outputs[request_id] = []
            if event.abort is not None and event.abort <= number:
                self.engine.abort(f"r{event.abort}")
                self.aborted.add(f"r{event.abort}")
            self.steps(event.num_steps)
        self.steps(10_000)
        assert not self.engine.has_unfinished(), "requests that never end"
        self.check()

    def steps(self, count: int) -> None:
        while count > 0 and self.engine.has_unfinished():
            for output in self.engine.step():
                assert output.request_id not in self.reasons, f"{output} after its end"
                self.outputs[output.request_id] += output.token_ids
                scores = getattr(output, "prompt_logprobs", None) or []
                self.scores[output.request_id] = scores or self.scores.get(output.request_id, [])
                if output.finish_reason is not None:
                    self.reasons[output.request_id] = output.finish_reason
            self.engine.check_integrity()
            self.num_steps += 1
            count -= 1

    def check(self) -> None:
        """Every request ended once, with its own tokens; nothing is held."""
        assert set(self.reasons) == set(self.expected), "requests without an end"
        for request_id, (tokens, reason) in self.expected.items():
            got = self.outputs[request_id]
            if self.reasons[request_id] == "abort":
                assert request_id in self.aborted, f"{request_id} was not aborted"
                assert got == tokens[: len(got)], f"{request_id}: {got} is no part of {tokens}"
            else:
                assert (got, self.reasons[request_id]) == (tokens, reason), request_id
        stats = self.engine.stats()
        assert stats["num_running"] == stats["num_waiting"] == 0, stats
        assert stats["num_used_blocks"] == 0, stats
