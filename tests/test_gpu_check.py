"""`python -m common.gpu_check` on a CPU: it runs through, without a web framework, and tells failures."""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.bench.core.results import load_result
from common.gpu_check import __main__ as gpu_check
from common.gpu_check import correctness, oracle, overlap
from common.gpu_check.items import FAILED, NOT_REACHED, OK, attempt
from common.gpu_check.runner import run_jobs
from common.testing.parts import PARTS, ROOT, make_engine

ABSENT = (  # what a machine with a GPU may lack
    "fastapi", "starlette", "sse_starlette", "uvicorn", "pydantic", "openai", "zmq",
    "msgspec", "prometheus_client", "flash_attn",
)  # fmt: skip
HIDER = f"""
import sys

class Hider:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {ABSENT!r}:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hider(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def bare_environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose Pythons, and their children, cannot import what may be absent."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDER)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.skipif(max(PARTS) < 3, reason="part 03 is not there")
def test_it_runs_through_without_a_web_framework(
    bare_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "import fastapi"]
    control = subprocess.run(command, env=bare_environment, capture_output=True, text=True)
    assert "No module named 'fastapi'" in control.stderr  # else this test shows nothing
    out = tmp_path / "g.json"
    command = [sys.executable, "-m", "common.gpu_check", "--device", "cpu", "--quick"]
    command += ["--parts", str(max(PARTS)), "--json", str(out)]
    done = subprocess.run(command, env=bare_environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = load_result(out)
    found = result["sections"]
    assert list(found) == ["limits", "kernels", "oracle", "speed", "overlap", "ladder"]
    assert all(item["status"] == OK for items in found.values() for item in items)
    assert result["failures"] == [] and result["limits"]["read_gbps"] > 0
    assert result["machine"]["cores"] and result["versions"]["torch"]
    assert [item["num_tokens"] > 0 for item in found["oracle"] if "fp32" in item["name"]] == [
        True
    ] * 2
    assert found["kernels"][0]["num_cases"] > 20 and found["kernels"][0]["num_failed"] == 0
    names = " ".join(item["name"] for item in found["speed"])
    for operation in ("attention", "linear", "add_rms_norm", "rotary", "silu", "sample"):
        assert operation in names
    for loop in found["overlap"]:
        assert loop["tok/s at 2"] > 0 and loop["step us at 2"] > 0
    assert len(found["overlap"]) == 2 * (max(PARTS) > 4)
    [ladder] = found["ladder"]
    assert [row["point"] for row in ladder["rows"]][-1].startswith("prefill")
    assert all(row["rate"] > 0 and row["mfu"] > 0 for row in ladder["rows"])


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 5])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_loops_are_what_they_are_called(
    part: int, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns a step's device time is known when it ends; with two in flight, one step later."""
    engines = []

    def started(job: dict[str, Any]) -> tuple[Any, None, None]:
        settings = {**job["settings"], "num_blocks": 64, "threads": 1}
        engines.append(make_engine(job["part"], job["model"], **settings))
        return engines[-1], None, None

    monkeypatch.setattr(overlap, "start_engine", started)
    job = {"part": part, "model": "random:tiny-llama", "device": "cpu", "quick": True}
    found = overlap.measure(job, is_async)
    assert found["tok/s at 2"] > 0 and found["step us at 2"] > 0
    [engine] = engines
    records = engine.trace.records()
    launched = {record.step for record in records if record.scheduled}
    read = {step: record.step for record in records for step, _, _ in record.device}
    assert read.keys() == launched
    later = {read[step] - step for step in launched}
    assert later == ({1} if is_async else {0})


def test_a_job_that_dies_leaves_the_others(tmp_path: Path) -> None:
    jobs = [
        {"kind": "nonsense", "name": "broken"},
        {"kind": "limits", "name": "l", "device": "tpu", "quick": True},
    ]
    broken, limits = run_jobs(jobs, 100)
    assert broken["status"] == FAILED and broken["name"] == "broken"
    assert "exit status 1" in broken["error"] and "KeyError: 'nonsense'" in broken["error"]
    assert limits["status"] == FAILED and "device must be cpu or cuda" in limits["error"]


