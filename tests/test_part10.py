"""Part 10: routing policies, the circuit breaker, retries, drain, replicas that die, scaling."""

import asyncio
import contextlib
import itertools
import json
import random
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from part10 import policies
from part10.config import EngineConfig
from part10.policies import CacheAware, LeastPending, RoundRobin, Session
from part10.replicas import Breaker, BreakerState, Replica, ReplicaSet
from prometheus_client.parser import text_string_to_metric_families

from common.bench.prefix.workloads import Draw, Sizes, agent
from common.bench.serving.sse import SSEParser
from common.http.middleware import ClientGone
from common.router import exposition
from common.router.config import RouterConfig
from common.router.exchange import Exchange
from common.router.launching import ReplicaDied
from common.router.link import Status
from common.router.request import PIECE_TOKENS, RoutedRequest
from common.router.resources import share
from common.router.run import wait_until_well
from common.router.upstream import UpstreamFailed

ENGINE = ("--model", "random:tiny-llama", "--kv-cache-memory", str(4 << 20), "--threads", "1")


def replica(index: int, waiting: int = 0, running: int = 0, num_requests: int = 0) -> Replica:
    one = Replica(SimpleNamespace(index=index), RouterConfig())
    one.status, one.is_well, one.num_requests = Status("m", waiting, running), True, num_requests
    return one


def request(prompt: Any = None, *, session: str | None = None, **fields: Any) -> RoutedRequest:
    headers = [] if session is None else [(b"x-session-id", session.encode())]
    body = json.dumps({"prompt": prompt, **fields}).encode()
    return RoutedRequest("POST", "/v1/completions", headers, body)


# The policies


def test_round_robin_gives_each_the_same():
    replicas = [replica(i) for i in range(3)]
    policy = RoundRobin(RouterConfig())
    chosen = [policy.choose(request("x"), replicas).index for _ in range(9)]
    assert chosen == [0, 1, 2] * 3


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6))
def test_least_pending_weighs_waiting_four_times(loads: list[tuple[int, int]]):
    replicas = [replica(i, *load) for i, load in enumerate(loads)]
    chosen = LeastPending(RouterConfig()).choose(request("x"), replicas)
    waiting, running = loads[chosen.index]
    assert 4 * waiting + running == min(4 * w + r for w, r in loads)


def test_what_was_sent_since_the_replica_was_asked_counts_as_waiting():
    one = replica(0, waiting=1, running=5)
    one.outstanding = one.seen = 6
    assert one.load == 4 * 1 + 5
    one.outstanding = 9  # three more
    assert one.load == 4 * 4 + 5
    one.outstanding = 2  # four have ended, so the one that waited runs, and another with it
    assert one.load == 2
    one.outstanding = 0
    assert one.load == 0
    one.outstanding, one.seen = 0, 3  # what comes from elsewhere stays
    assert one.load == 3


def test_least_pending_spreads_a_burst_between_two_looks():
    replicas = [replica(i) for i in range(4)]
    for _ in range(40):
        policies.least_pending(replicas).outstanding += 1
    assert [one.outstanding for one in replicas] == [10] * 4


def test_cache_aware_follows_the_longest_beginning():
    policy, replicas = (
        CacheAware(RouterConfig(policy="cache-aware")),
        [replica(i) for i in range(3)],
    )
    base = list(range(100, 100 + 8 * PIECE_TOKENS))
    first = policy.choose(request(base), replicas)
    others = [one for one in replicas if one is not first]
    second = policy.choose(request(base + [7] * 64), others)  # knows the longer one
    assert second is not first
    assert policy.choose(request(base + [7] * 64 + [8] * 16), replicas) is second
    assert policy.choose(request(base[:64]), [first, second]) in (first, second)
    assert policy.num_matched > 0
    policy.forget(second.index)
    assert policy.choose(request(base + [7] * 64), replicas) is first


