"""`python -m common.gpu_check` where there is no GPU: on the CPU, without a web framework, and with
a GPU that the CPU plays; what becomes of checks that hang, crash or come too late."""

import ast
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.bench.core.results import load_result
from common.gpu_check import __main__ as gpu_check
from common.gpu_check import correctness, nano_vllm, oracle, rooflines, steps
from common.gpu_check.items import FAILED, NOT_REACHED, OK, Once, attempt
from common.gpu_check.plan import QUICK_MODEL, SECTIONS, Plan
from common.gpu_check.runner import End, run_jobs
from common.gpu_check.variants import Variants
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
NEWEST = max(PARTS)


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """Checks that run in this process set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bare_environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose Pythons, and their children, cannot import what may be absent."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", "import fastapi"]
    control = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "No module named 'fastapi'" in control.stderr  # else these tests show nothing
    return environment


# In the short form the others run, without a web framework too, on the GPU that the CPU plays.
SOME = ["limits", "oracle", "steps"]


@pytest.mark.parametrize(
    "only", [SOME, pytest.param([], marks=pytest.mark.long)], ids=["some", "all"]
)
def test_it_runs_through_without_a_web_framework(
    bare_environment: dict[str, str], tmp_path: Path, only: list[str]
) -> None:
    out = tmp_path / "g.json"
    command = [sys.executable, "-m", "common.gpu_check", "--device", "cpu", "--quick"]
    command += ["--parts", str(NEWEST), "--deadline", "1500", "--json", str(out)]
    command += ["--only", *only] if only else []
    done = subprocess.run(command, env=bare_environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = load_result(out)
    found = result["sections"]
    everywhere = [name for name in SECTIONS if name not in ("formats", "large")]
    assert list(found) == (only or everywhere)
    assert all(item["status"] == OK for items in found.values() for item in items)
    assert result["failures"] == [] and result["limits"]["read_gbps"] > 0
    assert result["machine"]["cores"] and result["versions"]["torch"]
    exact = [item["num_tokens"] for item in found["oracle"] if "float32" in item["name"]]
    assert exact and all(number > 0 for number in exact)
    start, *loops = found["steps"]
    assert start["start_s"] > 0 and len(loops) == 2
    assert all(loop["tok/s"] > 0 and loop["step us"] > 0 for loop in loops)
    if not only:
        check_measured(found)


def check_measured(found: dict[str, list[dict[str, Any]]]) -> None:
    """What the sections say that are not in SOME."""
    assert len(found["kernels"]) > 10
    names = " ".join(item["name"] for item in found["rooflines"])
    for operation in ("attention", "linear", "add_rms_norm", "rotary", "silu", "experts", "sample"):
        assert operation in names
    assert found["nano_vllm"][0]["tokens"] > 0
    speeds = [item["times"] for item in found["quantized"] if "layer us" in item]
    assert len(speeds) == 4 and min(speeds) > 0
    assert found["copies"][0]["save GB/s"] > 0 and len(found["copies"]) == 9
    assert {"transformers", "part"} == {
        item["name"].split()[0].strip(",") for item in found["ladder"]
    }


def test_every_part_runs_without_a_web_framework(bare_environment: dict[str, str]) -> None:
    script = f"""
import importlib
for part in {list(PARTS)}:
    config = importlib.import_module(f"part{{part:02d}}.config").EngineConfig
    engine = importlib.import_module(f"part{{part:02d}}.engine").LLMEngine(
        config(model="random:tiny-llama", device="cpu", threads=1)
    )
    [done] = engine.generate([[5, 6, 7]], progress=False)
    print(part, len(done.token_ids))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == list(PARTS)
    assert all(int(line.split()[1]) > 0 for line in done.stdout.splitlines())


