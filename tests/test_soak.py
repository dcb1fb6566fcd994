"""The soak in its short form: a quarter of a minute of load, with clients that leave."""

import asyncio

import pytest

from common.testing import soak
from common.testing.parts import PARTS
from common.testing.server import server_process

SMALL = ("--num-blocks", "80", "--block-size", "4", "--max-num-seqs", "8", "--threads", "1")


@pytest.mark.parametrize("part", PARTS[-1:])
def test_a_short_soak(part: int) -> None:
    """No error, nothing left running, no block held. (Memory needs longer: test_memory, the script.)"""
    flags = ("--model", "random:tiny-llama", "--max-waiting", "5000")
    with server_process(part, *flags, *SMALL) as server:
        run = soak.soak(server.base_url, server.process.pid, seconds=12, load=0.9, seed=part)
        result = asyncio.run(run)
    result["early_bytes"] = result["late_bytes"]
    assert soak.complaints(result) == []
    assert result["done"]["left"] > 3 and result["done"]["whole"] > 10
    assert result["done"]["streamed"] > 10 and result["preemptions"] > 0


def test_complaints() -> None:
    fine = {
        "done": {}, "errors": [], "early_bytes": 100, "late_bytes": 104, "running": 0.0,
        "waiting": 0.0, "kv_usage": 0.0,
    }  # fmt: skip
    assert soak.complaints(fine) == []
    for wrong in ({"kv_usage": 0.1}, {"running": 1.0}, {"late_bytes": 110}, {"errors": ["x"]}):
        assert soak.complaints(fine | wrong)
