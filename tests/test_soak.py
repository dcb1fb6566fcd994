"""The soak in its short form: a quarter of a minute of load, with clients that leave."""

import asyncio
import os

import pytest

from common.testing import soak
from common.testing.parts import PARTS
from common.testing.server import server_process

WARM_UP = 1.25  # between the second second and the last


@pytest.mark.parametrize("part", PARTS[-1:])
def test_a_short_soak(part: int) -> None:
    """No error, nothing left running, no block held, and memory within what a warm-up takes: a small
    leak is seen by test_memory and by the script, which have the time."""
    flags = ("--model", "random:tiny-llama", "--max-waiting", "5000")
    with server_process(part, *flags, *soak.SMALL) as server:
        run = soak.soak(server.base_url, server.process.pid, seconds=8, load=0.9, seed=part)
        result = asyncio.run(run)
    assert soak.complaints(result, growth=WARM_UP) == []
    assert result["done"]["left"] > 3 and result["done"]["whole"] > 10
    assert result["done"]["streamed"] > 10 and result["preemptions"] > 0


@pytest.mark.long
def test_everything_at_once_and_faults() -> None:
    """The short form of the quarter of an hour that the README tells of."""
    flags = ["--part", "15", "--everything", "--minutes", "1", "--fault-every", "10"]
    assert soak.main(flags) == 0


FINE = {
    "done": {}, "errors": [], "early_bytes": 100, "late_bytes": 104, "running": 0.0,
    "waiting": 0.0, "kv_usage": 0.0,
}  # fmt: skip


def test_a_process_that_grows_is_seen() -> None:
    """The control: memory as the soak reads it, of a process that takes a little more each time."""
    held, sizes = [], []
    for _ in range(6):
        sizes.append(soak.memory(os.getpid()))
        held.append(b"x" * (sizes[0] // 10))
    found = [
        bool(soak.complaints(FINE | {"early_bytes": sizes[0], "late_bytes": size}, WARM_UP))
        for size in sizes
    ]
    assert found[0] is False and found[-1] is True and found == sorted(found)


def test_complaints() -> None:
    assert soak.complaints(FINE) == []
    for wrong in ({"kv_usage": 0.1}, {"running": 1.0}, {"late_bytes": 110}, {"errors": ["x"]}):
        assert soak.complaints(FINE | wrong)