def test_cache_aware_reads_texts_and_chats_and_keeps_salts_apart():
    text = "All happy families are alike. " * 20
    chat = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "1"}]}
    longer = {"messages": [*chat["messages"], {"role": "assistant", "content": "A. " * 40}]}
    pieces = list(request(text).pieces())
    assert len(pieces) == len(text) // 64
    assert list(request(text + "more" * 40).pieces())[: len(pieces)] == pieces
    begin = list(request(**chat).pieces())
    assert list(request(**longer).pieces())[: len(begin) - 1] == begin[:-1]
    salted = set(request(text, cache_salt="a").pieces())
    assert len(salted) == len(pieces) and not salted & set(pieces)


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b'{"prompt": 5}', b'{"messages": [1, {}]}', b'{"messages": [{}, 1]}',
             b"[" * 100_000, b'{"prompt": [[1, 2], "x"]}', b'{"prompt": null, "user": [1]}']
)  # fmt: skip
def test_any_body_is_routed_somewhere(body: bytes):
    replicas = [replica(0), replica(1)]
    for policy in policies.POLICIES.values():
        some = RoutedRequest("POST", "/v1/completions", [], body)
        assert policy(RouterConfig()).choose(some, replicas) in replicas


def test_cache_aware_leaves_a_replica_that_has_too_much_to_do():
    config = RouterConfig(balance_abs_threshold=10, balance_rel_threshold=2.0)
    policy, replicas = CacheAware(config), [replica(0), replica(1)]
    known = policy.choose(request([5] * 160), replicas)
    other = replicas[1 - known.index]
    known.status, other.status = Status(running=20), Status(running=10)
    assert policy.choose(request([5] * 160), replicas) is known  # 20 is not over 2 * 10
    known.status = Status(running=21)
    assert policy.choose(request([5] * 160), replicas) is other
    known.status, other.status = Status(running=9), Status(running=0)
    policy.forget(other.index)
    assert policy.choose(request([5] * 160), replicas) is known  # over 2 * 0, not by 10


def test_cache_aware_wants_a_share_of_the_prompt():
    policy, replicas = CacheAware(RouterConfig(cache_threshold=0.5)), [replica(0), replica(1)]
    known = policy.choose(request([5] * 160), replicas)
    known.status = Status(running=1)
    assert policy.choose(request([5] * 160 + [6] * 150), replicas) is known
    assert policy.choose(request([5] * 160 + [7] * 200), replicas) is not known


def test_cache_aware_remembers_a_bounded_number_of_pieces(monkeypatch):
    monkeypatch.setattr(policies, "MAX_PIECES", 100)
    policy, replicas = CacheAware(RouterConfig()), [replica(0), replica(1)]
    often = request([1] * 160)
    policy.choose(often, replicas)
    for n in range(2, 200):
        policy.choose(request([n] * 160), replicas)
        policy.choose(often, replicas)
        assert len(policy.known) <= 100
    assert all(piece in policy.known for piece in often.pieces())  # what is used stays


@given(st.integers(2, 8), st.integers(0, 99))
@settings(max_examples=20)
def test_a_session_stays_and_one_more_replica_moves_few(count: int, seed: int):
    policy, replicas = Session(RouterConfig(policy="session")), [replica(i) for i in range(count)]
    names = [f"session {seed} {n}" for n in range(400)]

    def places(some: list[Replica]) -> dict[str, int]:
        return {name: policy.choose(request("x", session=name), some).index for name in names}

    before = places(replicas)
    assert before == places(list(replicas))
    after = places([*replicas, replica(count)])
    moved = [name for name in names if before[name] != after[name]]
    assert all(after[name] == count for name in moved)
    assert len(moved) / len(names) < 2.0 / (count + 1)
    gone = replicas[seed % count]
    left = places([one for one in replicas if one is not gone])
    assert all(left[name] == before[name] for name in names if before[name] != gone.index)
    shares = [list(before.values()).count(i) / len(names) for i in range(count)]
    assert max(shares) < 2.0 / count


def test_a_session_is_named_by_header_or_user():
    policy, replicas = Session(RouterConfig(policy="session")), [replica(i) for i in range(4)]
    for name in map(str, range(20)):
        by_header = policy.choose(request("x", session=name, user="somebody"), replicas)
        assert policy.choose(request("y", user=name), replicas) is by_header
    replicas[2].num_requests, replicas[0].status = -1, Status(running=3)
    assert policy.choose(request("x"), replicas) is replicas[2]  # without a name: the least loaded


