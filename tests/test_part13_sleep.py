"""Sleep between a prefill and a decode engine: whoever sleeps, whenever, the tokens are one engine's."""

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory import sleeping
from common.requests import Request
from common.testing.schedules import Drive, Event
from common.testing.transfer_pair import KNOWN, LONG, MODEL, Pair, pair


@pytest.fixture(scope="module", params=["shm", "tcp"])
def both(request: pytest.FixtureRequest) -> Iterator[Pair]:
    transfer = {"kv_transfer": request.param}
    engines = pair(transfer, {"kv_timeout": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sleeping, "release_unused", lambda: None)
        yield engines
    engines.close()


@given(
    who=st.sampled_from(["prefill", "decode"]),
    level=st.integers(1, 2),
    before=st.integers(0, 25),
    asleep=st.integers(0, 10),
)
@settings(max_examples=12)
def test_either_may_sleep_at_any_step(
    both: Pair, who: str, level: int, before: int, asleep: int
) -> None:
    drive, sleeper = Drive(both, MODEL), getattr(both, who)
    for number in (LONG, 3, LONG + 1, 8):
        params, *expected = KNOWN[number].cut(12, None)
        add(drive, number, params, expected)
    drive.steps(before)
    sleeper.sleep(level)
    both.check_integrity()
    assert sleeper.stats()["num_used_blocks"] == 0 and not sleeper.connector.held()
    assert is_empty(sleeper), "something was written to the cache of a sleeper"
    poison = both.poison
    both.poison = lambda engine: None if engine is sleeper else poison(engine)  # it has no pages
    try:
        drive.steps(asleep)
        assert is_empty(sleeper), "something was written to the cache of a sleeper"
    finally:
        sleeper.wake_up()
        both.poison = poison
    drive.run([Event(LONG, 8, None, None, 3)])
    both.settle()


@pytest.mark.parametrize("level", [1, 2])
def test_a_prefill_worker_that_has_slept_tells_its_layers_again(both: Pair, level: int) -> None:
    for engine in (both.prefill, both.decode):  # which then knows no prompt either
        engine.sleep(level)
        engine.wake_up()
    before = both.decode.stats()["num_kv_tokens"]
    Drive(both, MODEL).run([Event(LONG, 8, None, None, 3)])
    assert both.decode.stats()["num_kv_tokens"] > before, "its prompt was computed again"
    both.settle()


def is_empty(engine: Any) -> bool:
    """Whether the cache's whole pages are zeros; at its edges are others' bytes."""
    data = engine.kv.data
    begin, end = -data.data_ptr() % mmap.PAGESIZE, -mmap.PAGESIZE
    return not data.view(torch.uint8).reshape(-1)[begin:end].any()


def add(drive: Drive, number: int, params: Any, expected: list[Any]) -> None:
    name = f"k{number}"
    drive.engine.add_request(Request(name, KNOWN[number].prompt, params))
    drive.expected[name], drive.outputs[name] = (expected[0], expected[1]), []
