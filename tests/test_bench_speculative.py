"""`speculative`: its prompts, its driver, and runs over scripted and tiny engines. No assertion on time."""

import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.bench import BenchError
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.speculative import (
    run as speculative,
)
from common.bench.speculative import (
    variants as speculative_variants,
)
from common.bench.speculative import (
    worker as speculative_worker,
)
from common.bench.speculative.prompts import (
    MATERIAL,
    PROGRAMS,
    RANDOM_BLOCK,
    RANDOM_REPEATS,
    TEXTS,
    WORKLOADS,
    prompt_token_ids,
    text_prompt,
)
from common.bench.speculative.rows import NUM_SINGLES, Point
from common.bench.speculative.variants import Choice, choice
from common.bench.speculative.worker import decode, merged
from common.models.checkpoint import resolve
from common.models.tokenizer import Tokenizer
from common.testing.parts import PARTS

LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}


# Prompts


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_batch_of_32_has_32_prompts(workload: str) -> None:
    prompts = [text_prompt(workload, index) for index in range(36)]
    assert len(set(prompts)) == 36 and text_prompt(workload, 36) == prompts[0]
    subjects = [subject for _, subject in MATERIAL[workload]]
    assert len(set(subjects)) == 12
    assert all(any(subject in prompt for subject in subjects) for prompt in prompts)
    for first, second in itertools.pairwise(prompts):  # neighbours share neither task nor text
        assert first[:20] != second[:20]
        assert not any(subject in first and subject in second for subject in subjects)


def test_an_answer_is_not_longer_than_the_text_to_copy() -> None:
    """Else what comes after the copy would be measured too."""
    tokenizer = Tokenizer.load(resolve("smollm2-135m"))
    assert min(len(tokenizer.encode(text)) for text in TEXTS + PROGRAMS) >= speculative.OUTPUT


def test_prompts_are_in_the_models_chat_format() -> None:
    class Tokenizer:
        def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
            [message] = messages
            assert message["role"] == "user"
            return [ord(character) for character in message["content"]]

    token_ids = prompt_token_ids("copy", 1, Tokenizer(), 0, 0)
    assert "".join(map(chr, token_ids)) == text_prompt("copy", 1)


def test_random_prompts() -> None:
    copy, prose = (prompt_token_ids(name, 5, None, 512, 0) for name in WORKLOADS)
    assert len(copy) == len(prose) == RANDOM_BLOCK * RANDOM_REPEATS
    assert copy == copy[:RANDOM_BLOCK] * RANDOM_REPEATS
    assert prose[:RANDOM_BLOCK] != prose[RANDOM_BLOCK : 2 * RANDOM_BLOCK]
    others = [prompt_token_ids("copy", *about) for about in ((6, None, 512, 0), (5, None, 512, 1))]
    assert copy == prompt_token_ids("copy", 5, None, 512, 0) and copy not in others


def test_every_round_has_other_prompts() -> None:
    one, many = Point("copy", 1), Point("copy", 32)
    assert [len(batch) for batch in one.prompts(0)] == [1] * NUM_SINGLES
    firsts = [index for number in range(5) for [index] in one.prompts(number)]
    assert firsts == list(range(5 * NUM_SINGLES))
    [batch] = many.prompts(2)
    assert batch == list(range(2 * NUM_SINGLES, 2 * NUM_SINGLES + 32))
    assert all(set(itertools.chain(*one.prompts(n))) <= set(many.prompts(n)[0]) for n in range(9))


# The driver, on scripted engines


