"""Part 13: prompts computed by one engine, tokens by another. Whatever happens to a transfer, the tokens are
one engine's, and blocks come back on both sides.

Here both engines are in this process and take turns; senders and receivers have threads of their own.
`test_part13_processes.py` has the processes, and what becomes of them.
"""

import contextlib
import dataclasses
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from part13.config import EngineConfig
from part13.engine import LLMEngine
from part13.policies import POLICIES
from part13.proxy import PrefillAndDecode
from part13.sequence import Status

from common.http.run import ServerConfig
from common.kv_transfer.ticket import (
    HEADER,
    Ticket,
    new_ticket,
    read_secret,
    read_ticket,
    write_ticket,
)
from common.requests import Request
from common.router.launchers import make_launcher
from common.router.link import Status as RouterStatus
from common.router.proxy_config import ProxyConfig
from common.router.request import RoutedRequest
from common.sampling import SamplingParams
from common.testing.schedules import Drive, Event, events
from common.testing.transfer_pair import KNOWN, LONG, MODEL, SECRET, SMALL, Pair, engine, pair


@cache
def shared_pair() -> Pair:
    return pair()


@pytest.fixture
def usual() -> Any:
    """A pair that is used by many tests, each of which leaves nothing in it."""
    both = shared_pair()
    both.turns = lambda: (True, True)
    yield both
    both.settle()


# The same tokens

OPTIONS = [
    ({}, {}),
    ({"kv_transfer": "tcp"}, {}),
    ({"prefix_cache": "radix"}, {"prefix_cache": "radix"}),
    ({"prefix_cache": "off", "kv_transfer": "tcp"}, {"prefix_cache": "off"}),
    ({"num_blocks": 18}, {"num_blocks": 24, "max_num_seqs": 6}),
    ({"num_blocks": 18, "kv_transfer": "tcp", "prefix_cache": "radix"}, {"num_blocks": 17}),
    ({"max_num_batched_tokens": 7}, {"speculative": "ngram", "max_num_batched_tokens": 40}),
    ({"long_prefill_threshold": 5}, {"speculative": "self", "num_speculative_tokens": 3}),
]


@pytest.mark.parametrize(("prefill", "decode"), OPTIONS)
def test_two_engines_give_the_tokens_of_one(
    prefill: dict[str, Any], decode: dict[str, Any]
) -> None:
    both = pair(prefill, decode)
    abort, stop = {5: 3, 9: 9, 11: 6}, {4: 2, 7: 5}
    Drive(both, MODEL).run([Event(i % 12, 24, stop.get(i), abort.get(i), i % 5) for i in range(20)])
    both.settle()
    counts = both.counts()
    assert counts["num_kv_fetched"] >= 4 and counts["num_kv_local"] > 0, counts
    assert both.num_poisoned > 30
    both.close()


@settings(max_examples=25)
@given(schedule=events(8), seed=st.integers(0, 1 << 16))
def test_no_order_of_steps_aborts_and_requests_changes_a_token(
    schedule: list[Event], seed: int
) -> None:
    """Either engine may be much slower than the other, or stand still for a while."""
    both, generator = shared_pair(), random.Random(seed)
    shares = generator.choice([(1.0, 1.0), (0.2, 1.0), (1.0, 0.2)])
    both.turns = lambda: (generator.random() < shares[0], generator.random() < shares[1])
    Drive(both, MODEL).run(schedule)
    both.settle()


def test_what_comes_is_used(usual: Pair) -> None:
    """A control: keys and values that are changed on the prefill worker change the tokens."""
    before, known = usual.counts()["num_kv_tokens"], KNOWN[LONG]
    usual.add_request(Request("spoilt", known.prompt, known.params, cache_salt="spoilt"))
    reach(usual, "computed")
    [blocks] = usual.prefill.connector.held()
    usual.prefill.kv.data[blocks] *= -1
    assert usual.finish() != known.output
    assert usual.counts()["num_kv_tokens"] == before + 39