PLAYED = f"""
import json, sys
from importlib import import_module
from common.testing import cuda_on_cpu
cuda_on_cpu.install()
from common.gpu_check.items import attempt
from common.gpu_check.jobs import KINDS
from common.gpu_check.plan import SECTIONS, Plan

limits = {{"device": "cuda", "read_gbps": 9.0, "fp32_gflops": 30.0, "bf16_tflops": 0.03}}
plan = Plan("cuda", "float32", True, [{NEWEST}, 4], {QUICK_MODEL!r})
for section in ("kernels", "steps", "nano_vllm", "copies", "quantized", "rooflines", "ladder"):
    for job in SECTIONS[section].jobs(plan):
        module, _, name = KINDS[job["kind"]].partition(":")
        for name, check in getattr(import_module(module), name)(job | {{"limits": limits}}):
            if job["kind"] != "kernels" or "rms_norm" in name:
                print(json.dumps([section, attempt(name, check)]))
"""


def test_what_is_written_for_a_gpu_runs_on_one_that_the_cpu_plays(
    bare_environment: dict[str, str],
) -> None:
    command = [sys.executable, "-c", PLAYED]
    done = subprocess.run(command, env=bare_environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    found: dict[str, list[Any]] = {}
    for section, item in map(json.loads, lines):
        found.setdefault(section, []).append(item)
    assert [item for items in found.values() for item in items if item["status"] != OK] == []
    names = " ".join(item["name"] for items in found.values() for item in items)
    texts = (
        "cold start",
        "compile ahead",
        "launches",
        "compiled after",
        "tile (",
        "memory",
        "graph",
    )
    for text in texts:
        assert text in names, text
    assert sum("no waiting" in item["name"] for item in found["steps"]) == 10
    [graph] = [item for item in found["steps"] if "graph" in item["name"]]
    assert graph["same tokens %"] == 100  # its forwards were captured once, and replayed


ODD = """
import os, pathlib, signal, time

def checks(job):
    def note(name):
        with open(job["log"], "a") as file:
            file.write(f"{os.getpid()} {name}\\n")

    def well():
        note("well")
        return {"value": float("nan"), "inner": [float("inf"), 1]}

    def raises():
        note("raises")
        raise ValueError("no good")

    def dies():
        note("dies")
        os.kill(os.getpid(), signal.SIGABRT)

    def hangs():
        note("hangs")
        time.sleep(1000)

    known = {"well": well, "raises": raises, "dies": dies, "hangs": hangs}
    return [(f"{i} {name}", known[name]) for i, name in enumerate(job["checks"])]
"""


class Odd:
    """Runs checks that go well, raise, die and hang."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"

    def run(
        self, checks: list[str], seconds: float = 60, device: str = "cpu", **more: Any
    ) -> list[Any]:
        job = {"kind": "odd_checks:checks", "name": "odd", "device": device, "checks": checks,
               "log": str(self.log), "limit": 1.0, "first_limit": 1.0, "needs": 0.5, **more}  # fmt: skip
        end = End(time.monotonic() + seconds, "time was up")
        return list(run_jobs([job], end))

    def processes(self) -> list[str]:
        """The process that did each check."""
        return [line.split()[0] for line in self.log.read_text().splitlines()]


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Odd:
    (tmp_path / "odd_checks.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Odd(tmp_path)


def test_a_check_that_dies_or_hangs_leaves_the_others(odd: Odd) -> None:
    names = ["well", "raises", "dies", "well", "hangs", "well"]
    items = odd.run(names)
    assert [item["name"] for item in items] == [f"{i} {name}" for i, name in enumerate(names)]
    assert [item["status"] == OK for item in items] == [name == "well" for name in names]
    assert items[0]["value"] is None and items[0]["inner"] == [None, 1]
    assert "no good" in items[1]["error"] and "odd_checks.py" in items[1]["error"]
    assert "exit status -6" in items[2]["error"]
    assert items[4]["status"] == FAILED and "its own limit, after 1 s" in items[4]["error"]
    first, second, third, fourth, fifth, sixth = odd.processes()
    assert first == second == third and fourth == fifth and len({first, fourth, sixth}) == 3


def test_a_gpu_that_a_failure_has_broken_gets_a_new_process(odd: Odd) -> None:
    items = odd.run(["raises", "well"], device="cuda")  # there is none: it refuses all work
    assert [item["status"] for item in items] == [FAILED, OK]
    first, second = odd.processes()
    assert first != second


def test_what_does_not_fit_is_named(odd: Odd) -> None:
    stopped, rest = odd.run(["hangs", "well"], seconds=2, first_limit=60.0)
    assert stopped["status"] == rest["status"] == NOT_REACHED
    assert stopped["name"] == "0 hangs" and "time was up: stopped after" in stopped["error"]
    assert rest["name"] == "1 well" and rest["error"] == "time was up"
    assert rest["seconds_left"] == 0
    [unbegun] = odd.run(["well"], seconds=5, needs=6)
    assert unbegun["status"] == NOT_REACHED and unbegun["name"] == "odd"
    assert 3 < unbegun["seconds_left"] <= 5
    assert len(odd.processes()) == 1  # the last one was never begun


def test_only_some_checks_of_a_job(odd: Odd) -> None:
    assert [item["name"] for item in odd.run(["raises", "well"], only=["wel", "x"])] == ["1 well"]
    assert odd.run(["raises"], only=["nothing"]) == []
    [nothing] = odd.run([])
    assert nothing["status"] == FAILED and nothing["error"] == "there is nothing to check"


def test_a_job_that_cannot_begin_has_failed() -> None:
    job = {"kind": "nonsense", "name": "broken", "device": "cpu", "limit": 9, "first_limit": 9,
           "needs": 0}  # fmt: skip
    [broken] = run_jobs([job], End(time.monotonic() + 60, ""))
    assert broken["status"] == FAILED and broken["name"] == "broken"
    assert "exit status 1" in broken["error"] and "nonsense" in broken["error"]


def test_a_job_that_cannot_be_run_is_told(odd: Odd) -> None:
    """JSON has no such thing as an object, so its process never gets the job."""
    job = {"kind": "odd_checks:checks", "name": "unwritable", "checks": [object()], "needs": 0}
    good = {**job, "name": "odd", "device": "cpu", "checks": ["well"], "log": str(odd.log),
            "limit": 9, "first_limit": 9}  # fmt: skip
    items = list(run_jobs([job, good], End(time.monotonic() + 60, "")))
    assert [item["name"] for item in items] == ["unwritable", "0 well"]
    assert items[0]["status"] == FAILED and "not JSON serializable" in items[0]["error"]
    assert items[1]["status"] == OK


def test_a_killed_run_leaves_what_it_has_found(tmp_path: Path) -> None:
    out, token = tmp_path / "g.json", f"killed-{os.getpid()}"
    command = [sys.executable, "-m", "common.gpu_check", "--device", "cpu", "--quick"]
    command += ["--only", "kernels", "--json", str(out), "--parts", str(NEWEST)]
    environment = {**os.environ, "GPU_CHECK_TEST": token}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.stdout is not None
    told = 0
    for line in run.stdout:
        told += b": ok" in line
        if told == 3:
            break
    children = processes_with(token) - {run.pid}
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    result = load_result(out)
    assert len(result["sections"]["kernels"]) >= 2  # the last one may not have been written yet
    assert all(item["status"] == OK for item in result["sections"]["kernels"])
    assert result["deadline"] == gpu_check.DEADLINE > result["spent_s"] > 0
    assert children, "nothing was under way"
    deadline = time.monotonic() + 30
    while processes_with(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with(token), "a child outlives its parent, and would hold the GPU"


def processes_with(token: str) -> set[int]:
    """Processes with this value in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 5])