FAKE_ENGINE = """
from types import SimpleNamespace

class LLMEngine:
    '''One token a step for each sequence, and where it speculates, of what is copied, three: two of
    four drafts stay. Time is counted: a ms a step, and five for a prompt; one prompt a step begins.'''

    def __init__(self, config):
        self.config, self.active, self.now, self.closed = config, {}, 0.0, False
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        records = []
        self.trace = SimpleNamespace(records=lambda: records)

    def add_request(self, request):
        name, params = request.request_id, request.params
        assert params.temperature == 0 and params.ignore_eos and name not in self.active
        self.active[name] = SimpleNamespace(
            prompt=list(request.prompt_token_ids), most=params.max_tokens, output=[]
        )

    def gain(self, request):
        is_copy = len(set(request.prompt)) < len(request.prompt) / 2
        if getattr(self.config, "speculative", "off") == "off" or not is_copy:
            return 1
        self.num_drafts += 1
        self.num_draft_tokens += 4
        count = min(3, request.most - len(request.output))
        self.num_accepted_tokens += count - 1
        return count

    def step(self):
        outputs, can_begin = [], True
        self.now += 0.001
        for name, request in list(self.active.items()):
            count = 0
            if request.output:
                count = self.gain(request)
            elif can_begin:
                count, can_begin = 1, False
                self.now += 0.005
            for _ in range(count):
                request.output.append((sum(request.prompt) + len(request.output)) % 300 + 100)
            ended = len(request.output) == request.most
            outputs.append(SimpleNamespace(
                request_id=name, token_ids=request.output[-count:] if count else [], finished=ended
            ))
            if ended:
                del self.active[name]
        phases = {"forward": 0.001}
        if getattr(self.config, "speculative", "off") != "off":
            phases["propose"] = 0.0005
        self.trace.records().append(SimpleNamespace(phase_seconds=lambda: phases))
        return outputs

    def has_unfinished(self):
        return bool(self.active)

    def stats(self):
        if getattr(self.config, "speculative", "off") == "off":
            return {"num_running": 0}
        names = "num_drafts", "num_draft_tokens", "num_accepted_tokens"
        return {name: getattr(self, name) for name in names}

    def check_integrity(self):
        assert not self.active

    def shutdown(self):
        assert not self.closed
        self.closed = True
"""
FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class EngineConfig:
    model: str
    max_num_seqs: int = 4
"""
SPECULATES = """    speculative: str = "off"
    num_speculative_tokens: int | None = None
    draft_model: str | None = None

    def __post_init__(self):
        if self.speculative not in ("off", "ngram", "draft"):
            raise ValueError(f"nobody is called {self.speculative}")
        if self.speculative == "off" and self.num_speculative_tokens:
            raise ValueError("it needs speculative")
"""


@pytest.fixture
def fake_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts 76, which does not speculate, and 77, which can; here and in child processes."""
    for name, more in (("part76", ""), ("part77", SPECULATES)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "engine.py").write_text(FAKE_ENGINE)
        (tmp_path / name / "config.py").write_text(FAKE_CONFIG + more)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(speculative, "run_worker", lambda job: LIMITS)
    yield
    for name in [name for name in sys.modules if name.startswith(("part76", "part77"))]:
        del sys.modules[name]
    importlib.invalidate_caches()


def fake_engine(**settings: Any) -> Any:
    engine = importlib.import_module("part77.engine").LLMEngine
    return engine(importlib.import_module("part77.config").EngineConfig("m", **settings))


