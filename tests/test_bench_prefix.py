"""`prefix`: its workloads, its driver, and runs over scripted and tiny engines. No assertion on time."""

import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from common.bench import BenchError
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.prefix import (
    costs as prefix_costs,
)
from common.bench.prefix import (
    run as prefix,
)
from common.bench.prefix import (
    variants as prefix_variants,
)
from common.bench.prefix import (
    worker as prefix_worker,
)
from common.bench.prefix.requests import (
    Request,
    possible_hits,
    read_jsonl,
    whole_lengths,
    whole_prompts,
    write_jsonl,
)
from common.bench.prefix.rows import typical_ttft
from common.bench.prefix.variants import part_kind
from common.bench.prefix.worker import Driver, run_workload, warm_up_requests
from common.bench.prefix.workloads import QUICK, WORKLOADS, Sizes, Workload, make_workload
from common.testing.parts import PARTS

LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}
SIZES = [Sizes(), QUICK]
BLOCK = 16


def workload(name: str, sizes: Sizes = QUICK, seed: int = 0) -> Workload:
    return make_workload(name, sizes, 512, seed, BLOCK, 0.4)


def common(first: list[int], second: list[int]) -> int:
    """Tokens that two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))


# Workloads


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_seed_is_a_workload(name: str, sizes: Sizes) -> None:
    one = workload(name, sizes)
    assert one == workload(name, sizes)
    other = workload(name, sizes, seed=1)
    prompts = [request.prompt_token_ids for request in one.requests]
    assert prompts != [request.prompt_token_ids for request in other.requests]
    assert all(100 <= token < 512 for prompt in prompts for token in prompt)
    names = [request.request_id for request in one.requests]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("sizes", SIZES)
def test_requests_depend_on_earlier_ones(name: str, sizes: Sizes) -> None:
    stages: dict[str | None, int] = {None: -1}
    for request in workload(name, sizes).requests:
        assert request.stage == stages[request.depends_on] + 1
        assert request.parent in (None, request.depends_on)
        stages[request.request_id] = request.stage


@pytest.mark.parametrize("sizes", SIZES)
def test_what_prompts_share(sizes: Sizes) -> None:
    for name, shared in (("schema", sizes.schema), ("document", sizes.document)):
        first, *others = (request.prompt_token_ids for request in workload(name, sizes).requests)
        assert {common(first, other) for other in others} <= {shared, shared + 1}
    assert {request.stage for request in workload("schema", sizes).requests} == {0}
    assert workload("document", sizes).is_serial and not workload("schema", sizes).is_serial


@pytest.mark.parametrize("sizes", SIZES)
def test_the_agents_prompts_hold_what_was_generated(sizes: Sizes) -> None:
    requests = workload("agent", sizes).requests
    levels = range(sizes.agent_levels)
    assert len(requests) == sum(sizes.agent_branches**level for level in levels)
    outputs = {r.request_id: [n] * r.max_tokens for n, r in enumerate(requests)}
    prompts = whole_prompts(requests, outputs)
    for request in requests[1:]:
        before = prompts[request.parent] + outputs[request.parent]
        assert prompts[request.request_id] == before + request.prompt_token_ids
    siblings = [prompts[r.request_id] for r in requests if r.parent == "agent-0"]
    shared = sizes.agent + requests[0].max_tokens
    assert {common(siblings[0], other) for other in siblings[1:]} <= {shared, shared + 1}
    ends = {name: len(prompts[name]) + len(outputs[name]) for name in prompts}
    assert whole_lengths(requests) == ends


@pytest.mark.parametrize("sizes", SIZES)
def test_eviction_has_more_documents_than_room(sizes: Sizes) -> None:
    one = workload("eviction", sizes)
    visits: dict[tuple[int, ...], int] = {}
    for request in one.requests:
        document = tuple(request.prompt_token_ids[: sizes.eviction])
        visits[document] = visits.get(document, 0) + 1
    num_needed = len(visits) * -(-sizes.eviction // BLOCK)
    assert one.num_blocks == int(0.4 * num_needed)
    counts = sorted(visits.values())
    assert counts.count(1) >= sizes.eviction_visits // 4 and counts[-1] >= 3  # once, and often
    assert counts[-1] > 2 * statistics.median(counts)  # skewed
    with pytest.raises(ValueError, match=r"--kv-share 0.05 leaves \d+ blocks"):
        make_workload("eviction", sizes, 512, 0, BLOCK, 0.05)


@pytest.mark.parametrize("name", ["schema", "document", "agent"])
def test_the_others_have_room_for_all(name: str) -> None:
    one = workload(name)
    lengths = whole_lengths(one.requests).values()
    assert one.num_blocks >= sum(-(-length // BLOCK) for length in lengths)


def test_possible_hits_by_hand() -> None:
    def request(name: str, prompt: list[int], parent: str | None = None) -> Request:
        return Request(name, 0, parent, parent, prompt, 3)

    outputs = {name: [91, 92, 93] for name in "abcd"}
    # Blocks of 2. Of a's 3 + 3 tokens all but the last are stored: (1 2), (3 91).
    a = request("a", [1, 2, 3])
    assert possible_hits([a], outputs, 2) == 0
    assert possible_hits([a, request("b", [1, 2, 4])], outputs, 2) == 2
    # The last token of a prompt is always computed, and so its block is.
    assert possible_hits([a, request("b", [1, 2])], outputs, 2) == 0
    # b's prompt is 1 2 3 91 92 93 5: of its blocks, (92 93) was never whole in the cache.
    child = request("b", [5], parent="a")
    assert possible_hits([a, child], outputs, 2) == 4
    # The same tokens behind others are another block.
    assert possible_hits([a, request("b", [9, 9, 1, 2, 7])], outputs, 2) == 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_json_lines_and_back(name: str, tmp_path: Path) -> None:
    requests = workload(name).requests
    path = tmp_path / "deep" / "w.jsonl"
    write_jsonl(path, requests)
    assert read_jsonl(path) == requests
    lines = path.read_text().splitlines()
    keys = {"request_id", "stage", "depends_on", "parent", "prompt_token_ids", "max_tokens"}
    assert len(lines) == len(requests) and all(set(json.loads(line)) == keys for line in lines)
    path.write_text(lines[0] + "\n{}\n")
    with pytest.raises(ValueError, match=r"w\.jsonl:2: no request"):
        read_jsonl(path)


# The driver, on scripted engines


FAKE_ENGINE = """
from collections import OrderedDict
from types import SimpleNamespace