@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_the_loops_are_what_they_are_called(part: int, num_in_flight: int) -> None:
    """In turns a step's device time is known when it ends; with two in flight, one step later."""
    engine = make_engine(part, "random:tiny-llama", num_blocks=64, threads=1, max_num_seqs=2)
    found = steps.loop_times(engine, {"quick": True}, num_in_flight, 2)
    assert found["tok/s"] > 0 and found["step us"] > 0 and found["prepare us"] > 0
    records = engine.trace.records()
    launched = {record.step for record in records if record.scheduled}
    read = {step: record.step for record in records for step, _, _ in record.device}
    assert read.keys() == launched
    assert {read[step] - step for step in launched} == {num_in_flight - 1}


def test_a_failure_has_its_traceback_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []
    limits = {"device": "cpu", "read_gbps": 1.0, "fp32_gflops": 1.0}

    def scripted(jobs: list[dict[str, Any]], end: End, at_once: int) -> Iterator[dict[str, Any]]:
        asked.extend((job["kind"], job["name"], job["only"]) for job in jobs)
        for job in jobs:
            if job["kind"] == "limits":
                yield attempt("limits", lambda: {"limits": limits})
            else:
                yield attempt(job["name"], lambda: {"share": 1 / 0})

    monkeypatch.setattr(gpu_check, "run_jobs", scripted)
    monkeypatch.setattr(time, "strftime", lambda form: "00:00:00")
    out = tmp_path / "g.json"
    flags = ["--device", "cpu", "--quick", "--parts", "1", "2", "--json", str(out)]
    assert gpu_check.main([*flags, "--only", "rooflines:a", "oracle", "rooflines:b"]) == 1
    # In the sections' own order, the limits first, and of the parts the newest.
    assert asked == [("limits", "limits", []), ("oracle", "part 02", []),
                     ("oracle", "part 01", []), ("rooflines", "all", ["a", "b"])]  # fmt: skip
    result = load_result(out)
    assert [row["status"] for row in result["rows"]] == ["ok", "failed", "failed", "failed"]
    assert [failure["name"] for failure in result["failures"]] == ["part 02", "part 01", "all"]
    assert "gpu_check --device cpu" in result["command"]
    assert "1 / 0" in result["failures"][0]["error"]
    told = capsys.readouterr().out
    assert "00:00:00   rooflines: all: ZeroDivisionError: division by zero" in told


