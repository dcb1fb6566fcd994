"""Random schedules over every part that batches: outputs and blocks come out right, whatever happens."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.testing.parts import PARTS, engine_of
from common.testing.schedules import MODELS, Drive, Event, events, known_requests

BATCHING = [part for part in PARTS if part > 2]
# The longest request here has 40 + 24 tokens. Pools from the smallest that holds it, to roomy ones.
POOLS: list[dict[str, Any]] = [
    {"num_blocks": 17, "block_size": 4, "max_num_seqs": 8},
    {"num_blocks": 70, "block_size": 1, "max_num_seqs": 3},
    {"num_blocks": 5, "block_size": 16, "max_num_seqs": 4},
    {"num_blocks": 40, "block_size": 4, "max_num_seqs": 16},
    {"num_blocks": 1, "block_size": 64, "max_num_seqs": 2},
    {"num_blocks": 200, "block_size": 5, "max_num_seqs": 1},
]
BUDGETS = [1, 20, 2048]  # tokens of prompts a step, where a part has such a budget
LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


PREFIX_CACHES = ["hash", "radix"]  # where a part has one


def engine_for(
    part: int, model: str, pool: dict[str, Any], budget: int, prefix_cache: str = "hash"
) -> Any:
    extra: dict[str, Any] = {"max_num_batched_tokens": budget} if part > 3 else {}
    if part > 5 and budget == 20:
        extra["long_prefill_threshold"] = 7
    if part > 6:
        extra["prefix_cache"] = prefix_cache
    return engine_of(part, model, threads=1, **pool, **extra)


def check_schedules(part: int, count: int) -> None:
    @settings(max_examples=count, **LIMITS)
    @given(
        st.sampled_from(MODELS),
        st.sampled_from(POOLS),
        st.sampled_from(BUDGETS),
        st.sampled_from(PREFIX_CACHES),
        events(),
    )
    def check(
        model: str, pool: dict[str, Any], budget: int, cache: str, schedule: list[Event]
    ) -> None:
        Drive(engine_for(part, model, pool, budget, cache), model).run(schedule)

    check()


@pytest.mark.parametrize("part", BATCHING)
def test_random_schedules(part: int) -> None:
    """Arrivals, aborts and stops at any time, pools of any size: 200 schedules, and 50 for each part
    before the last."""
    check_schedules(part, 200 if part == PARTS[-1] else 50)


@pytest.mark.long
@pytest.mark.parametrize("part", BATCHING)
def test_many_random_schedules(part: int) -> None:
    check_schedules(part, 5000)


@pytest.mark.parametrize("part", BATCHING)
@pytest.mark.parametrize("stop_at", range(0, 24, 3))
def test_a_stop_at_every_place(part: int, stop_at: int) -> None:
    """All requests at once, each ended by the token at one place of its output."""
    engine = engine_for(part, MODELS[0], POOLS[3], 2048)
    Drive(engine, MODELS[0]).run([Event(i, 24, stop_at, None, 0) for i in range(12)])


@pytest.mark.parametrize("part", [part for part in PARTS if part > 3])
def test_preemption_is_forced_and_changes_nothing(part: int) -> None:
    """A pool that holds little more than one sequence: the test shows nothing without preemptions."""
    engine = engine_for(part, MODELS[0], POOLS[0], 2048)
    before = engine.stats()["num_preemptions"]
    Drive(engine, MODELS[0]).run([Event(i % 12, 24, None, None, 0) for i in range(14)])
    assert engine.stats()["num_preemptions"] >= before + 5


def test_the_drive_can_fail() -> None:
    """A wrong token, a lost end, and blocks that stay are all seen."""
    engine = engine_for(BATCHING[-1], MODELS[0], POOLS[3], 2048)
    drive = Drive(engine, MODELS[0])
    drive.run([Event(0, 5, None, None, 0)])
    drive.outputs["r0"][3] += 1
    with pytest.raises(AssertionError, match="r0"):
        drive.check()
    drive.outputs["r0"][3] -= 1
    drive.check()
    del drive.reasons["r0"]
    with pytest.raises(AssertionError, match="without an end"):
        drive.check()
    assert len({tuple(known.output) for known in known_requests(MODELS[0])}) == 12
