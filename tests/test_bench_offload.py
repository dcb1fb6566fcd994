"""`bench offload` and `bench disagg`: what they measure, on a tiny model; and what they make of it."""

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from common.bench.__main__ import main
from common.bench.disagg import load, split
from common.bench.disagg.run import Contender as Served
from common.bench.disagg.run import contenders as served
from common.bench.disagg.run import row as served_row
from common.bench.offload import burst, conversations, policies, restart
from common.bench.offload.contenders import BLOCK_SIZE, Contender, block_bytes, rate, same_as
from common.bench.offload.worker import offload_job
from common.bench.prefix.requests import whole_prompts

TINY = ["--model", "random:tiny-llama", "--pairs", "1", "--quick-limits"]


def measured(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    path = tmp_path / "result.json"
    assert main([*arguments, *TINY, "--json", str(path)]) == 0
    return json.loads(path.read_text())["rows"]


def test_the_worker_counts_without_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what a burst is measured with. On a busy machine a copy may seem slow."""
    monkeypatch.setattr("common.kv_store.rates.Rates.swap_pays", lambda *given: True)
    lengths = argparse.Namespace(
        model="random:tiny-llama", seed=0, requests=6, prompt_len=24, output_len=40
    )
    job = {
        "part": 12,
        "model": lengths.model,
        "settings": {
            "num_blocks": 10, "block_size": BLOCK_SIZE, "max_num_seqs": 6, "threads": 1,
            "offload": "swap", "host_kv_memory": 1 << 20,
        },
        "vocab_size": 500,
        "requests": [vars(request) for request in burst.requests(lengths, 0)],
    }  # fmt: skip
    found = offload_job(job)
    assert found["counters"]["num_swapped_tokens"] > 0
    assert found["counters"]["num_recomputed_tokens"] == 0
    assert found["token_bytes"] * BLOCK_SIZE == block_bytes(lengths.model)
    assert len(found["records"]) == 6 and found["seconds"] > 0 and found["construct_s"] > 0
    assert all(len(r["token_ids"]) == 40 and r["gap_s"] > 0 for r in found["records"].values())


@pytest.mark.long
def test_a_burst_is_swapped_and_not_recomputed(tmp_path: Path) -> None:
    sizes = ["--requests", "8", "--prompt-len", "48", "--output-len", "80"]
    off, swap = measured(tmp_path, "offload", "burst", *sizes)
    assert off["recomputed"] > 0 and not off["swapped"]
    assert swap["recomputed"] < off["recomputed"] and swap["swapped"] > 0 < swap["copied_mb"]
    assert swap["same"] == 100


@pytest.mark.long
def test_conversations_return_from_the_host(tmp_path: Path) -> None:
    sizes = ["--conversations", "3", "--length", "160"]
    anew, host, device = measured(tmp_path, "offload", "returning", *sizes)
    assert anew["cached"] < 20 and host["cached"] > 70 and device["cached"] > 70
    assert host["in_mb"] > 0 and host["same"] == device["same"] == 100


@pytest.mark.long
def test_conversations_survive_a_restart(tmp_path: Path) -> None:
    sizes = ["--conversations", "2", "--length", "160"]
    anew, warm, cold = measured(tmp_path, "offload", "restart", *sizes)
    assert anew["cached"] == 0 and warm["cached"] > 70 and cold["cached"] > 70
    assert warm["disk_mb"] > 0 and warm["same"] == cold["same"] == 100


@pytest.mark.long
def test_policies_are_compared(tmp_path: Path) -> None:
    rows = measured(tmp_path, "offload", "policies", "--visits", "80", "--workloads", "scans")
    lru, arc = rows
    assert 0 < lru["found"] <= lru["possible"] + 1 and lru["found"] < arc["found"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_disaggregation_is_measured(tmp_path: Path) -> None:
    sizes = ["--longs", "2", "--gap", "1", "--long-prompt", "96", "--stream-output", "24"]
    sizes += ["--crowd", "4", "--crowd-prompt", "64", "--crowd-output", "8", "--streams", "2"]
    rows = measured(tmp_path, "disagg", *sizes)
    assert len(rows) == 4 and all(row["itl_p99"] >= row["itl_p50"] > 0 for row in rows)
    assert all(row["crowd_rate"] > 0 and row["ttft_p50"] > 0 for row in rows)


# What they make of it.


def test_a_second_turn_continues_the_first() -> None:
    first = conversations.first_turns(3, 40, 500, "seed")
    again = conversations.second_turns(first, 500, "seed")
    outputs = {request.request_id: [7] * request.max_tokens for request in first + again}
    prompts = whole_prompts(first + again, outputs)
    for number in range(3):
        begin = prompts[f"first-{number}"] + outputs[f"first-{number}"]
        assert prompts[f"again-{number}"][: len(begin)] == begin
        assert len(prompts[f"again-{number}"]) == len(begin) + conversations.QUESTION
    stages = [request.stage for request in first + again]
    assert stages == list(range(6)) and again[0].depends_on == "first-2"
    args = argparse.Namespace(model="random:tiny-llama", seed=0, conversations=3, length=40)
    before = {"records": {name: {"token_ids": tokens} for name, tokens in outputs.items()}}
    turns = restart.turns(args, 0)
    for old, new in zip(turns, restart.seconds_of(args, turns, before, 0), strict=True):
        begin = old.prompt_token_ids + outputs[old.request_id]
        assert new.prompt_token_ids[: len(begin)] == begin and new.parent is None


@pytest.mark.parametrize("workload", policies.WORKLOADS)
def test_visits_are_as_they_are_described(workload: str) -> None:
    order = policies.WORKLOADS[workload](random.Random(0), 16, 160)
    assert len(order) == 160 and order == policies.WORKLOADS[workload](random.Random(0), 16, 160)
    once = [name for name in order if name.startswith("once")]
    assert len(set(once)) == len(once)
    often = [name for name in order if not name.startswith("once")]
    if workload == "zipf":
        assert len(once) == 40 and often.count("0") == max(map(often.count, often))
    elif workload == "scans":
        assert set(often) == {"0", "1", "2", "3"} and sorted(order[:4]) == sorted(order[4:8])
        assert all(name.startswith("once") for name in order[8:24])
    else:
        assert not once and all(i // 3 <= int(name) < i // 3 + 4 for i, name in enumerate(order))


def test_possible_hits_are_those_of_whole_blocks() -> None:
    args = argparse.Namespace(
        model="random:tiny-llama", seed=0, documents=4, length=40, visits=30, host_share=1.0
    )
    requests = policies.requests(args, "drift", 0)
    documents = [tuple(request.prompt_token_ids[:40]) for request in requests]
    repeats = sum(one in documents[:i] for i, one in enumerate(documents))
    total = sum(len(request.prompt_token_ids) for request in requests)
    percent = 100 * repeats * 2 * BLOCK_SIZE / total
    assert policies.possible_percent(args, "drift", 0) == pytest.approx(percent)


def answer(tokens: list[list[int]], **counters: float) -> dict[str, Any]:
    records = {str(i): {"token_ids": own} for i, own in enumerate(tokens)}
    return {"records": records, "counters": counters}


def test_rates_and_agreement() -> None:
    counters = {"offload_bytes_load": 3e9, "offload_seconds_load": 2.0}
    assert rate(answer([], **counters), "load") == 1.5
    assert rate(answer([], **counters), "save") is None
    first, other = (Contender(name, lambda number: {}) for name in "ab")
    first.answers = {0: answer([[1, 2], [3, 4]]), 1: answer([[1, 2], [3, 4]])}
    other.answers = {0: answer([[1, 2], [3, 4]]), 1: answer([[1, 2], [3, 5]])}
    assert same_as(first, first) is None and same_as(other, first) == 75
    other.answers = {}
    assert same_as(other, first) is None


METRICS = """# TYPE kv_transfer:fetched counter
kv_transfer:fetched_total{engine="1"} 4.0
kv_transfer:fetched_created{engine="1"} 1.7e9
kv_transfer:tokens_total{engine="1"} 400.0
kv_transfer:queue_seconds_total{engine="1"} 2.0
kv_transfer:queue_seconds_total{engine="2"} 1.0
kv_transfer:prefill_seconds_total{engine="1"} 8.0
kv_transfer:room_seconds_total{engine="1"} 0.0
kv_transfer:transfer_seconds_total{engine="1"} 1.0
vllm:time_to_first_token_seconds_sum{engine="1"} 99.0
"""


def test_the_time_to_the_first_token_is_taken_apart() -> None:
    totals = split.parse(METRICS)
    assert totals == {"fetched": 4, "queue": 3, "prefill": 8, "room": 0, "transfer": 1}
    zeros = dict.fromkeys(totals, 0.0)
    means = split.split(zeros, totals, 3.5)
    assert means == {"queue": 0.75, "prefill": 2, "room": 0, "transfer": 0.25, "decode": 0.5}
    assert split.parse("") == {} and split.split({}, {}, 1.0) is None
    assert split.split(totals, totals, 1.0) is None


def test_all_contenders_have_the_same_cores() -> None:
    args = argparse.Namespace(model="m", settings=[], transfer="tcp")
    one, budget, two, apart = served(args)
    assert one.flags[-1] == budget.flags[budget.flags.index("--threads") + 1]
    for each in (two, apart):
        half = int(each.flags[each.flags.index("--threads") + 1])
        assert half == max(1, int(one.flags[-1]) // 2)
    assert "tcp" in apart.flags and apart.module == "part13.server"


def test_ratios_are_by_round() -> None:
    first, other = Served("a", "", []), Served("b", "", [])
    for number, (slow, fast) in enumerate([(0.4, 0.1), (0.2, 0.1), (0.3, 0.1)]):
        first.seen[number] = load.Seen([slow] * 9, [1.0], [], 10.0, 100.0)
        other.seen[number] = load.Seen([fast] * 9, [2.0], [], 20.0, 50.0)
    row = served_row(other, first)
    assert row["itl_ratio"] == pytest.approx(3.0) and row["crowd_ratio"] == pytest.approx(0.5)
    assert row["ttft_p50"] == pytest.approx(2000) and row["stream_rate"] == 20
    assert served_row(first, first)["itl_ratio"] is None


def test_a_request_that_fails_ends_a_measurement() -> None:
    sizes = load.Sizes(streams=1, longs=1, gap=0.1)
    with pytest.raises(Exception, match=r"9|refused|connect"):
        asyncio.run(load.measure("http://127.0.0.1:9", sizes, 500, "seed"))