# When it pays to ask


def test_short_prompts_and_known_ones_are_computed_here() -> None:
    both = pair(decode={"kv_min_tokens": 19})
    assert both.run(8) == KNOWN[8].output  # 17 tokens
    assert both.counts()["num_kv_local"] == 1
    assert both.run(LONG) == KNOWN[LONG].output
    assert both.counts()["num_kv_fetched"] == 1 and both.counts()["num_kv_tokens"] == 39
    assert both.run(LONG) == KNOWN[LONG].output  # what came is in the prefix cache
    assert both.run(LONG + 1) == KNOWN[LONG + 1].output  # its first half is
    assert both.counts()["num_kv_local"] == 2 and both.counts()["num_kv_fetched"] == 1 + 1
    assert both.counts()["num_kv_tokens"] == 39 + 19
    both.close()


def test_a_request_without_a_ticket_or_with_scored_prompt_is_computed_here(usual: Pair) -> None:
    before = usual.counts()
    usual.decode.add_request(Request("no ticket", KNOWN[LONG].prompt, KNOWN[LONG].params))
    assert usual.finish() == KNOWN[LONG].output
    scored = dataclasses.replace(KNOWN[LONG].params, prompt_logprobs=1)
    usual.add_request(Request("scored", KNOWN[LONG].prompt, scored))
    assert usual.finish() == KNOWN[LONG].output
    after = usual.counts()
    assert after["num_kv_fetched"] == before["num_kv_fetched"]


def test_the_salt_reaches_the_prefill_worker() -> None:
    both = pair(decode={"prefix_cache": "off"})
    hits = []
    for salt in ("a", "a", "b", None, None):
        assert both.run(LONG, cache_salt=salt) == KNOWN[LONG].output
        hits.append(both.prefill.stats()["num_prefix_cache_hits"])
    assert [b - a for a, b in zip([0, *hits], hits, strict=False)] == [0, 36, 0, 0, 36]
    assert both.counts()["num_kv_fetched"] == 5
    both.close()


def test_a_ticket_is_good_for_one_transfer_at_a_time(usual: Pair) -> None:
    ticket = usual.ticket
    for name in ("first", "second"):
        request = Request(name, KNOWN[LONG].prompt, KNOWN[LONG].params, cache_salt=name)
        usual.decode.add_request(dataclasses.replace(request, kv_ticket=ticket))
    assert sorted(usual.finish()) == sorted(2 * KNOWN[LONG].output)


# Aborts: whatever state a transfer is in, blocks come back on both sides.


def until(both: Pair, is_there: Callable[[], bool], *, prefill: bool, decode: bool) -> None:
    deadline = time.monotonic() + 20
    while not is_there():
        assert time.monotonic() < deadline, "the state is not reached"
        if prefill:
            both.step_prefill()
        if decode:
            both.decode.step()
        time.sleep(0.0005)


def reach(both: Pair, state: str) -> None:
    """Bring the only request, of two slices, to a state of its transfer."""
    decode, prefill, connector = both.decode, both.prefill, both.prefill.connector
    [sequence] = decode.sequences.values()
    until(both, lambda: bool(both.inbox), prefill=False, decode=False)
    if state == "asked":
        return
    if state in ("computing", "computed"):
        is_held = state == "computed"
        done = lambda: bool(connector.holds) if is_held else bool(prefill.scheduler.running)  # noqa: E731
        until(both, done, prefill=True, decode=False)
        assert sequence.status is Status.WAITING
        return
    until(both, lambda: sequence.status is Status.LOADING, prefill=False, decode=True)
    if state == "loading":
        return
    if state == "reading":
        until(both, lambda: bool(prefill.scheduler.running), prefill=True, decode=False)
        copied = lambda: decode.connector.receiver.stats().get("shm_bytes", 0) > before  # noqa: E731
        before = decode.connector.receiver.stats().get("shm_bytes", 0)
        if not before:
            until(both, copied, prefill=False, decode=False)
        return
    until(both, lambda: bool(sequence.output_token_ids), prefill=True, decode=True)