class Cache(OrderedDict):
    """The blocks that a replica keeps, the latest used."""

    def run(self, prompt: list[int], output: list[int], capacity: int) -> int:
        """Tokens of the prompt that were there."""
        tokens, found, is_prefix, before = prompt + output, 0, True, 0
        for end in range(16, len(tokens), 16):
            before = hash((before, *tokens[end - 16 : end]))
            is_prefix = is_prefix and before in self and end < len(prompt)
            found += 16 * is_prefix
            self[before] = True
            self.move_to_end(before)
        while len(self) > capacity:
            self.popitem(last=False)
        return found


def hit_rate(name: str, seed: int, num_replicas: int = 4, num_agents: int = 8) -> float:
    """On `bench prefix`'s trees, in caches that hold one and a half of their share of them."""
    policy = policies.POLICIES[name](RouterConfig(policy=name))
    replicas = [replica(i) for i in range(num_replicas)]
    trees = [agent(Draw(f"agent {n}", 1000, seed), Sizes())[1] for n in range(num_agents)]
    every = [(n, r) for n, tree in enumerate(trees) for r in tree]
    every.sort(key=lambda pair: (pair[1].stage, random.Random(f"{seed} {pair}").random()))
    size = sum(len(r.prompt_token_ids) + r.max_tokens for _, r in every)
    capacity = int(1.5 * size / 16 / num_replicas)
    caches = [Cache() for _ in replicas]
    whole: dict[Any, list[int]] = {}
    found = total = 0
    for n, one in every:
        prompt = whole.get((n, one.parent), []) + one.prompt_token_ids
        chosen = policy.choose(request(prompt, session=str(n)), replicas)
        chosen.num_requests += 1
        output = random.Random(f"{n} {one}").choices(range(1000), k=one.max_tokens)
        found += caches[chosen.index].run(prompt, output, capacity)
        total += len(prompt)
        whole[n, one.request_id] = prompt + output
    return found / total


@pytest.mark.parametrize("seed", range(2))
def test_cache_aware_finds_half_as_much_again_as_round_robin_on_branching_agents(seed: int):
    assert hit_rate("cache-aware", seed) >= 1.5 * hit_rate("round-robin", seed)


# The circuit breaker


@given(st.lists(st.sampled_from(["fail", "succeed", "wait", "leave"]), max_size=60))
def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_try(events: list[str]):
    now = 0.0
    breaker = Breaker(3, 10.0, clock=lambda: now)
    in_a_row, opened = 0, None
    for event in events:
        if event == "wait":
            now += 4.0
            continue
        is_open = opened is not None and now < opened + 10.0
        assert breaker.lets_through == (not is_open)
        assert (breaker.state is BreakerState.OPEN) == is_open
        if is_open:
            continue
        breaker.begin()
        assert breaker.lets_through == (opened is None)  # a trial is alone
        if event == "fail":
            breaker.fail()
            in_a_row += 1
            opened = now if in_a_row >= 3 else None
        elif event == "succeed":
            breaker.succeed()
            in_a_row, opened = 0, None
        breaker.on_trial = False


# Metrics


@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.integers(0, 99)), max_size=5, unique_by=lambda s: s[0]
    )
)
def test_merged_metrics_hold_every_sample_under_its_engine(samples: list[tuple[str, int]]):
    def text(offset: int) -> str:
        body = exposition.family(
            "vllm:a",
            "gauge",
            "A.",
            [({"engine": "0", "m": name}, v + offset) for name, v in samples],
        )
        return body + exposition.family("b", "gauge", "B.", [({}, offset)]) + "# EOF-less\n\n"

    merged = exposition.merge([("0", text(0)), ("7", text(100))])
    found = {
        (sample.name, sample.labels["engine"], sample.labels.get("m"), sample.value)
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    }
    wanted = {("b", "0", None, 0.0), ("b", "7", None, 100.0)}
    for name, value in samples:
        wanted |= {("vllm:a", "0", name, value), ("vllm:a", "7", name, value + 100)}
    assert found == wanted
    assert merged.count("# TYPE vllm:a gauge") == 1