def drive(engine: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    return decode(engine, prompts, max_tokens, clock=lambda: engine.now)


COPY, PROSE = [5, 6] * 10, list(range(20))


def test_decoding_is_counted_from_the_first_token_of_all(fake_parts: None) -> None:
    """By hand: the third begins in step 3, when the first has 3 tokens; 10 each are asked for."""
    run = drive(fake_engine(), [PROSE, PROSE[1:], PROSE[2:]], 10)
    assert (run["num_tokens"], run["num_steps"], run["num_turns"]) == (7 + 8 + 9, 9, 7 + 8 + 9)
    assert run["seconds"] == pytest.approx(0.009) and run["whole_s"] == pytest.approx(0.027)
    assert run["phases"] == pytest.approx({"forward": 0.009})
    assert run["counters"] == {}
    first = (sum(PROSE)) % 300 + 100
    assert run["outputs"][0] == list(range(first, first + 10))


def test_drafts_are_counted(fake_parts: None) -> None:
    engine = fake_engine(speculative="ngram")
    drive(engine, [COPY], 10)  # what was counted before does not count
    run = drive(engine, [COPY, PROSE], 10)
    plain = drive(fake_engine(), [COPY, PROSE], 10)
    assert run["outputs"] == plain["outputs"]
    # The copy has 4 tokens when the other begins; then it takes two steps, and the other nine.
    assert (run["num_tokens"], run["num_turns"], run["num_steps"]) == (6 + 9, 2 + 9, 9)
    assert run["phases"] == pytest.approx({"forward": 0.009, "propose": 0.0045})
    assert run["counters"] == {"num_drafts": 2, "num_draft_tokens": 8, "num_accepted_tokens": 4}
    both = merged([run, run])
    assert both["counters"]["num_accepted_tokens"] == 8 and both["num_steps"] == 18
    assert both["outputs"] == run["outputs"] * 2
    assert both["seconds"] == pytest.approx(2 * run["seconds"])


def test_what_an_engine_may_not_do(fake_parts: None) -> None:
    def spoiled(change: Callable[[Any], Any]) -> Any:
        engine = fake_engine()
        step = engine.step
        engine.step = lambda: [change(output) or output for output in step()]
        return engine

    def lose(output: Any) -> None:
        if output.finished:
            output.token_ids = []

    with pytest.raises(BenchError, match="batch 2: 18 tokens, not 20"):
        drive(spoiled(lose), [PROSE, COPY], 10)
    with pytest.raises(BenchError, match="batch 1: nothing is left to decode"):
        drive(fake_engine(), [PROSE], 1)


# The subcommand


def run_here(job: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """What the fresh process would do: importing torch takes it seconds."""
    answer = speculative_worker.speculative_job(json.loads(json.dumps(job)))
    return json.loads(json.dumps({**answer, "wall_other_cores": 0.0}))


def test_a_fresh_process_answers_the_same(fake_parts: None) -> None:
    job = {
        "job": "speculative", "part": 77, "model": "random:tiny-llama",
        "settings": {"speculative": "ngram"}, "max_tokens": 7, "warm_up": [[COPY]],
        "points": [{"name": "copy, batch 1", "batches": [[COPY], [PROSE]]}],
    }  # fmt: skip
    answers = [run(job, False) for run in (run_here, speculative_variants.run_job)]
    here, there = (answer["runs"]["copy, batch 1"] for answer in answers)
    for run in (here, there):
        assert run.pop("seconds") > 0 and run.pop("whole_s") > 0
    assert here == there and here["counters"]["num_accepted_tokens"] == 4
    assert answers[1]["dtype"] == "float32" and answers[1]["shape"]["num_hidden_layers"] > 0
    with pytest.raises(BenchError, match="speculative failed: batch 1: nothing is left"):
        speculative_variants.run_job({**job, "max_tokens": 1}, False)


def test_speculative_of_fake_parts(
    fake_parts: None, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    jobs: list[dict[str, Any]] = []

    def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        jobs.append(job)
        return run_here(job)

    monkeypatch.setattr(speculative_variants, "run_job", run_job)
    flags = "speculative --variants 76 77 77:ngram --batches 4 1 --pairs 2 --output-len 13 --quick-limits"
    flags += " --model random:tiny-llama --set num_speculative_tokens=4"
    out = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert main([*flags.split(), *out]) == 0
    # In turns, in alternating order; all get the same work, and other work in the second round.
    kinds = [(job["part"], job["settings"].get("speculative")) for job in jobs]
    assert kinds[:3] == [(76, None), (77, None), (77, "ngram")] and kinds[3:] == kinds[2::-1]
    assert jobs[0]["settings"] == {"max_num_seqs": 4}
    assert jobs[2]["settings"] == {
        "max_num_seqs": 4, "num_speculative_tokens": 4, "speculative": "ngram",
    }  # fmt: skip
    for job, other in ((jobs[0], jobs[2]), (jobs[3], jobs[5])):
        assert job["points"] == other["points"] and job["warm_up"] == other["warm_up"]
    assert jobs[3]["points"][-1]["batches"] != jobs[0]["points"][0]["batches"]
    assert [point["name"] for point in jobs[3]["points"]] == [
        "prose, batch 4", "prose, batch 1", "copy, batch 4", "copy, batch 1",
    ]  # fmt: skip

    result = load_result(tmp_path / "s.json")
    table = {(row["workload"], row["batch_size"], row["engine"]): row for row in result["rows"]}
    assert len(table) == 2 * 2 * 3
    for (workload, size, name), row in table.items():
        drafts = name == "part 77, ngram" and workload == "copy"
        assert row["acceptance"] == (pytest.approx(50) if drafts else None), (workload, size, name)
        assert row["draft_length"] == (4 if drafts else None)
        assert row["accepted_length"] == (2 if drafts else None)
        assert row["tokens_per_turn"] == pytest.approx(3 if drafts else 1)
        proposes = name == "part 77, ngram"
        assert row["propose_ms"] == (pytest.approx(0.5) if proposes else None)
        first = table[workload, size, "part 76"]
        if name == "part 76":
            assert row["ratio"] is None and row["same"] is None
            continue
        assert row["same"] == 100 and row["pairs"] == 2
        ratios = [a / b for a, b in zip(row["rates"], first["rates"], strict=True)]
        assert row["ratios"] == pytest.approx(ratios)
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "| copy | 4 | part 77, ngram |" in capsys.readouterr().out
    assert "ratio_low" not in [entry["key"] for entry in result["columns"]]


def test_other_tokens_are_told(fake_parts: None, monkeypatch: Any, tmp_path: Path) -> None:
    def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        answer = run_here(job)
        if job["part"] == 77:
            answer["runs"]["prose, batch 1"]["outputs"][0][5] = -1
        return answer

    monkeypatch.setattr(speculative_variants, "run_job", run_job)
    flags = "speculative --variants 76 77 --batches 1 --pairs 5 --output-len 10 --quick-limits"
    flags += f" --workloads prose --model random:tiny-llama --json {tmp_path}/s.json"
    flags += f" --plot {tmp_path}/s.svg"
    assert main(flags.split()) == 0
    [first, second] = load_result(tmp_path / "s.json")["rows"]
    assert second["same"] == pytest.approx(100 * 25 / 30) and first["same"] is None
    assert second["ratio_low"] <= second["ratio"] <= second["ratio_high"]
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_a_variant_that_fails(fake_parts: None, monkeypatch: Any, capsys: Any) -> None:
    def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        if "speculative" in job["settings"]:
            raise BenchError("bad luck")
        return run_here(job)

    monkeypatch.setattr(speculative_variants, "run_job", run_job)
    flags = "speculative --variants 76 77:ngram --batches 2 --pairs 2 --model random:tiny-llama"
    flags += " --quick-limits"
    assert main(flags.split()) == 1
    output, error = capsys.readouterr()
    assert "| copy | 2 | part 76 |" in output and "| part 77, ngram |" not in output
    assert "part 77, ngram failed: bad luck" in output
    assert error.count("part 77, ngram: bad luck") == 1  # it takes no further part


def test_variants_by_name() -> None:
    assert choice("7") == Choice(7) and choice("08:ngram") == Choice(8, "ngram")
    drafted = choice("8:draft=random:tiny-llama")
    assert drafted == Choice(8, "draft", "random:tiny-llama")
    assert drafted.name == "part 08, draft, random:tiny-llama"
    assert Choice(7).name == "part 07"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--variants 98", "part 98"),
        ("--variants 76:ngram", "--variants 76:ngram: this part does not speculate"),
        ("--variants 77:luck", "nobody is called luck"),
        ("--variants 8:draft", "must be PART, PART:PROPOSER or PART:draft=MODEL, not '8:draft'"),
        ("--variants eight", "must be PART, PART:PROPOSER or PART:draft=MODEL, not 'eight'"),
        ("--variants 77:ngram=tiny", "not '77:ngram=tiny'"),
        ("--workloads poem", "invalid choice: 'poem'"),
        ("--batches 0", "must be a positive integer, not '0'"),
        ("--output-len 1", "--output-len 1: the first token is not counted"),
        ("--variants 76 --set nothing=7", "nothing"),
        ("--variants 77 --model random:nothing", "nothing"),
        ("--plot x.gif", "--plot must name a .png or an .svg, not 'x.gif'"),
    ],
)
def test_bad_flags_give_one_line(fake_parts: None, flags: str, says: str, capsys: Any) -> None:
    try:
        status = main(["speculative", "--model", "random:tiny-llama", *flags.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and "error: " in error and says in error


# Real engines


@pytest.mark.skipif(max(PARTS) < 8, reason="part 08 is not there")
def test_real_engines_do_the_same_work() -> None:
    """Greedy is greedy with drafts too, and what was counted can be so."""
    batches = {
        workload: [[prompt_token_ids(workload, i, None, 512, 0) for i in range(3)]]
        for workload in WORKLOADS
    }
    points = [{"name": name, "batches": own} for name, own in batches.items()]
    job = {"job": "speculative", "model": "random:tiny-llama", "max_tokens": 40, "warm_up": []}
    outputs = []
    for part, proposer in ((7, None), (8, None), (8, "ngram")):
        settings = {"threads": 1} | ({"speculative": proposer} if proposer else {})
        answer = run_here({**job, "part": part, "settings": settings, "points": points})
        outputs.append([answer["runs"][name]["outputs"] for name in WORKLOADS])
        for run in answer["runs"].values():
            counters = run["counters"]
            assert bool(counters) == (proposer is not None)
            gained = run["num_tokens"] - run["num_turns"]
            assert gained == counters.get("num_accepted_tokens", 0)
            assert gained <= counters.get("num_draft_tokens", 0)
            assert ("propose" in run["phases"]) == (proposer is not None)
    assert all(own == outputs[0] for own in outputs)