STATES = ("asked", "computing", "computed", "loading", "reading", "running")


@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_any_state_gives_all_blocks_back(usual: Pair, state: str) -> None:
    salt = f"abort {state}"  # so that nothing of it is known yet
    usual.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params, cache_salt=salt))
    reach(usual, state)
    usual.decode.abort("r")
    [output] = usual.decode.step()
    assert output.finish_reason == "abort"
    usual.settle()
    assert usual.run(LONG, cache_salt=salt) == KNOWN[LONG].output


@pytest.mark.parametrize("state", STATES[:5])
def test_a_prefill_worker_that_gives_up_in_any_state_costs_time_only(
    usual: Pair, state: str
) -> None:
    salt, failed = f"given up {state}", usual.counts()["num_kv_failed"]
    usual.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params, cache_salt=salt))
    reach(usual, state)
    usual.prefill.drop_requests()
    usual.inbox.clear()
    usual.prefill.connector.drop()
    assert usual.finish() == KNOWN[LONG].output
    assert usual.counts()["num_kv_failed"] == failed + 1


def test_blocks_that_may_be_written_yet_belong_to_nobody_else(usual: Pair) -> None:
    """A read that goes on after the abort: its blocks are not given away before it has ended."""
    connector = usual.decode.connector
    cancelled: list[str] = []
    cancel, connector.receiver.cancel = connector.receiver.cancel, cancelled.append
    usual.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params, cache_salt="late"))
    reach(usual, "loading")
    [blocks] = [list(s.block_table) for s in usual.decode.scheduler.loading]
    usual.decode.abort("r")
    usual.turns = lambda: (False, True)
    usual.decode.add_request(Request("other", KNOWN[LONG + 1].prompt, KNOWN[LONG + 1].params))
    for _ in range(12):
        usual.decode.step()
        usual.check_integrity()
        tables = [s.block_table for s in usual.decode.sequences.values()]
        assert not set(blocks) & {block for table in tables for block in table}
    assert usual.decode.connector.held() == [blocks] and cancelled
    connector.receiver.cancel = cancel
    usual.turns = lambda: (True, True)
    usual.finish()  # what was not cancelled comes, and is dropped


# Failures: the request is finished here.


def falls_back(both: Pair, number: int = LONG, seconds: float = 15.0) -> None:
    begin = time.monotonic()
    assert both.run(number) == KNOWN[number].output
    assert time.monotonic() - begin < seconds
    assert both.counts()["num_kv_failed"] == 1 and both.counts()["num_kv_fetched"] == 0
    both.settle()
    both.close()


def test_another_secret() -> None:
    falls_back(Pair(engine("prefill", kv_secret=SECRET + "!"), engine("decode")))


@pytest.mark.parametrize(
    "options", [{"block_size": 8}, {"model": "random:tiny-qwen3"}, {"dtype": "bfloat16"}]
)
def test_another_kind_of_cache(options: dict[str, Any]) -> None:
    falls_back(pair(prefill=options))


def test_a_prompt_that_is_too_long_there() -> None:
    falls_back(pair(prefill={"max_model_len": 30}))


def test_an_address_where_nobody_is() -> None:
    both = pair()
    both.prefill.connector.address = "tcp:127.0.0.1:9"
    falls_back(both)


def test_a_prefill_worker_that_stands_still() -> None:
    both = pair(decode={"kv_timeout": 0.5})
    both.turns = lambda: (False, True)
    both.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params))
    assert both.finish() == KNOWN[LONG].output
    assert both.counts()["num_kv_failed"] == 1
    both.turns = lambda: (True, True)
    both.settle()
    both.close()