def test_a_label_that_looks_like_another_stays():
    text = 'x{model="a,engine=\\"5\\"",engine="0",my_engine="q"} 1\n'
    [family] = text_string_to_metric_families(exposition.merge([("3", text)]))
    [sample] = family.samples
    assert sample.labels == {"model": 'a,engine="5"', "engine": "3", "my_engine": "q"}
    assert exposition.total('x{a="}"} 1\nx 2.5\nxy 9\n', "x") == 3.5
    assert exposition.total("y 1\n", "x") is None


# What a client is sent

OPENING = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKENS = [
    b'data: {"choices":[{"index":0,"delta":{"content":"%d\\u00e9"}}]}\n\n' % n for n in range(3)
]
DONE = b"data: [DONE]\n\n"


class Response:
    """A stream that comes in pieces, and may end before its end."""

    status, content_type, headers = 200, "text/event-stream", {}
    raw_headers = ((b"Content-Type", b"text/event-stream"), (b"Connection", b"close"))

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.content = pieces, self

    async def iter_any(self):
        for piece in self.pieces:
            yield piece


class Upstream:
    def __init__(self, pieces: list[bytes]) -> None:
        self.response = Response(pieces)

    @contextlib.asynccontextmanager
    async def send(self, request: RoutedRequest):
        yield self.response


def relayed(*attempts: list[bytes]) -> tuple[bytes, Exchange, list[Exception]]:
    """(what the client got, the exchange, failures): each attempt is a stream, until one is enough."""
    sent: list[dict[str, Any]] = []

    async def run() -> list[Exception]:
        failures: list[Exception] = []
        for pieces in attempts:
            try:
                await exchange.run(Upstream(pieces), lambda: None)
                return failures
            except UpstreamFailed as failure:
                failures.append(failure)
                if exchange.streamed:
                    break
        with contextlib.suppress(Exception):
            await exchange.give_up(failures[-1])
        return failures

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    exchange = Exchange(request("x", stream=True), send)
    failures = asyncio.run(run())
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == bool(sent)
    assert sum(not message.get("more_body", True) for message in sent) <= 1
    return b"".join(message.get("body", b"") for message in sent), exchange, failures


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_a_stream_arrives_whole_wherever_the_network_cuts_it(cuts: list[int], crlf: bool):
    data = OPENING + b": ping\n\n" + b"".join(TOKENS) + DONE
    data = data.replace(b"\n", b"\r\n") if crlf else data
    got, _, failures = relayed(pieces_of(data, cuts))
    assert not failures
    expected = SSEParser().feed(data)
    assert SSEParser().feed(got) == expected


@given(st.integers(0, 1000), st.lists(st.integers(0, 1000), max_size=4))
def test_a_stream_that_ends_early_is_retried_or_ends_in_an_error(end: int, cuts: list[int]):
    data = OPENING + b"".join(TOKENS) + DONE
    cut = data[: end % len(data)]
    got, exchange, failures = relayed(pieces_of(cut, cuts), [OPENING, TOKENS[0], DONE])
    events = [event.data for event in SSEParser().feed(got)]
    whole = [t for t in TOKENS if t in cut]
    assert len(failures) == 1
    if not whole:  # nothing had been streamed: the second answers, and the first leaves no trace
        assert got == OPENING + TOKENS[0] + DONE
    else:
        assert got.startswith(OPENING + b"".join(whole)) and "[DONE]" not in events
        error = json.loads(events[-1])["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"]
        assert len(events) == 1 + len(whole) + 1
    assert exchange.streamed


@pytest.mark.parametrize("ping", [b": ping\n\n", b"\n\n"])
def test_a_ping_goes_through_before_the_first_token_and_a_retry_is_still_possible(ping: bytes):
    got, _, failures = relayed([OPENING, ping], [OPENING, *TOKENS, DONE])
    assert len(failures) == 1
    assert got == ping + OPENING + b"".join(TOKENS) + DONE


def test_an_error_event_of_the_replica_is_a_failure_before_a_token_and_the_end_after_one():
    error = b'data: {"error":{"message":"m","type":"server_error"}}\n\n'
    got, _, failures = relayed([OPENING, error], [OPENING, *TOKENS, DONE])
    assert got == OPENING + b"".join(TOKENS) + DONE and len(failures) == 1
    got, _, failures = relayed([OPENING, TOKENS[0], error])
    assert got == OPENING + TOKENS[0] + error and not failures  # no second one