class LLMEngine:
    '''One token a step for each sequence; what has ended can be found, block by block, LRU. Time is
    counted: a ms for each prompt token that is computed, and for each step.'''

    def __init__(self, config):
        self.config, self.active, self.now = config, {}, 0.0
        self.cache, self.queries, self.hits, self.closed = OrderedDict(), 0, 0, False

    def add_request(self, request):
        name, params = request.request_id, request.params
        assert params.temperature == 0 and params.ignore_eos and name not in self.active
        self.active[name] = SimpleNamespace(
            prompt=list(request.prompt_token_ids), most=params.max_tokens, output=[], cached=None
        )

    def find(self, tokens, most):
        size = self.config.block_size
        count = 0
        while (count + 1) * size <= most and tuple(tokens[: (count + 1) * size]) in self.cache:
            count += 1
            self.cache.move_to_end(tuple(tokens[: count * size]))
        return count * size

    def step(self):
        outputs = []
        for request in self.active.values():
            if request.cached is None:
                request.cached = self.find(request.prompt, len(request.prompt) - 1)
                self.queries += len(request.prompt)
                self.hits += request.cached
                self.now += 0.001 * (len(request.prompt) - request.cached)
        self.now += 0.001
        for name, request in list(self.active.items()):
            request.output.append((sum(request.prompt) + len(request.output)) % 300 + 100)
            ended = len(request.output) == request.most
            outputs.append(SimpleNamespace(
                request_id=name, token_ids=request.output[-1:], finished=ended,
                finish_reason="length" if ended else None, num_cached_tokens=request.cached,
            ))
            if ended:
                self.keep(self.active.pop(name))
        return outputs

    def keep(self, request):
        tokens, size = request.prompt + request.output[:-1], self.config.block_size
        if getattr(self.config, "prefix_cache", "off") != "off":
            for end in range(size, len(tokens) + 1, size):
                self.cache[tuple(tokens[:end])] = None
            while len(self.cache) > self.config.num_blocks:
                self.cache.popitem(last=False)

    def has_unfinished(self):
        return bool(self.active)

    def stats(self):
        return {
            "num_preemptions": 0,
            "num_prefix_cache_queries": self.queries,
            "num_prefix_cache_hits": self.hits,
        }

    def check_integrity(self):
        assert not self.closed

    def shutdown(self):
        self.closed = True