def test_a_lease_that_is_over_before_there_is_room() -> None:
    both = pair(prefill={"kv_lease": 0.3}, decode={"num_blocks": 17})
    both.decode.add_request(Request("first", KNOWN[LONG + 1].prompt, KNOWN[LONG + 1].params))
    both.decode.step()  # it has most of the blocks
    both.add_request(Request("second", KNOWN[LONG].prompt, KNOWN[LONG].params))
    reach_held = lambda: bool(both.prefill.connector.holds)  # noqa: E731
    until(both, reach_held, prefill=True, decode=False)
    until(both, lambda: not reach_held(), prefill=True, decode=False)
    tokens = both.finish()
    assert sorted(tokens) == sorted(KNOWN[LONG].output + KNOWN[LONG + 1].output)
    assert both.counts()["num_kv_failed"] == 1
    both.settle()
    both.close()


def test_a_prompt_that_is_preempted_there() -> None:
    """Requests of its own take a prefill worker's last blocks while it computes a prompt for others."""
    both = pair(prefill={"num_blocks": 22, "max_num_batched_tokens": 4, "prefix_cache": "off"})
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    both.prefill.add_request(Request("own", KNOWN[LONG + 1].prompt, params))
    while both.prefill.scheduler.waiting or both.prefill.stats()["num_used_blocks"] < 11:
        both.prefill.step()
    both.turns = lambda: (True, False)
    both.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params))
    until(both, lambda: bool(both.inbox), prefill=False, decode=False)  # before blocks are short
    deadline = time.monotonic() + 10
    while not both.prefill.stats()["num_preemptions"] and time.monotonic() < deadline:
        both.step()
        if both.prefill.connector.holds:
            pytest.fail("the prompt was computed before blocks were short")
    both.turns = lambda: (True, True)
    assert both.finish() == KNOWN[LONG].output
    assert both.counts()["num_kv_failed"] == 1
    both.settle()
    both.close()


def test_held_blocks_do_not_keep_a_worker_from_ending() -> None:
    both = pair(prefill={"kv_lease": 600.0})
    both.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params))
    reach(both, "computed")
    begin = time.monotonic()
    both.prefill.shutdown()
    assert time.monotonic() - begin < 5
    assert both.finish() == KNOWN[LONG].output
    both.decode.shutdown()


# Sleep