def test_a_client_that_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr("common.router.exchange.SEND_SECONDS", 0.05)

    async def never(message: Any) -> None:
        await asyncio.sleep(60)

    with pytest.raises(ClientGone):
        asyncio.run(Exchange(request("x"), never).run(Upstream([TOKENS[0]]), lambda: None))


# Replicas that are looked after


class Starting:
    """A launcher. url: what a replica answers when it is asked where it listens, by its number, from 0;
    one that was killed has died."""

    api_key = None

    def __init__(self, url: Callable[[int], str | None]) -> None:
        self.asked, self.num_launched, self.killed = url, 0, set[int]()

    def launch(self, index: int) -> Any:
        number, self.num_launched = self.num_launched, self.num_launched + 1

        async def url() -> str | None:
            if number in self.killed:
                raise ReplicaDied(f"engine {index} was ended")
            return self.asked(number)

        return SimpleNamespace(
            url=url, kill=lambda: self.killed.add(number), stop=lambda: None, ended=url
        )


def look_after(launcher: Starting, seconds: float) -> None:
    """One replica, until the second has been launched."""

    async def main() -> None:
        replicas = ReplicaSet(launcher, RouterConfig(data_parallel_size=1, health_interval=0.05), 1)
        keeper = asyncio.create_task(replicas._keep_on(replicas.replicas[0]))
        try:
            async with asyncio.timeout(seconds):
                while launcher.num_launched < 2:
                    await asyncio.sleep(0.01)
        finally:
            keeper.cancel()

    asyncio.run(main())


def test_a_replica_that_does_not_start_is_started_anew(monkeypatch, capsys):
    """It may have been stopped, or its disk may hang: then it never says that it has died."""
    launcher = Starting(lambda number: None)
    with pytest.raises(TimeoutError):
        look_after(launcher, 1.0)
    monkeypatch.setattr("common.router.members.START_SECONDS", 0.3)
    launcher = Starting(lambda number: None)
    look_after(launcher, 20)
    assert launcher.killed == {0}
    said = "engine 0 has not started in 0.3 s; it starts again in 0.25 s\n"
    assert capsys.readouterr().err == said
    replicas = ReplicaSet(Starting(lambda number: None), RouterConfig(data_parallel_size=1), 1)
    with pytest.raises(ValueError, match=r"engine 0 has not started in 0\.3 s"):
        asyncio.run(wait_until_well(replicas, None))


def test_a_keeper_goes_on_after_an_error_that_nobody_foresaw(capsys):
    errors = iter([OSError("no more processes")])

    def url(number: int) -> str | None:
        for error in errors:
            raise error
        raise ReplicaDied("engine 0 was ended")

    look_after(Starting(url), 20)
    said = capsys.readouterr().err
    assert "OSError: no more processes" in said and "it starts again in" in said


# The command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"replica": ("ftp://x",)}, "replica must be a URL"),
        ({"replica": ("http://x/v1",)}, "replica must be a URL"),
        ({"replica": ("http://x", "http://x/")}, "twice"),
        ({"replica": ("http://x",), "data_parallel_size": 2}, "data_parallel_size has no effect"),
        ({"replica": ("http://x",), "start_timeout": 9.0}, "start_timeout has no effect"),
        ({"replica": ("http://x",), "launcher": "ray"}, "launcher"),
        ({"replica": ("http://x",), "replica_api_key": " "}, "replica_api_key must not be empty"),
        ({"min_replicas": 2}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3"),
        ({"data_parallel_size": 2, "max_replicas": 3}, "both given"),
        ({"policy": "random"}, "policy must be one of"),
        ({"policy": "session", "cache_threshold": 0.5}, "needs policy"),
        ({"ray_address": "auto"}, "needs launcher"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(flags: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        RouterConfig(**flags)


def test_cores_and_memory_are_divided():
    engine = share(EngineConfig(model="random:tiny-llama", device="cpu"), 2)
    alone = share(EngineConfig(model="random:tiny-llama", device="cpu"), 1)
    assert engine.threads == max(1, alone.threads // 2)
    assert engine.kv_cache_memory <= alone.kv_cache_memory
    given = EngineConfig(device="cpu", threads=3, num_blocks=8)
    assert share(given, 2) == given