"""
FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class EngineConfig:
    model: str
    num_blocks: int = 1000
    block_size: int = 16
    device: str = "cpu"
    dtype: str = "float32"
"""


@pytest.fixture
def fake_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts 76, without a cache, and 77; here and in child processes."""
    for name, cache in (("part76", ""), ("part77", '    prefix_cache: str = "hash"\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "engine.py").write_text(FAKE_ENGINE)
        (tmp_path / name / "config.py").write_text(FAKE_CONFIG + cache)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(prefix, "run_worker", lambda job: LIMITS)
    yield
    for name in [name for name in sys.modules if name.startswith(("part76", "part77"))]:
        del sys.modules[name]
    importlib.invalidate_caches()


def fake_engine(**settings: Any) -> Any:
    engine = importlib.import_module("part77.engine").LLMEngine
    return engine(importlib.import_module("part77.config").EngineConfig("m", **settings))


def drive(engine: Any, requests: list[Request]) -> tuple[float, dict[str, dict[str, Any]]]:
    driver = Driver(engine, requests, clock=lambda: engine.now)
    return driver.run(), driver.records


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_driver_counts_what_is_found(fake_parts: None, name: str) -> None:
    one = workload(name)
    engine = fake_engine()
    seconds, records = drive(engine, one.requests)
    outputs = {key: record["token_ids"] for key, record in records.items()}
    prompts = whole_prompts(one.requests, outputs)
    for request in one.requests:
        record, prompt = records[request.request_id], prompts[request.request_id]
        count = request.max_tokens  # the script's tokens say which prompt the engine has got
        assert record["token_ids"] == [(sum(prompt) + i) % 300 + 100 for i in range(count)]
        assert record["prompt_tokens"] == len(prompt)
    num_cached = sum(record["cached_tokens"] for record in records.values())
    possible = possible_hits(one.requests, outputs, BLOCK)
    assert num_cached == engine.hits
    if name == "schema":
        assert num_cached == 0 < possible  # all come in one step, before any has ended
    elif name == "eviction":
        assert possible / 2 < num_cached <= possible  # both clients may ask for one at once
    else:
        assert num_cached == possible > 0
    none = drive(fake_engine(prefix_cache="off"), one.requests)
    assert {key: record["token_ids"] for key, record in none[1].items()} == outputs
    assert not any(record["cached_tokens"] for record in none[1].values())
    assert none[0] - seconds == pytest.approx(0.001 * num_cached)


def test_a_cache_that_forgets(fake_parts: None) -> None:
    one = workload("eviction", Sizes())
    _, large = drive(fake_engine(), one.requests)
    _, small = drive(fake_engine(num_blocks=one.num_blocks), one.requests)
    hits = [sum(r["cached_tokens"] for r in records.values()) for records in (large, small)]
    assert 0.25 * hits[0] < hits[1] < 0.9 * hits[0]  # it is under pressure, and still of use


def test_times_to_first_token(fake_parts: None) -> None:
    """On the engine's own clock: a ms for each token computed, and for each step."""
    one = workload("document")
    _, records = drive(fake_engine(), one.requests)
    ttfts = [round(1000 * record["ttft_s"], 6) for record in records.values()]
    prompts = [len(request.prompt_token_ids) for request in one.requests]
    assert ttfts == [prompts[0] + 1, *(length - QUICK.document + 1 for length in prompts[1:])]
    assert typical_ttft(ttfts, one) == statistics.median(ttfts[1:])
    together = replace(one, requests=[replace(request, stage=0) for request in one.requests])
    assert typical_ttft(ttfts, together) == statistics.median(ttfts)


