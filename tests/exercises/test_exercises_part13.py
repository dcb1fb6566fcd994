"""Part 13's exercises: these fail until you do them. Run with `pytest -m exercise`."""

import contextlib
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.kv_transfer import Fetched, PrefillRequest, Receiver, Sender
from common.kv_transfer.outcomes import Outcomes
from common.kv_transfer.ticket import accept_ticket, new_ticket, write_ticket

pytestmark = pytest.mark.exercise
SECRET = b"sixteen bytes or more"
SHAPE = (8, 3, 2, 4, 2, 8)  # [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]


# 1. A ticket is good once.


def test_a_ticket_is_good_once() -> None:
    used: dict[str, float] = {}  # transfers whose tickets were accepted, and when these expire
    ticket, other = new_ticket("shm:a"), new_ticket("shm:b")
    header = write_ticket(ticket, SECRET)
    assert accept_ticket(header, SECRET, used=used) == ticket
    assert accept_ticket(header, SECRET, used=used) is None
    assert accept_ticket(write_ticket(other, SECRET), SECRET, used=used) == other
    assert used == {ticket.transfer_id: ticket.expires, other.transfer_id: other.expires}


def test_what_was_used_is_forgotten_when_no_ticket_could_be_good_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: dict[str, float] = {}
    for _ in range(50):
        assert accept_ticket(write_ticket(new_ticket("shm:a"), SECRET), SECRET, used=used)
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    header = write_ticket(new_ticket("shm:a"), SECRET)
    assert accept_ticket(header, SECRET, used=used) and len(used) == 1
    assert accept_ticket(header, SECRET, used=used) is None


# 2. A lease that is renewed.


@pytest.mark.parametrize("renews", [True, False])
def test_a_reader_without_room_keeps_the_lease(renews: bool) -> None:
    prompts: list[PrefillRequest] = []
    options: dict[str, Any] = {"fingerprint": {"model": "m"}, "secret": SECRET}
    source, target = torch.randn(SHAPE), torch.zeros(SHAPE)
    sender = Sender(
        [source], **options, transport="tcp", host=None, port=0, lease=0.5,
        on_prefill=prompts.append, on_cancel=lambda name: None,
    )  # fmt: skip
    receiver = Receiver([target], **options, timeout=20.0)
    with contextlib.closing(sender), contextlib.closing(receiver):
        receiver.request(sender.address, "t", [1, 2, 3], None, 2)
        deadline = time.monotonic() + 20
        while not prompts and time.monotonic() < deadline:
            time.sleep(0.01)
        for layer in range(SHAPE[1]):
            sender.ready("t", [5, 6], layer, 2)
        sender.finish("t", 2)
        for _ in range(20):  # there is no room here for two seconds
            time.sleep(0.1)
            if renews:
                receiver.renew("t")
        receiver.fetch("t", 0, [0, 1])
        assert receiver.wait(20)
        [fetched] = receiver.finished()
    assert (fetched.error is None) == renews
    assert torch.equal(target[:2], source[5:7]) == renews


# 3. Ask only when it pays.

SECONDS = st.floats(0.001, 2.0)


def fetched(queue: float, prefill: float, room: float, transfer: float) -> Fetched:
    times = {"requested": 10.0, "ready": 10.0 + queue}
    times["computed"] = times["ready"] + prefill
    times["fetch"] = times["computed"] + room
    times |= {"ended": times["fetch"] + transfer, "copying": transfer}
    return Fetched("t", 4, None, times)


@given(st.lists(st.tuples(*[SECONDS] * 4, st.integers(16, 500)), min_size=1, max_size=8))
def test_the_shortest_prompt_that_is_asked_for_is_the_one_that_gains(
    transfers: list[tuple[float, float, float, float, int]],
) -> None:
    """Queue and room cost what they cost on average, whatever the length; prefill and transfer cost
    as much as they did for each token that came."""
    outcomes = Outcomes()
    for *phases, num_tokens in transfers:
        outcomes.ended(fetched(*phases), num_tokens)
    count, tokens = len(transfers), sum(t[4] for t in transfers)
    fixed = sum(t[0] + t[2] for t in transfers) / count
    each = sum(t[1] + t[3] for t in transfers) / tokens
    for local in (each / 2, 2 * each):  # seconds that a token takes here
        for length in (1, 50, 1000, 100_000):
            there, here = fixed + length * each, length * local
            if abs(there - here) > 1e-6 * (there + here):
                assert outcomes.pays(length, local) == (there < here)


def test_without_a_measurement_it_is_asked() -> None:
    """Else there would never be one."""
    assert Outcomes().pays(100, 0.001)
