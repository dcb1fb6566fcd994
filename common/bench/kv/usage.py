"""What a piece of KV memory holds, step by step: counted from an engine's trace, or computed for
strips, the memory that blocks replace.

A place is the memory of one token's keys and values. In each step every place is one of five:

    tokens      holds a token of a sequence that runs
    last block  empty, in the block that holds a running sequence's last token
    reserved    empty, beyond that block, and taken all the same
    ended       taken by a sequence that has ended, because its batch has not
    free        taken by nobody
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from common.trace import EngineState, StepRecord


@dataclass(frozen=True)
class Request:
    """Tokens in, tokens out, and what the engine is told of that: None is nothing."""

    prompt: int
    output: int
    max_tokens: int | None

    def longest(self, context: int) -> int:
        """Tokens that one must be ready for."""
        return context if self.max_tokens is None else self.prompt + self.max_tokens


@dataclass
class Usage:
    """Sums over the steps of a run."""

    num_steps: int = 0
    num_run: int = 0  # tokens computed, whether of use or not
    most: int = 0  # sequences that ran at once
    sequences: int = 0
    tokens: int = 0
    last_block: int = 0
    reserved: int = 0
    ended: int = 0
    scattered: int = 0  # steps in which a waiting request lacked a hole, not free places

    def add(
        self, sequences: list[tuple[int, int]], ended: int, num_run: int, block_size: int
    ) -> None:
        """One step. sequences: (tokens, places taken) of each that runs."""
        self.num_steps += 1
        self.num_run += num_run
        self.most = max(self.most, len(sequences))
        self.sequences += len(sequences)
        self.ended += ended
        for tokens, taken in sequences:
            rest = min(-tokens % block_size, taken - tokens)
            self.tokens += tokens
            self.last_block += rest
            self.reserved += taken - tokens - rest

    def row(self, room: int, requests: list[Request]) -> dict[str, Any]:
        """Means over the steps; shares in percent of `room` places."""
        shares = {
            name: 100 * getattr(self, name) / (room * self.num_steps)
            for name in ("tokens", "last_block", "reserved", "ended")
        }
        of_use = sum(request.prompt + request.output - 1 for request in requests)
        return {
            "most": self.most,
            "mean": self.sequences / self.num_steps,
            **shares,
            "free": 100 - sum(shares.values()),
            "steps": self.num_steps,
            "for_nothing": 100 * (1 - of_use / self.num_run),
            "scattered": 100 * self.scattered / self.num_steps,
        }


class TraceUsage:
    """Follows an engine's trace and counts what is held while each step runs."""

    def __init__(self, block_size: int) -> None:
        self.state = EngineState(block_size=block_size)
        self.usage = Usage()

    def add(self, record: StepRecord) -> None:
        """What was aborted or preempted has given up its blocks before the step ran, what ended
        with the step's token gives them up after it."""
        ran = record.scheduled
        aborted = {name: why for name, why in record.finished.items() if why == "abort"}
        freed = {name: blocks for name, blocks in record.freed.items() if name not in ran}
        state = self.state
        state.apply(replace(record, finished=aborted, freed=freed))
        if ran:
            size = state.block_size
            taken = {name: len(blocks) * size for name, blocks in state.blocks.items()}
            self.usage.add(
                [(tokens, taken[name]) for name, tokens in state.running.items()],
                sum(taken.values()) - sum(taken[name] for name in state.running),
                sum(ran.values()),
                size,
            )
        ended = {name: why for name, why in record.finished.items() if why != "abort"}
        freed = {name: blocks for name, blocks in record.freed.items() if name in ran}
        state.apply(StepRecord(record.step, record.begin, finished=ended, freed=freed))


def run_requests(engine: Any, prompts: list[list[int]], requests: list[Request]) -> Usage:
    """Hand all requests over at once and run them to their ends.

    One without max_tokens is aborted when it has its output: so ends what is read up to a stop
    string, which the engine knows nothing of.
    """
    from common.requests import Request as EngineRequest
    from common.sampling import SamplingParams

    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        engine.add_request(EngineRequest(str(number), prompt, params))
    counts = [0] * len(requests)
    usage = TraceUsage(engine.kv.block_size)
    while engine.has_unfinished():
        for output in engine.step():
            number = int(output.request_id)
            counts[number] += len(output.token_ids)
            if not output.finished and counts[number] == requests[number].output:
                engine.abort(output.request_id)
        usage.add(engine.trace.last_record)
    assert counts == [request.output for request in requests], "not the tokens asked for"
    return usage.usage


@dataclass(eq=False)
class Strip:
    """A piece of memory for one sequence."""

    begin: int
    length: int
    request: Request
    tokens: int = 0  # whose keys and values lie in it
    has_ended: bool = False


@dataclass
class Strips:
    """Sequences in contiguous memory, first come, first served, each in the first hole that fits.

    A static batch lasts until all of it has ended, as part 03's; otherwise sequences join and leave
    at every step, by part 04's rules.
    """

    requests: list[Request]
    room: int  # places
    context: int  # tokens of the longest sequence
    whole_context: bool  # every strip is that long; otherwise as long as its request may become
    static: bool
    max_num_batched_tokens: int
    strips: list[Strip] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    def run(self) -> Usage:
        """All requests, handed over at once. Raises ValueError for one that never fits."""
        self.waiting = deque(self.requests)
        while self.waiting or self.strips:
            joined = [] if self.static and self.strips else self.admit()
            if not self.strips:
                raise ValueError(f"a strip of {self.wanted()} tokens; memory holds {self.room}")
            live = [strip for strip in self.strips if not strip.has_ended]
            for strip in joined or live:
                strip.tokens += 1 if strip.tokens else strip.request.prompt
            # Of a static batch those that have ended are computed too.
            num_run = sum(strip.tokens for strip in joined) or len(self.strips)
            ended = sum(strip.length for strip in self.strips if strip.has_ended)
            self.usage.add([(strip.tokens, strip.length) for strip in live], ended, num_run, 1)
            for strip in live:  # a prompt's step gives the first token; the last is never stored
                request = strip.request
                strip.has_ended = strip.tokens == request.prompt + request.output - 1
            if not self.static or all(strip.has_ended for strip in self.strips):
                self.strips = [strip for strip in self.strips if not strip.has_ended]
        return self.usage

    def wanted(self) -> int:
        """Places that the head of the queue needs in one piece."""
        return self.context if self.whole_context else self.waiting[0].longest(self.context)

    def admit(self) -> list[Strip]:
        """Let requests join from the head of the queue while there are holes."""
        joined: list[Strip] = []
        budget = self.max_num_batched_tokens
        while self.waiting:
            request, length, begin = self.waiting[0], self.wanted(), self.first_hole()
            if begin is None:
                taken = sum(strip.length for strip in self.strips)
                self.usage.scattered += self.room - taken >= length
                break
            if joined and not self.static and request.prompt > budget:
                break
            self.waiting.popleft()
            joined.append(Strip(begin, length, request))
            self.strips.append(joined[-1])
            budget -= request.prompt
        return joined

    def first_hole(self) -> int | None:
        """Where the head of the queue fits."""
        begin, length = 0, self.wanted()
        for strip in sorted(self.strips, key=lambda strip: strip.begin):
            if strip.begin - begin >= length:
                break
            begin = strip.begin + strip.length
        return begin if self.room - begin >= length else None