def test_siblings_come_when_their_parent_has_ended(fake_parts: None) -> None:
    engine, seen = fake_engine(), []
    add = engine.add_request

    def watched(request: Any) -> None:
        seen.append((round(1000 * engine.now), request.request_id))
        add(request)

    engine.add_request = watched
    drive(engine, workload("agent").requests)
    times: dict[int, list[str]] = {}
    for now, name in seen:
        times.setdefault(now, []).append(name)
    assert list(times.values())[:2] == [["agent-0"], ["agent-1", "agent-2"]]
    assert sorted(name for _, name in seen) == [f"agent-{n}" for n in range(7)]


def test_what_an_engine_may_not_do(fake_parts: None) -> None:
    requests = workload("schema").requests[:2]

    def spoiled(change: Callable[[Any], None]) -> Any:
        engine = fake_engine()
        step = engine.step

        def stepped() -> list[Any]:
            outputs = step()
            for output in outputs:
                change(output)
            return outputs

        engine.step = stepped
        return engine

    with pytest.raises(BenchError, match=r"schema-0: \d+ of \d+ prompt tokens cached"):
        drive(spoiled(lambda output: setattr(output, "num_cached_tokens", 999)), requests)
    with pytest.raises(BenchError, match="schema-0: 0 of 4 tokens, then 'length'"):
        drive(spoiled(lambda output: output.token_ids.clear()), requests)
    orphan = replace(requests[0], request_id="orphan", depends_on="nobody")
    with pytest.raises(BenchError, match="orphan got no token"):
        drive(fake_engine(), [*requests, orphan])


def test_a_warm_up_shares_nothing() -> None:
    requests = workload("document").requests
    for one in warm_up_requests(requests, 512):
        prompts = [request.prompt_token_ids for request in requests]
        assert all(common(one.prompt_token_ids, prompt) < 2 for prompt in prompts)


# The subcommand