def test_without_limits_speeds_are_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scripted(jobs: list[dict[str, Any]], end: End, at_once: int) -> Iterator[dict[str, Any]]:
        for job in jobs:
            if job["kind"] == "limits":
                yield attempt("limits", lambda: {"limits": 1 / 0})
            else:
                [(name, check), *_] = rooflines.checks(json.loads(json.dumps(job)))
                yield attempt(name, check)

    monkeypatch.setattr(gpu_check, "run_jobs", scripted)
    out = tmp_path / "g.json"
    gpu_check.main(["--device", "cpu", "--quick", "--only", "rooflines", "--json", str(out)])
    result = load_result(out)
    [speed] = result["sections"]["rooflines"]
    assert speed["status"] == OK and speed["us"] > 0 and speed["gbps"] > 0
    assert speed["mbu"] is None and speed["mfu"] is None
    assert "unmeasured" in result["limits"]


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.testing.kernels import all_cases
    from common.testing.kernels.case import Case

    errors = [1e-7, math.nan, 0.5, None]
    cases = [Case("norm", f"case {i}", lambda t, e=e: e) for i, e in enumerate(errors)]
    monkeypatch.setattr(all_cases, "all_cases", lambda target: cases)
    job = {"device": "cpu", "dtype": "float32", "share": (0, 1), "quick": True}
    items = [attempt(*check) for check in correctness.checks(job)]
    assert [item["status"] for item in items] == [OK, FAILED, FAILED, OK]
    assert "error 0.5, allowed 5e-06" in items[2]["error"] and "note" in items[3]
    shares = [list(correctness.checks(job | {"share": (i, 3)})) for i in range(3)]
    assert sorted(name for share in shares for name, _ in share) == [item["name"] for item in items]


def test_wrong_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of a part can fail: with tokens of nobody's choice both do."""
    pairs = [([5 + i, 6, 7], [11, 12, 13, 14]) for i in range(3)]
    monkeypatch.setattr(oracle, "outputs_of", lambda job, model, dtype: pairs)
    choices = [(QUICK_MODEL, "float32"), (QUICK_MODEL, "bfloat16")]
    job = {"part": 3, "device": "cpu", "quick": True, "choices": choices}
    items = [attempt(*check) for check in oracle.checks(job)]
    assert len(items) == 2
    for item in items:
        assert item["status"] == FAILED and "AssertionError" in item["error"], item


