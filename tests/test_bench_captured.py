"""`captured`: both ways of a step in one engine, and what is made of their times."""

from pathlib import Path
from typing import Any

import pytest

from common.bench import captured
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.testing.parts import make_engine

TINY = "random:tiny-llama"
JOB = {"part": 15, "batch_size": 3, "prompt_len": 5, "steps": 4, "pairs": 5}


def test_one_engine_does_both_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(15, TINY, max_num_seqs=4)
    graphs, ways = engine.runner.graphs, []

    def step_seconds(engine: Any) -> float:
        idle = lambda: engine.runner.queue.aside(engine.runner.nothing).result()  # noqa: E731
        idle()  # what is in flight has ended
        before = graphs.num_replays
        engine.step()
        idle()
        ways.append((graphs.reason is None, graphs.num_replays - before))
        return 2.0 if graphs.reason is None else 3.0

    monkeypatch.setattr(captured, "step_seconds", step_seconds)
    found = captured.measure(engine, JOB)
    assert (found["replayed"], found["launched"]) == ([2.0] * 5, [3.0] * 5)
    assert len(found["noted"]) == captured.NOTINGS - 1 and min(found["noted"]) > 0
    assert len(found["plain"]) == captured.NOTINGS * 2, "a size is noted when it has occurred twice"
    assert set(ways) == {(True, 1), (False, 0)}, "each step runs in its own way"
    slices = [ways[at][0] for at in range(0, len(ways), JOB["steps"] + captured.SETTLE)]
    assert slices == [True, False, False, True, True, False, False, True, True, False]
    engine.shutdown()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"enforce_eager": True}, "no step is captured: enforce_eager is on"),
        ({"dtype": "bfloat16"}, "no step is captured: a step cannot be recorded: "),
        ({"speculative": "ngram"}, "speculative must be off"),
        ({"max_num_seqs": 2}, "3 sequences are not decoded together: see max_num_seqs"),
        ({"max_model_len": 80}, "3 sequences are not decoded together"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_would_compare_nothing_is_refused(flags: dict[str, Any], why: str) -> None:
    engine = make_engine(15, TINY, **{"max_num_seqs": 4} | flags)
    with pytest.raises(ValueError, match=why):
        captured.measure(engine, JOB)
    engine.shutdown()


def test_what_a_row_says() -> None:
    found = {"launched": [0.03, 0.04, 0.05], "replayed": [0.01, 0.02, 0.05]}
    found |= {"noted": [0.1, 0.2, 0.1], "plain": [0.04, 0.03, 0.09]}
    row = captured.row(found)
    assert row == {
        "launched": pytest.approx(40), "replayed": pytest.approx(20), "ratio": pytest.approx(2),
        "low": None, "high": None, "noting": pytest.approx(60),
    }  # fmt: skip
    assert captured.row(found | {"noted": [], "plain": []})["noting"] is None


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[dict[str, Any]] = []

    def run_worker(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        jobs.append(job)
        return {"launched": [0.02] * 5, "replayed": [0.01] * 5, "noted": [], "plain": []}

    monkeypatch.setattr(captured, "run_worker", run_worker)
    path = tmp_path / "c.json"
    flags = ["captured", "--batch-sizes", "1", "8", "--set", "seed=3", "--pairs", "5"]
    flags += ["--variant", "small:quantization=int4,model=other", "--json", str(path)]
    assert main(flags) == 0
    found = [(job["batch_size"], job["model"], job["settings"]) for job in jobs]
    plain, small = {"max_num_seqs": 8, "seed": 3}, {"quantization": "int4"}
    assert found == [
        (1, "smollm2-135m", plain), (1, "other", plain | small),
        (8, "smollm2-135m", plain), (8, "other", plain | small),
    ]  # fmt: skip
    rows = load_result(path)["rows"]
    assert [row["engine"] for row in rows] == ["part 15", "part 15, small"] * 2
    assert (
        "| part 15, small | 8 | 20.00 | 10.00 | 2.00 | 2.00 | 2.00 | – |" in capsys.readouterr().out
    )
    assert main(["captured", "--part", "14"]) == 2
    assert "part 14 captures no steps" in capsys.readouterr().err