def run_here(job: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """What the fresh process would do: importing torch takes it seconds."""
    answer = prefix_worker.prefix_job(json.loads(json.dumps(job)))
    return json.loads(json.dumps({**answer, "wall_other_cores": 0.0}))


def test_a_fresh_process_answers_the_same(fake_parts: None) -> None:
    one = workload("agent")
    work = {**vars(one), "requests": [asdict(request) for request in one.requests]}
    job = {"job": "prefix", "part": 77, "model": "m", "settings": {}, "vocab_size": 512}
    answers = [
        run({**job, "workloads": [work]}, False) for run in (run_here, prefix_variants.run_job)
    ]
    here, there = (answer["runs"]["agent"] for answer in answers)
    for run in (here, there):
        assert all(record.pop("ttft_s") > 0 for record in run["records"].values())
        assert run.pop("seconds") > 0
    assert here == there and answers[1]["dtype"] == "float32"
    job["settings"] = {"block_size": 10_000, "nothing": 1}
    with pytest.raises(BenchError, match="prefix failed: got an unexpected keyword"):
        prefix_variants.run_job({**job, "workloads": [work]}, False)


def test_prefix_of_fake_parts(
    fake_parts: None, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prefix_variants, "run_job", run_here)
    flags = "prefix --variants 76 77:off 77:hash --quick --model random:tiny-llama --pairs 2"
    flags += " --quick-limits"
    out = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main([*flags.split(), *out]) == 0
    result = load_result(tmp_path / "p.json")
    table = {(row["workload"], row["engine"]): row for row in result["rows"]}
    assert len(table) == 4 * 3
    for name in WORKLOADS:
        first, off, hashed = (
            table[name, engine] for engine in ("part 76", "part 77, off", "part 77, hash")
        )
        assert first["ratio"] is None and first["same"] is None
        assert first["hit_rate"] == off["hit_rate"] == 0 < first["possible"]
        assert hashed["same"] == off["same"] == 100 and hashed["pairs"] == 2
        assert hashed["ratio"] == pytest.approx(
            statistics.median(
                ours / theirs for ours, theirs in zip(hashed["rates"], first["rates"], strict=True)
            )
        )
        assert hashed["output_tokens"] == first["output_tokens"]
        assert len(hashed["ttfts_ms"]) == 2 and hashed["p99_ms"] >= hashed["ttft_ms"] > 0
        assert (hashed["first_ms"] is None) == (name != "document")
    hashed = table["document", "part 77, hash"]
    assert hashed["hit_rate"] == pytest.approx(hashed["possible"]) and hashed["hit_rate"] > 50
    counters = hashed["counters"]  # without the warm-up's
    assert counters["num_prefix_cache_queries"] == hashed["prompt_tokens"]
    num_hits = round(hashed["hit_rate"] * hashed["prompt_tokens"] / 100)
    assert counters["num_prefix_cache_hits"] == num_hits
    later = [
        [statistics.median(ttfts[1:]) for ttfts in table["document", engine]["ttfts_ms"]]
        for engine in ("part 76", "part 77, hash")
    ]
    assert hashed["ttft_ratio"] == pytest.approx(
        statistics.median(theirs / ours for theirs, ours in zip(*later, strict=True))
    )
    evicted = table["eviction", "part 77, hash"]
    assert 0 < evicted["hit_rate"] < evicted["possible"]
    notes = " ".join(result["notes"])
    assert "blocks of 16" in notes and "hits in stats" not in notes
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "| document | part 77, hash |" in capsys.readouterr().out


def test_a_variant_that_fails(fake_parts: None, monkeypatch: Any, capsys: Any) -> None:
    def run_job(job: dict[str, Any], verbose: bool) -> dict[str, Any]:
        if job["settings"].get("prefix_cache") == "hash":
            raise BenchError("bad luck")
        return run_here(job)

    monkeypatch.setattr(prefix_variants, "run_job", run_job)
    flags = "prefix --variants 76 77:hash --quick --model random:tiny-llama --pairs 1"
    assert main([*flags.split(), "--workloads", "schema"]) == 1
    output, error = capsys.readouterr()
    assert "| schema | part 76 |" in output and "| part 77, hash |" not in output
    assert "part 77, hash failed: bad luck" in output and "part 77, hash: bad luck" in error


def test_workloads_for_others(tmp_path: Path, capsys: Any) -> None:
    flags = f"prefix --quick --model random:tiny-llama --write-jsonl {tmp_path}"
    assert main([*flags.split(), "--workloads", "agent", "eviction"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.jsonl", "eviction.jsonl"]
    assert read_jsonl(tmp_path / "agent.jsonl") == workload("agent").requests
    assert "eviction.jsonl: 16 requests; 16 visits" in capsys.readouterr().out


def test_variants_by_name() -> None:
    assert part_kind("6") == (6, None) and part_kind("07:radix") == (7, "radix")
    with_each = [(7, "off"), (7, "hash"), (7, "radix")]
    if max(PARTS) >= 7:
        assert prefix_variants.default_variants() == [(6, None), *with_each]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--variants 98", "part 98"),
        ("--variants 6:hash", "--variants 6:hash: part 06 has no prefix_cache"),
        ("--variants six", "must be PART or PART:KIND, not 'six'"),
        ("--workloads poem", "invalid choice: 'poem'"),
        ("--set num_blocks=7", "--set num_blocks"),
        ("--set nothing=7", "nothing"),
        ("--set block_size=0", "--set block_size: must be a positive integer, not 0"),
        ("--set block_size=x --costs", "--set block_size: must be a positive integer, not 'x'"),
        ("--costs --variants 6:hash", "part 06 has no prefix_cache"),
        ("--costs --plot x.png", "--costs draws nothing"),
        ("--kv-share 0.01", "--kv-share 0.01 leaves"),
        ("--document-len 1020", "--document-len 1020: 10"),
        ("--costs --variants 6", "--variants must name a cache"),
        ("--plot x.gif", "--plot must name a .png or an .svg, not 'x.gif'"),
    ],
)
def test_bad_flags_give_one_line(flags: str, says: str, capsys: Any) -> None:
    try:
        status = main(["prefix", "--quick", "--model", "random:tiny-llama", *flags.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and "error: " in error and says in error


# Real caches


@pytest.mark.skipif(max(PARTS) < 7, reason="part 07 is not there")
def test_real_engines_do_the_same_work() -> None:
    """Greedy is greedy with a cache too; outputs, stats and what is possible agree."""
    job = {"model": "random:tiny-llama", "vocab_size": 512}
    settings = {"block_size": BLOCK, "threads": 1, "max_num_batched_tokens": 128}
    for name in WORKLOADS:
        one = workload(name)
        work = {**vars(one), "requests": [asdict(request) for request in one.requests]}
        outputs = []
        for part, kind in ((6, None), (7, "off"), (7, "hash"), (7, "radix")):
            own = settings | ({"prefix_cache": kind} if kind else {})
            run = run_workload({**job, "part": part, "settings": own}, work)
            num_cached = sum(record["cached_tokens"] for record in run["records"].values())
            assert run["counters"].get("num_prefix_cache_hits", 0) == num_cached
            outputs.append({key: record["token_ids"] for key, record in run["records"].items()})
            possible = possible_hits(one.requests, outputs[0], BLOCK)
            assert bool(num_cached) == (kind in ("hash", "radix")) and num_cached <= possible
            if name in ("document", "agent") and num_cached:
                assert num_cached == possible
        assert all(own == outputs[0] for own in outputs), name


@pytest.mark.skipif(max(PARTS) < 7, reason="part 07 is not there")
def test_costs_of_real_caches(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(prefix_costs, "run_job", lambda job, _: prefix_worker.costs_job(job))
    flags = f"prefix --costs --quick --variants 7:off 7:hash 7:radix --json {tmp_path}/c.json"
    assert main(flags.split()) == 0
    rows = load_result(tmp_path / "c.json")["rows"]
    assert [(row["cache"], row["prompts"]) for row in rows] == [
        ("hash", "3 of 32"), ("radix", "3 of 32"), ("hash", "one"), ("radix", "one"),
    ]  # fmt: skip
    assert all(row[f"{name}_ms"] > 0 for row in rows for name in prefix_costs.OPERATIONS)
    job = {"part": 7, "kind": "off", "block_size": 4, "num_blocks": [32], "seed": 0}
    with pytest.raises(BenchError, match="0 blocks found of"):
        prefix_costs.measure(job)


def test_cost_cases_are_as_large_as_they_say() -> None:
    for case in prefix_costs.make_cases(80, 4, seed=0):
        blocks = {
            tuple(prompt[: end + 4])
            for prompt in case.prompts
            for end in range(0, len(prompt) - 4, 4)
        }
        assert len(blocks) == case.num_blocks == 80
        assert not any(common(ours, other) > 3 for ours in case.prompts for other in case.others)
