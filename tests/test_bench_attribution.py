"""`attribution`: what is switched off, its workloads, its runs over scripted engines. No assertion on time."""

import importlib
import math
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bench_prefix import FAKE_ENGINE, LIMITS, run_here

from common.bench.__main__ import main
from common.bench.attribution import run as attribution
from common.bench.attribution.mixes import MIX, MIXES, LogNormal, make_mix
from common.bench.attribution.techniques import (
    EVERYTHING,
    NAMES,
    NOTHING,
    TECHNIQUES,
    configurations,
    known_techniques,
    settings_with,
)
from common.bench.core.results import load_result
from common.bench.prefix import variants as prefix_variants
from common.bench.prefix.requests import read_jsonl, whole_lengths
from common.bench.prefix.variants import config_class
from common.bench.prefix.workloads import Workload

BY_NAME = {technique.name: technique for technique in TECHNIQUES}


# What is switched off


def test_each_technique_is_off_once() -> None:
    chosen = [BY_NAME[name] for name in ("prefix", "speculation", "weights")]
    engines = configurations(chosen, {"threads": 1})
    assert [e.name for e in engines] == [
        EVERYTHING,
        "without prefix cache",
        "without speculation",
        "without quantised weights",
        NOTHING,
    ]
    assert engines[0].settings == {
        "prefix_cache": "hash",
        "speculative": "ngram",
        "quantization": "int8-g32",
        "threads": 1,
    }
    for engine in engines[1:-1]:
        differing = {k for k, v in engine.settings.items() if engines[0].settings[k] != v}
        assert engine.technique is not None and differing == engine.technique.off.keys()
    assert engines[-1].settings["speculative"] == engines[-1].settings["quantization"] == "off"


def test_a_host_tier_without_a_prefix_cache_only_swaps() -> None:
    chosen = [BY_NAME["prefix"], BY_NAME["offload"]]
    without = settings_with(chosen, [BY_NAME["prefix"]], {})
    assert without == {"prefix_cache": "off", "offload": "swap"}
    assert settings_with(chosen, chosen, {}) == {"prefix_cache": "off", "offload": "off"}
    assert settings_with(chosen, [], {})["offload"] == "both"


def test_what_a_part_does_not_have_is_left_out_and_said() -> None:
    known, missing = known_techniques(TECHNIQUES, {"prefix_cache", "kernels"})
    assert [technique.name for technique in known] == ["kernels", "prefix"]
    assert len(missing) == len(TECHNIQUES) - 2
    assert any("speculation is left out" in line and "speculative" in line for line in missing)


def test_the_part_takes_each_configuration() -> None:
    """Every switch of a field that part 15 has is one that it accepts."""
    config = config_class(15)
    known, _ = known_techniques(TECHNIQUES, set(config.__dataclass_fields__))
    assert {"prefix", "speculation", "weights", "kv", "offload", "kernels"} <= {
        technique.name for technique in known
    }
    for engine in configurations(known, {}):
        if engine.technique is None or engine.technique.name != "batching":
            config(model="random:tiny-llama", **engine.settings)


# The mixes


@pytest.mark.parametrize("name", MIXES)
def test_a_seed_is_a_mix(name: str) -> None:
    one = mix(name)
    assert one == mix(name)
    assert one.requests != mix(name, seed=1).requests
    lengths = whole_lengths(one.requests)
    assert max(lengths.values()) <= 8192
    assert one.num_blocks >= max(lengths.values()) // 16
    users = {request.request_id.rsplit("-", 1)[0] for request in one.requests}
    assert len(users) == MIX[name].users
    for request in one.requests:
        before = request.depends_on
        assert (before is None) == (request.stage == 0)
        assert request.parent == (before if name == "chat" else None)


def mix(name: str, seed: int = 0, scale: float = 1.0, most: int = 8192) -> Workload:
    return make_mix(name, None, 512, seed, 16, scale, most)


def test_lengths_are_log_normal() -> None:
    """Mean and spread of many draws are those that were asked for; scaled, they scale."""
    for length in (LogNormal(161, 0.8, 10**9), LogNormal(1738, 0.3, 10**9)):
        source = random.Random(0)
        drawn = [length.draw(source, 1.0) for _ in range(20_000)]
        assert statistics.mean(drawn) == pytest.approx(length.mean, rel=0.03)
        assert statistics.stdev(map(math.log, drawn)) == pytest.approx(length.sigma, rel=0.03)
        half = [length.draw(source, 0.5) for _ in range(20_000)]
        assert statistics.mean(half) == pytest.approx(length.mean / 2, rel=0.03)
    source = random.Random(1)
    assert max(LogNormal(100, 2.0, 300).draw(source, 1.0) for _ in range(500)) == 300


def test_a_conversation_ends_at_the_context() -> None:
    whole, cut = mix("chat"), mix("chat", most=600)
    assert len(cut.requests) < len(whole.requests)
    assert max(whole_lengths(cut.requests).values()) <= 600
    with pytest.raises(ValueError, match="chat: no request fits a context of 7 tokens"):
        mix("chat", most=7)