def test_what_is_made_once_fails_as_often_as_it_is_needed() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        if len(made) == 1:
            raise ValueError("no memory")
        return 5

    once = Once(make)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind):
            once()
    assert made == [1]
    assert [once() for once in [Once(make)] for _ in range(2)] == [5, 5] and made == [1, 1]


def test_the_workload_is_the_published_one() -> None:
    prompts, lengths = nano_vllm.workload(False, 151936)
    assert len(prompts) == len(lengths) == 256
    assert sum(lengths) == nano_vllm.PUBLISHED["output_tokens"] == 133_966
    assert {100 <= len(prompt) <= 1024 for prompt in prompts} == {True}


def test_what_is_imported_late_is_there() -> None:
    """Inside functions, where only a run on a GPU may come by."""
    missing = []
    for path in sorted((ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("common"):
                continue
            if "flash" in node.module:
                continue  # imports a package that is not here
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = hasattr(module, alias.name) or importlib.util.find_spec(
                    f"{node.module}.{alias.name}"
                )
                missing += [] if found else [f"{path}:{node.lineno}: {alias.name}"]
    assert missing == []


def test_triton_tells_what_it_compiles() -> None:
    """Triton calls the hook with what this reads: checked with its own call."""
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget

    variants = Variants()
    function = SimpleNamespace(__qualname__="kernel", __module__="m")
    kernel = SimpleNamespace(fn=function, params=[])
    options = SimpleNamespace(num_warps=4, num_ctas=1, num_stages=3, enable_fp_fusion=True,
                              launch_cooperative_grid=False, extern_libs=None)  # fmt: skip
    known = {
        "hook": variants.hook, "key": "key", "device": 0, "constants": {(2,): 64},
        "signature": {"x": "*bf16", "y": "i32", "SIZE": "constexpr"}, "options": options,
        "configs": [{}], "is_warmup": False, "target": GPUTarget("cuda", 90, 32),
    }  # fmt: skip
    call = jit.JITFunction._call_hook
    names = list(inspect.signature(call).parameters)[1:]  # they differ from version to version
    assert not call(kernel, **{name: known[name] for name in names})  # else it would not go on
    assert variants.names == ["kernel(*bf16, i32; [64])"]


def test_the_plan_fits_the_deadline_and_begins_with_what_matters_most(capsys: Any) -> None:
    plan = Plan("cuda", "bfloat16", False, [8, 7, 6, 5, 4, 3], "random:qwen3-0.6b")
    assert sum(section.seconds for section in SECTIONS.values()) <= gpu_check.DEADLINE
    assert list(SECTIONS)[:3] == ["limits", "kernels", "oracle"]
    jobs = {name: section.jobs(plan) for name, section in SECTIONS.items()}
    newer = Plan("cuda", "bfloat16", False, [12, 8], "random:qwen3-0.6b")
    assert not jobs["copies"] and SECTIONS["copies"].jobs(newer), "it is for part 12 and later"
    assert all(own for name, own in jobs.items() if name != "copies")
    kinds = {job["dtype"] for job in jobs["kernels"] if job["kind"] == "kernels"}
    assert kinds == {"bfloat16"}
    assert jobs["formats"][0]["dtype"] == "float32"
    assert [job.get("part") for job in jobs["ladder"]] == [8, None, 5, 4, 3]
    assert {job["part"] for job in jobs["oracle"]} == {8, 3}
    for own in jobs.values():
        for job in own:
            json.dumps(job, allow_nan=False)
            assert job["limit"] > 0
    # What a GPU would run is told without one.
    for flags in (["--device", "cpu", "--quick"], []):
        assert gpu_check.main(["--list", *flags]) == 0
        told = capsys.readouterr().out
        assert all(f"{name}: " in told for name in SECTIONS)
        assert ("qwen3-0.6b" in told) == (flags == [])


def test_help_describes_every_section(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--help"])
    assert stop.value.code == 0
    described = re.findall(r"^ {4}(\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    assert described == list(SECTIONS), "each has its line, in the order of the run"


@pytest.mark.parametrize(
    "flags", ["--device tpu", "--only nonsense", "--parts 99", "--device cpu", "--time-limit 0"]
)
def test_bad_flags(flags: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(flags.split())
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