@pytest.mark.parametrize("state", ["computing", "computed", "loading"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_sleeps_drops_its_transfers(usual: Pair, role: str, state: str) -> None:
    """It need not wait for a lease, and what it forgets nobody uses."""
    salt, sleeper = f"sleep {role} {state}", getattr(usual, role)
    usual.add_request(Request("r", KNOWN[LONG].prompt, KNOWN[LONG].params, cache_salt=salt))
    reach(usual, state)
    begin = time.monotonic()
    sleeper.sleep(1)
    assert time.monotonic() - begin < 15 and not sleeper.connector.held()
    if role == "prefill":
        usual.turns = lambda: (False, True)
        assert usual.finish() == KNOWN[LONG].output
    sleeper.wake_up()
    usual.turns = lambda: (True, True)
    if role == "decode":
        assert usual.finish() == KNOWN[LONG].output
    assert usual.run(LONG, cache_salt=salt + "!") == KNOWN[LONG].output


# The proxy's choice


class Stub:
    """A worker as the policies see it."""

    def __init__(self, index: int, role: str, address: str | None = None) -> None:
        self.index, self.role = index, role
        self.status = RouterStatus(address=address)
        self.num_requests = self.num_referred = 0

    @property
    def load(self) -> int:
        return 4 * self.num_referred


class Stubs:
    def __init__(self, *stubs: Stub) -> None:
        self.stubs = list(stubs)

    def available(self) -> list[Stub]:
        return self.stubs


def test_a_decode_worker_is_chosen_and_its_ticket_names_a_prefill_worker() -> None:
    config = ProxyConfig(policy="least-pending")
    workers = Stubs(
        Stub(0, "prefill", "shm:a"),
        Stub(1, "prefill", "shm:b"),
        Stub(2, "decode"),
        Stub(3, "decode"),
    )
    least = POLICIES["least-pending"]
    policy = PrefillAndDecode(least(config), least(config), workers, SECRET.encode())
    request = RoutedRequest("POST", "/v1/completions", [(b"x-kv-transfer", b"forged")])
    ids = set()
    for number in range(6):
        chosen = policy.choose(request, workers.stubs)
        ticket = read_ticket(request.added[HEADER], SECRET.encode())
        ids.add(ticket.transfer_id)
        assert chosen.role == "decode" and ticket.address == ("shm:a", "shm:b")[number % 2]
        assert request.forwarded_headers() == [(HEADER, request.added[HEADER])]
    assert len(ids) == 6
    assert policy.choose(request, workers.stubs[:2]).role == "prefill"  # none else is left
    assert HEADER not in request.added
    workers.stubs = workers.stubs[2:]
    assert policy.choose(request, workers.stubs).role == "decode" and HEADER not in request.added


def test_a_lost_worker_is_forgotten_by_both_policies() -> None:
    config = ProxyConfig(policy="cache-aware")
    both = [POLICIES["cache-aware"](config) for _ in range(2)]
    policy = PrefillAndDecode(*both, Stubs(Stub(0, "prefill", "shm:a")), SECRET.encode())
    request = RoutedRequest("POST", "/v1/completions", body=b'{"prompt": "%s"}' % (b"x" * 640))
    policy.choose(request, [Stub(1, "decode")])
    assert policy.num_pieces == 10
    assert [set().union(*one.known.values()) for one in both] == [{0}, {1}]
    policy.forget(0)
    policy.forget(1)
    assert [set().union(*one.known.values()) for one in both] == [set(), set()]


# Tickets


@given(number=st.integers(0, 9999), other=st.characters())
def test_a_ticket_that_was_changed_is_refused(number: int, other: str) -> None:
    secret = SECRET.encode()
    text = write_ticket(Ticket("shm:here", "a" * 32, 1e10), secret)  # the same in each example
    place = number % len(text)
    for wrong in (text[:place] + other + text[place + 1 :], text[:place], text + other):
        if wrong != text:
            with pytest.raises(ValueError, match="x-kv-transfer"):
                read_ticket(wrong, secret)
    with pytest.raises(ValueError, match="not signed"):
        read_ticket(text, secret + b"!")


def test_a_ticket_is_good_for_a_minute_and_forged_ones_lead_nowhere(usual: Pair) -> None:
    secret = SECRET.encode()
    old = dataclasses.replace(new_ticket("shm:here"), expires=time.time() - 1)
    with pytest.raises(ValueError, match="no longer good"):
        read_ticket(write_ticket(old, secret), secret)
    good = write_ticket(new_ticket("shm:here"), secret)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        forged = write_ticket(new_ticket(address), b"of a client's own")
        assert usual.decode.connector.ticket_of(good).address == "shm:here"
        for header in (forged, "", "x" * 9999, None, good[:-1]):
            assert usual.decode.connector.ticket_of(header) is None
        with pytest.raises(TimeoutError):
            listener.accept()
    assert usual.prefill.connector.ticket_of(good) is None  # it asks nobody


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.mkdir(), "must be a file|cannot be read"),
        (lambda path: (path.write_text(SECRET), path.chmod(0o644)), "may be read by others"),
        (lambda path: (path.write_text("short\n"), path.chmod(0o600)), "5 bytes, fewer than 16"),
        (lambda path: os.mkfifo(path, 0o600), "must be a file"),
    ],
)
def test_a_secret_that_is_none(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "secret")
    with pytest.raises(ValueError, match=message):
        read_secret(str(tmp_path / "secret"))


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    assert read_secret(str(path)) == SECRET.encode()
    both = pair(*2 * ({"kv_secret": None, "kv_secret_file": str(path)},))
    assert both.run(LONG) == KNOWN[LONG].output and both.counts()["num_kv_fetched"] == 1
    both.close()


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "prefill"}, "role is prefill: kv_secret_file must be given"),
        ({"role": "decode", "kv_secret": SECRET, "tensor_parallel_size": 2},
         "tensor_parallel_size is 2: role decode is for one rank"),
        ({"role": "prefill", "kv_secret": SECRET, "offload": "swap"},
         "offload is swap: role prefill has no host tier"),
        ({"kv_transfer": "tcp"},
         "kv_transfer is 'tcp': it needs role to be prefill or proxy, not both"),
        ({"role": "decode", "kv_lease": 5.0},
         "kv_lease is 5.0: it needs role to be prefill or proxy, not decode"),
        ({"role": "prefill", "kv_timeout": 5.0},
         "kv_timeout is 5.0: it needs role to be decode or proxy, not prefill"),
        ({"role": "somebody"}, "role must be one of both, prefill, decode, proxy, not 'somebody'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**fields)
    assert str(caught.value) == message


def test_a_proxy_has_no_engine_and_a_short_secret_opens_nothing() -> None:
    with pytest.raises(ValueError, match="role is proxy"):
        LLMEngine(EngineConfig(role="proxy", **SMALL))
    for role in ("prefill", "decode"):
        with pytest.raises(ValueError, match="at least 16 are needed"):
            LLMEngine(EngineConfig(role=role, kv_secret="short", **SMALL))


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(EngineConfig(role="prefill", kv_secret=SECRET))


def test_a_prefill_worker_that_holds_blocks_for_others_waits_and_does_not_spin() -> None:
    with contextlib.closing(pair(prefill={"kv_lease": 1.0})) as two:
        prefill, known = two.prefill, KNOWN[LONG]
        address, num_blocks = prefill.connector.address, 10
        two.decode.connector.receiver.request(address, "t", known.prompt, None, num_blocks)
        deadline = time.monotonic() + 20
        while not prefill.connector.holds:
            assert time.monotonic() < deadline
            two.step_prefill()
            time.sleep(0.001)
        begin, num_steps = time.monotonic(), 0
        while prefill.has_unfinished():
            assert time.monotonic() < deadline
            prefill.step()
            num_steps += 1
        seconds = time.monotonic() - begin
        assert seconds > 0.5, "the lease has ended it"
        assert num_steps <= 1000 * seconds + 5, "a step waits a millisecond"
        two.decode.connector.receiver.finished()


@pytest.mark.parametrize("state", ["queued", "under way", "preempted"])
def test_a_prompt_that_is_wanted_no_more_is_not_computed(state: str) -> None:
    """The worker dropped its cache, or the prompt lost its blocks: the peer was told, and is gone."""
    with contextlib.closing(pair()) as two:
        prefill, connector = two.prefill, two.prefill.connector
        receiver = two.decode.connector.receiver
        receiver.request(connector.address, "t", KNOWN[LONG].prompt, None, 10)
        deadline = time.monotonic() + 20
        while not two.inbox:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        prefill.add_request(two.inbox.popleft())
        if state != "queued":
            prefill.step()
        if state == "preempted":
            prefill.scheduler.preempt(next(iter(prefill.scheduler.running)))
        else:
            connector.drop()
        two.step_prefill()
        two.step_prefill()
        assert not prefill.sequences and not connector.asked and not connector.holds
        assert receiver.wait(20) and receiver.finished()[0].error
        two.settle()


def test_a_decode_worker_sleeps_though_prompts_are_computed_elsewhere() -> None:
    """And a prefill worker though its blocks are not fetched: neither waits for the other."""
    with contextlib.closing(pair(prefill={"kv_lease": 60.0})) as two:
        known, name = KNOWN[LONG], "r"
        two.add_request(Request(name, known.prompt, known.params))
        begin = time.monotonic()
        while not two.prefill.connector.holds:
            assert time.monotonic() < begin + 20
            two.step_prefill()
        begin = time.monotonic()
        two.decode.sleep(1)
        two.prefill.sleep(1)
        assert time.monotonic() - begin < 20
        two.prefill.wake_up()
        two.decode.wake_up()
        assert two.finish() == known.output
        two.settle()


def test_a_ticket_that_comes_again_does_not_fetch_into_blocks_of_its_first_use() -> None:
    """A fetch may wait in the device's queue, longer than its sequence and its transfer live."""
    with contextlib.closing(pair()) as two:
        decode, known = two.decode, KNOWN[LONG]
        ticket, gate = two.ticket, threading.Event()
        runner, receiver = decode.runner, decode.connector.receiver

        def ask(name: str) -> None:
            decode.add_request(Request(name, known.prompt, known.params, kv_ticket=ticket))

        def shut() -> Any:
            gate.wait(60)
            return runner.nothing()

        try:
            runner.queue.aside(shut)
            ask("first")
            decode.step()
            [blocks] = [list(s.block_table) for s in decode.scheduler.loading]
            decode.abort("first")
            deadline = time.monotonic() + 20
            while decode.connector.is_busy:
                assert time.monotonic() < deadline
                decode.step()
            assert not decode.kv.pool.ref_counts[blocks[0]]
            ask("second")
            while not two.prefill.connector.holds:
                assert time.monotonic() < deadline
                two.step_prefill()
            decode.kv.data[blocks] = 7.0
        finally:
            gate.set()
        runner.queue.aside(runner.nothing).result()
        time.sleep(0.2)
        assert (decode.kv.data[blocks] == 7.0).all()
        decode.abort("second")
        two.settle()
        assert receiver.stats()["transfers"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replica": ("http://a:1",)}, "replica has no effect on a proxy"),
        ({"data_parallel_size": 2}, "data_parallel_size has no effect on a proxy"),
        ({"min_replicas": 1, "max_replicas": 2}, "min_replicas has no effect on a proxy"),
        ({"launcher": "ray"}, "launcher has no effect on a proxy"),
        ({"prefill": ("http://a:1",)}, "prefill is given and decode is not"),
        ({"decode": ("http://a:1",)}, "decode is given and prefill is not"),
        (
            {"prefill": ("http://a:1",), "decode": ("http://b:1",), "num_decode": 2},
            "num_decode has",
        ),
        ({"prefill": ("http://a:1",), "decode": ("http://a:1",)}, "the same URL twice"),
        ({"prefill": ("a",), "decode": ("http://b:1",)}, "must be a URL"),
    ],
)
def test_a_proxys_settings_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyConfig(**fields)
    assert ProxyConfig(num_prefill=2, num_decode=1).roles == ["prefill", "prefill", "decode"]


def test_a_proxy_gives_each_worker_the_settings_of_its_role() -> None:
    """A worker refuses those that it has no use for."""
    chosen = {"kv_transfer": "tcp", "kv_lease": 5.0, "kv_timeout": 2.0, "kv_min_tokens": 9}
    engine_config = EngineConfig(role="proxy", num_blocks=40, **chosen)
    launcher = make_launcher("m", engine_config, ProxyConfig(num_decode=2), ServerConfig())
    configs = [EngineConfig(**launcher.job_of(index)["engine"]) for index in range(3)]
    assert [config.role for config in configs] == ["prefill", "decode", "decode"]
    prefill, decode, _ = configs
    assert (prefill.kv_transfer, prefill.kv_lease) == ("tcp", 5.0)
    assert (decode.kv_timeout, decode.kv_min_tokens) == (2.0, 9)
    assert {(config.num_blocks, config.kv_secret) for config in configs} == {
        (40, launcher.kv_secret)
    }