def test_the_time_limit_ends_a_job_and_keeps_the_rest_from_starting() -> None:
    job = {"kind": "limits", "name": "first", "device": "cpu", "quick": False}
    first, second = run_jobs([job, {**job, "name": "second"}], 0.3)
    assert first["status"] == FAILED and "stopped by the time limit" in first["error"]
    assert second == {
        "name": "second", "status": NOT_REACHED, "seconds": 0.0,
        "error": "the section's time limit had passed",
    }  # fmt: skip


def test_a_failure_has_its_traceback_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []
    limits = {"device": "cpu", "read_gbps": 1.0, "fp32_gflops": 1.0}

    def scripted(jobs: list[dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
        asked.extend((job["kind"], job["name"]) for job in jobs)
        for job in jobs:
            if job["kind"] == "limits":
                yield attempt("limits", lambda: {"limits": limits})
            else:
                yield attempt(job["name"], lambda: {"share": 1 / 0})

    monkeypatch.setattr(gpu_check, "run_jobs", scripted)
    monkeypatch.setattr(time, "strftime", lambda form: "00:00:00")
    out = tmp_path / "g.json"
    flags = ["--device", "cpu", "--quick", "--parts", "1", "2", "--json", str(out)]
    assert gpu_check.main([*flags, "--only", "speed,oracle"]) == 1
    # In the sections' own order, the limits first, and of the parts the newest.
    names = [("limits", "limits"), ("oracle", "part 02"), ("oracle", "part 01"), ("speed", "speed")]
    assert asked == names
    result = load_result(out)
    assert [row["status"] for row in result["rows"]] == ["ok", "failed", "failed", "failed"]
    assert [failure["name"] for failure in result["failures"]] == ["part 02", "part 01", "speed"]
    assert "gpu_check --device cpu" in result["command"]
    assert "1 / 0" in result["failures"][0]["error"]
    assert "00:00:00   speed: speed: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.testing.kernels.all_cases import CaseResult

    results = [
        CaseResult("linear", "good", "float32", 1e-7, 1e-5),
        CaseResult("linear", "nan", "float32", math.nan, 1e-5),
        CaseResult("norm", "bad", "float32", 0.5, 1e-5),
    ]
    monkeypatch.setattr(correctness, "run_cases", lambda *target: results)
    whole, *wrong = correctness.items({"device": "cpu"})
    assert (whole["num_cases"], whole["num_failed"], whole["cases"][1]["error"]) == (3, 2, None)
    assert "linear, nan" in whole["worst"] or "norm, bad" in whole["worst"]
    assert [item["status"] for item in wrong] == [FAILED, FAILED]
    assert wrong[1]["name"] == "cpu, norm, bad" and "error 0.5, allowed 1e-05" in wrong[1]["error"]
    monkeypatch.setattr(correctness, "run_cases", lambda *target: [])
    [nothing] = correctness.items({"device": "cpu"})
    assert nothing["status"] == FAILED


def test_wrong_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of a part can fail: with tokens of nobody's choice both do."""
    pairs = [([5 + i, 6, 7], [11, 12, 13, 14]) for i in range(3)]
    monkeypatch.setattr(oracle, "outputs_of", lambda job, model, dtype: pairs)
    job = {"part": 3, "device": "cpu", "quick": True}
    for item in oracle.items(job):
        assert item["status"] == FAILED and "AssertionError" in item["error"], item


def test_help_describes_every_section(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--help"])
    assert stop.value.code == 0
    described = re.findall(r"^ {4}(\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    assert described == list(gpu_check.SECTIONS), "each has its line, in the order of the run"


@pytest.mark.parametrize(
    "flags", ["--device tpu", "--only nonsense", "--parts 99", "--device cpu", "--time-limit 0"]
)
def test_bad_flags(flags: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(flags.split())
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