def test_texts_where_there_is_a_tokenizer(tokenizer_json: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer_json)
    tokenizer = type("Words", (), {"encode": lambda self, text: backend.encode(text).ids})()
    one = make_mix("documents", tokenizer, 512, 0, 16, 0.05, 8192)
    text = backend.decode(one.requests[0].prompt_token_ids)
    assert text.endswith("The same text again, word for word:\n\n") and ". " in text
    prompts = [tuple(request.prompt_token_ids) for request in one.requests]
    assert len(set(prompts)) == len(prompts)


# The subcommand


FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class EngineConfig:
    model: str
    num_blocks: int = 1000
    block_size: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    prefix_cache: str = "hash"
    offload: str = "off"
    kernels: str = "auto"

    def __post_init__(self):
        if self.kernels == "reference" and self.offload == "both":
            raise ValueError("kernels is reference: offload must be off")
"""


@pytest.fixture
def fake_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "part78").mkdir()
    (tmp_path / "part78" / "__init__.py").touch()
    (tmp_path / "part78" / "engine.py").write_text(FAKE_ENGINE)
    (tmp_path / "part78" / "config.py").write_text(FAKE_CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attribution, "run_worker", lambda job: LIMITS)
    monkeypatch.setattr(prefix_variants, "run_job", run_here)
    yield
    for name in [name for name in sys.modules if name.startswith("part78")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def flags(text: str) -> list[str]:
    return f"attribution --part 78 --quick --model random:tiny-llama {text}".split()


def test_attribution_of_a_fake_part(fake_part: None, tmp_path: Path, capsys: Any) -> None:
    out = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    workloads = ["document", "eviction", *MIXES]
    assert main([*flags("--pairs 2 --workloads"), *workloads, *out]) == 0
    result = load_result(tmp_path / "a.json")
    table = {(row["workload"], row["engine"]): row for row in result["rows"]}
    engines = {EVERYTHING, "without prefix cache", "without host tier", NOTHING}
    assert {engine for _, engine in table} == engines
    assert len(table) == len(workloads) * len(engines)
    for workload in workloads:
        everything, without = table[workload, EVERYTHING], table[workload, "without prefix cache"]
        assert everything["ratio"] is None and without["pairs"] == 2
        assert without["hit_rate"] == 0 and without["same"] == 100
        assert without["ratio"] == pytest.approx(
            statistics.median(
                ours / theirs
                for ours, theirs in zip(without["rates"], everything["rates"], strict=True)
            )
        )
    assert table["chat", EVERYTHING]["hit_rate"] > 20, "a turn has all before it in its prompt"
    notes = " ".join(result["notes"])
    printed, said = capsys.readouterr()
    assert "| chat | without prefix cache |" in printed
    for text in (notes, said):
        assert "speculation is left out: the part's EngineConfig has no speculative" in text
        assert "without kernels is left out: kernels is reference: offload must be off" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_off_throughout(fake_part: None, tmp_path: Path) -> None:
    text = "--pairs 1 --workloads schema --techniques kernels offload --without prefix"
    assert main([*flags(text), "--json", str(tmp_path / "a.json")]) == 0
    result = load_result(tmp_path / "a.json")
    assert {row["hit_rate"] for row in result["rows"]} == {0}
    names = [row["engine"] for row in result["rows"]]
    assert names == [EVERYTHING, "without kernels", "without host tier", NOTHING]
    assert "Off throughout: prefix." in result["notes"]


def test_workloads_for_others(tmp_path: Path, capsys: Any) -> None:
    text = f"--write-workloads {tmp_path} --workloads chat documents agent"
    assert main(["attribution", "--quick", "--model", "random:tiny-llama", *text.split()]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["agent.jsonl", "chat.jsonl", "documents.jsonl"]
    for name in MIXES:
        requests = read_jsonl(tmp_path / f"{name}.jsonl")
        assert requests and all(request.max_tokens >= 4 for request in requests)
    assert "turns of conversations by 12 users" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--part 98", "part 98"),
        ("--techniques magic", "invalid choice: 'magic'"),
        ("--part 6 --techniques prefix", "there is nothing to switch off"),
        ("--set num_blocks=7", "--set num_blocks"),
        ("--set block_size=0", "must be a positive integer, not 0"),
        ("--scale 0", "must be a positive number, not '0'"),
        ("--scale 40 --workloads documents", "no request fits a context of"),
        ("--plot x.gif", "--plot must name a .png or an .svg, not 'x.gif'"),
        ("--set nothing=1", "nothing"),
    ],
)
def test_bad_flags_give_one_line(text: str, says: str, capsys: Any) -> None:
    try:
        status = main(["attribution", "--quick", "--model", "random:tiny-llama", *text.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and says in error.splitlines()[-1]


def test_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy is greedy without the prefix cache and without speculation."""
    monkeypatch.setattr(attribution, "run_worker", lambda job: LIMITS)
    monkeypatch.setattr(prefix_variants, "run_job", run_here)
    text = "attribution --quick --model random:tiny-llama --pairs 1 --set threads=1"
    text += " --workloads chat --techniques prefix speculation"
    assert main([*text.split(), "--json", str(tmp_path / "a.json")]) == 0
    result = load_result(tmp_path / "a.json")
    assert list(result["code"]) == ["part15"] and len(result["rows"]) == 4
    assert {row["same"] for row in result["rows"]} == {None, 100}
    hits = {row["engine"]: row["hit_rate"] for row in result["rows"] if row["workload"] == "chat"}
    assert hits["without prefix cache"] == 0 < hits[EVERYTHING]


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
