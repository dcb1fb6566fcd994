"""`kv`: what KV memory holds, by hand, and engines' traces against the arithmetic of strips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.bench.__main__ import main
from common.bench.core import worker
from common.bench.core.results import load_result
from common.bench.core.workload import draw_lengths, random_prompts
from common.bench.kv import run as kv
from common.bench.kv.usage import Request, Strips, TraceUsage, Usage, run_requests
from common.testing.parts import engine_of
from common.trace import StepRecord

MODEL = "random:tiny-llama"


def strips_of(requests: list[Request], room: int, **changes: Any) -> Usage:
    settings = {"context": room, "whole_context": False, "static": False} | changes
    return Strips(requests, room, max_num_batched_tokens=2048, **settings).run()


def test_strips_leave_holes() -> None:
    """Of three neighbours the outer ones end at once. Their places are enough for the fourth, but
    it needs them in one piece, and has to wait for the one between."""
    requests = [Request(2, 1, 1), Request(2, 3, 3), Request(2, 1, 1), Request(5, 1, 1)]
    assert strips_of(requests, room=11) == Usage(
        num_steps=4,
        num_run=6 + 1 + 1 + 5,
        most=3,
        sequences=3 + 1 + 1 + 1,
        tokens=6 + 3 + 4 + 5,
        reserved=(1 + 3 + 1) + 2 + 1 + 1,
        scattered=2,
    )
    static = strips_of(requests, room=11, static=True)
    assert (static.num_steps, static.num_run, static.ended) == (4, 6 + 3 + 3 + 5, 6 + 6)
    with pytest.raises(ValueError, match="a strip of 6 tokens; memory holds 5"):
        strips_of(requests, room=5)


def test_places_of_a_trace() -> None:
    """Blocks of four. A batch whose second sequence ends first; an abort; a preemption."""
    usage = TraceUsage(block_size=4)
    usage.add(
        StepRecord(
            0,
            0.0,
            arrived={"a": 5, "b": 2},
            allocated={"a": [0, 1, 2], "b": [3, 4]},
            scheduled={"a": 5, "b": 2},
            finished={"b": "length"},
        )
    )
    first = Usage(1, num_run=7, most=2, sequences=2, tokens=7, last_block=3 + 2, reserved=4 + 4)
    assert usage.usage == first
    end = {"freed": {"a": [0, 1, 2], "b": [3, 4]}, "finished": {"a": "length"}}
    usage.add(StepRecord(1, 0.0, scheduled={"a": 1, "b": 1}, **end))
    second = replace(first, num_steps=2, num_run=9, sequences=3, tokens=13, last_block=7)
    second = replace(second, reserved=12, ended=8)
    assert usage.usage == second
    usage.add(StepRecord(2, 0.0, arrived={"c": 3}, allocated={"c": [5]}, scheduled={"c": 3}))
    usage.add(StepRecord(3, 0.0, freed={"c": [5]}, preempted=["c"]))
    usage.add(StepRecord(4, 0.0, finished={"c": "abort"}))
    third = replace(second, num_steps=3, num_run=12, sequences=4, tokens=16, last_block=8)
    assert usage.usage == third, "steps that run nothing count for nothing"
    row = third.row(room=20, requests=[Request(5, 2, 2), Request(2, 1, 1), Request(3, 1, 1)])
    assert row["free"] == pytest.approx(100 * (60 - 16 - 8 - 12 - 8) / 60)
    assert row["for_nothing"] == pytest.approx(100 * (1 - 11 / 12))


def requests_of(count: int, given: bool) -> list[Request]:
    lengths = draw_lengths(count, (4, 40), (2, 30), seed=1)
    pairs = zip(lengths.prompt, lengths.output, strict=True)
    return [Request(prompt, output, output if given else None) for prompt, output in pairs]


def run_part(part: int, requests: list[Request], block_size: int) -> Usage:
    engine = engine_of(
        part, MODEL, threads=1, block_size=block_size, num_blocks=256 // block_size, max_num_seqs=20
    )
    prompts = random_prompts([request.prompt for request in requests], 512, 0)
    usage = run_requests(engine, prompts, requests)
    assert engine.kv.pool.num_free == 256 // block_size
    return usage


@pytest.mark.parametrize("given", [True, False])
def test_blocks_of_one_token_are_strips_that_need_no_hole(given: bool) -> None:
    """Part 03 as it ran is then what the arithmetic of strips says: two counts of one thing."""
    requests = requests_of(20, given)
    settings = {"context": 256, "static": True}
    usage = run_part(3, requests, 1)
    assert usage == strips_of(requests, 256, **settings)
    if given:
        assert usage != strips_of(requests, 256, **settings | {"static": False})


def test_what_part_04_saves() -> None:
    given, unset = requests_of(20, True), requests_of(20, False)
    static, grown = run_part(3, given, 8), run_part(4, given, 8)
    assert run_part(4, unset, 8) == grown, "blocks are taken for tokens, not for promises"
    assert run_part(3, unset, 8).most == 1, "a promise of the whole context"
    assert grown.reserved == grown.ended == 0 < min(static.reserved, static.ended)
    assert grown.num_steps < static.num_steps and grown.most > static.most
    assert 0 < grown.last_block / grown.sequences < 8
    assert run_part(4, given, 1).last_block == 0


def test_kv_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    def run_here(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        jobs.append(job)
        return worker.JOBS[job["job"]](job)

    monkeypatch.setattr(kv, "run_worker", run_here)
    flags = f"kv --model {MODEL} --memory 1 --requests 6 --max-model-len 500"
    flags += f" --other-block-sizes 64 --json {tmp_path / 'kv.json'}"
    assert main(flags.split()) == 0
    assert [(job["part"], job["settings"]["block_size"]) for job in jobs] == [
        *[(3, 16), (4, 16)] * 2,
        (3, 64),
        (4, 64),
    ]
    result = load_result(tmp_path / "kv.json")
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        shares = [row[key] for key in ("tokens", "last_block", "reserved", "ended", "free")]
        assert sum(shares) == pytest.approx(100) and min(shares) > -1e-9
    contexts = [row["most"] for row in result["rows"] if row["cache"] == "strips of the context"]
    assert contexts == [2] * 4, "1 MiB holds 1,365 tokens, two contexts of 500"
