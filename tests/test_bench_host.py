"""`host`: a decode step without its device, by hand and through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.bench import host
from common.bench.__main__ import main
from common.bench.core import worker
from common.bench.core.results import load_result
from common.testing.parts import PARTS

PARTS_WITH_QUEUE = [part for part in PARTS if part >= host.FIRST_PART]


@pytest.mark.parametrize("part", PARTS_WITH_QUEUE)
@pytest.mark.parametrize("num_seqs", [1, 5])
def test_the_host_does_all_its_work_and_the_device_none(part: int, num_seqs: int) -> None:
    """Each step runs a token of each sequence; nothing reaches the model; no sequence ends."""
    job = {"part": part, "num_seqs": num_seqs, "steps": 40}
    engine = host.engine_without_device(**job)

    def forward(*_: Any) -> None:
        raise AssertionError("the model runs")

    engine.runner.forward = forward
    records = host.decode_steps(engine, **job)
    names = [f"request-{number}" for number in range(num_seqs)]
    assert [record.scheduled for record in records] == [dict.fromkeys(names, 1)] * 40
    assert all(set(host.PHASES) <= record.phase_seconds().keys() for record in records)
    taken = sum(len(blocks) for record in records for blocks in record.allocated.values())
    assert 2 * num_seqs <= taken <= 3 * num_seqs, "40 tokens fill two or three blocks of 16"
    assert not any(record.finished or record.preempted for record in records)
    assert len(engine.trace.records()) == host.RING
    engine.check_integrity()
    outputs = [len(sequence.output_token_ids) for sequence in engine.sequences.values()]
    assert set(outputs) == {host.WARM_UP + 40}
    engine.shutdown()


def test_what_is_measured_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records with spans by hand; a phase that is missing, or other than it was, is noticed."""
    from common.trace import StepRecord

    def record(scale: float) -> StepRecord:
        spans = [(name, 10.0 * i, 10.0 * i + scale * (i + 1)) for i, name in enumerate(host.PHASES)]
        return StepRecord(0, begin=0.0, end=50.0, phases=spans)

    records = [record(scale) for scale in (1e-6, 3e-6, 2e-6)]
    records[1].end = 80.0
    monkeypatch.setattr(host, "engine_without_device", lambda **job: None)
    monkeypatch.setattr(host, "decode_steps", lambda engine, **job: records)
    us = host.measure({"part": 5, "num_seqs": 3, "steps": 3})["us"]
    for i, name in enumerate(host.PHASES):
        assert us[name] == pytest.approx(2 * (i + 1), rel=1e-3)
    assert (us["step"], us["p99"]) == (50e6, 80e6)
    assert us["rest"] == pytest.approx(50e6 - 15, rel=1e-9)


def test_medians_of_processes_in_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[tuple[int, int]] = []

    def run_worker(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        jobs.append((job["part"], job["num_seqs"]))
        scale = {0: 1.0, 1: 5.0, 2: 2.0}[jobs.count(jobs[-1]) - 1]
        names = (*host.PHASES, "rest", "step", "p99")
        return {"us": {name: scale * job["num_seqs"] * (i + 1) for i, name in enumerate(names)}}

    monkeypatch.setattr(host, "run_worker", run_worker)
    path = tmp_path / "host.json"
    flags = ["--parts", "5", "8", "--sizes", "4", "16", "--steps", "7", "--json", str(path)]
    assert main(["host", *flags]) == 0
    assert jobs == [(5, 4), (5, 16), (8, 4), (8, 16)] * 3, "processes alternate"
    result = load_result(path)
    assert [(row["part"], row["num_seqs"]) for row in result["rows"]] == jobs[:4]
    row = result["rows"][1]
    assert [row[name] for name in host.PHASES] == [2.0 * 16 * (i + 1) for i in range(5)]
    assert (row["rest"], row["step"], row["p99"], row["each"]) == (192, 224, 256, 14)
    assert "medians of 7 steps; processes of each: 3" in result["notes"][0]
    assert (
        "| 8 | 16 | 32 | 64 | 96 | 128 | 160 | 192 | 224 | 256 | 14.00 |" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("vary", "sizes", "names"),
    [
        ("waiting", [0, 30], ["num_seqs", "num_waiting"]),
        ("blocks", [1300, 1500], ["num_seqs", "num_blocks"]),
        ("context", [128, 2000], ["num_seqs", "context"]),
    ],
)
def test_one_thing_grows(
    vary: str,
    sizes: list[int],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each engine is as it is said to be while it is measured."""
    real, seen = host.decode_steps, []

    def decode_steps(engine: Any, **job: Any) -> list[Any]:
        cache = engine.scheduler.cache
        free, cached = cache.num_free, len(cache.blocks)
        records = real(engine, **job)
        lengths = {len(sequence.prompt_token_ids) for sequence in engine.sequences.values()}
        waiting = engine.stats()["num_waiting"]
        seen.append({"waiting": waiting, "blocks": free, "context": max(lengths)}[vary])
        if vary == "blocks":
            assert cached > 0.8 * free, "nearly all hold something to evict"
        engine.shutdown()
        return records

    monkeypatch.setattr(host, "decode_steps", decode_steps)
    monkeypatch.setattr(host, "run_worker", lambda job, verbose: host.measure(job | {"steps": 3}))
    path = tmp_path / "host.json"
    flags = ["--parts", "15", "--vary", vary, "--sizes", *map(str, sizes), "--repeats", "1"]
    assert main(["host", *flags, "--json", str(path)]) == 0
    result = load_result(path)
    assert [[row[name] for name in names] for row in result["rows"]] == [
        [host.RUNNING[vary], size] for size in sizes
    ]
    assert seen == sizes
    shown = {column["key"] for column in result["columns"]}
    assert shown & {"num_waiting", "num_blocks", "context"} == {names[1]}


def test_the_job_of_a_process() -> None:
    """What a fresh process is asked, answered in this one."""
    job = {"job": "host", "part": PARTS_WITH_QUEUE[-1], "num_seqs": 2, "steps": 3}
    answer = json.loads(json.dumps(worker.JOBS["host"](job)))
    assert set(answer["us"]) == {*host.PHASES, "rest", "step", "p99"}
    assert all(value > 0 for value in answer["us"].values())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--parts", "4"], "part 04 does its device's work itself: --parts from 05 on"),
        (["--parts", "99"], "there is no part 99 here"),
        (["--parts", "15", "--vary", "blocks", "--sizes", "0"], "--sizes must be 1 or more, not 0"),
    ],
)
def test_parts_that_cannot_be_measured(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["host", *flags]) == 2
    assert capsys.readouterr().err == f"python -m common.bench host: error: {complaint}\n"
