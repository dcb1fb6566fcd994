"""Stages of layers in the bench of parallel layouts: what the cost model says of a pipeline."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.parallel import clients, engines
from common.bench.parallel.cost_model import Batch, step
from common.bench.parallel.layouts import Layout, layouts, memory
from common.bench.parallel.links import Fabric, Link
from common.bench.parallel.machines import HOST, MODELS, Device, Machine
from common.bench.parallel.prediction import seconds_of

QWEN = MODELS["Qwen3-8B"]  # 36 layers
HEADLESS = replace(QWEN, vocab_size=1)
FREE = Link(0.0, 0.0, float("inf"))
PLAIN = Machine("plain", 4, Device(1e12, 1e12, 1e15, 0.0), Fabric(4, FREE, FREE))


def test_a_layout_with_stages() -> None:
    layout = Layout(2, 3, pp=4)
    assert layout.num_ranks == 24 and layout.name == "TP 2 × DP 3 × PP 4"
    assert layout.stage == Layout(2, 3) and Layout(2, 3).stage.name == "TP 2 × DP 3"
    found = layouts(QWEN, HOST, num_stages=4)
    assert [(one.tp, one.dp, one.pp) for one in found] == [(1, 2, 4), (2, 1, 4)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_stages", [2, 5])
def test_memory_of_the_stages_is_the_models(tied: bool, num_stages: int) -> None:
    one = memory(QWEN, Layout(2), HOST, 1000, tied=tied)
    parts = [
        memory(QWEN, Layout(2, pp=num_stages), HOST, 1000, tied=tied, rank=2 * stage)
        for stage in range(num_stages)
    ]
    copied = tied * QWEN.vocab_size // 2 * QWEN.hidden_size * 2  # the embedding is the head, too
    assert sum(part.weight_bytes for part in parts) == one.weight_bytes + copied
    assert sum(part.kv_bytes_per_token for part in parts) == one.kv_bytes_per_token
    assert min(part.num_sequences for part in parts) > one.num_sequences


def test_stages_save_time_only_where_there_is_work_for_all() -> None:
    """One sequence takes as long as on one rank; four on four stages take no longer."""
    alone = step(HEADLESS, Layout(), PLAIN, Batch(1, 1, 100)).total
    for count in (1, 2, 4):
        took = step(HEADLESS, Layout(pp=4), PLAIN, Batch(count, 1, 100))
        assert took.total == pytest.approx(alone, rel=1e-3) and took.num_tokens == count
    assert step(HEADLESS, Layout(pp=4), PLAIN, Batch(5, 1, 100)).total > alone
    link = Link(1e-3, 0.0, float("inf"))
    slow = replace(PLAIN, fabric=Fabric(2, link, replace(link, call_s=2e-3)))
    for num_stages, seconds in ((2, 2e-3), (4, 8e-3)):  # within a host, and across two
        took = step(HEADLESS, Layout(pp=num_stages), slow, Batch(1)).seconds
        assert took["stages"] == pytest.approx(seconds)


def test_the_slowest_stage_counts() -> None:
    """36 layers in five stages: eight in the first, seven and the head in the last."""
    seconds = step(HEADLESS, Layout(pp=4), PLAIN, Batch(4)).total
    uneven = step(replace(HEADLESS, num_layers=33), Layout(pp=4), PLAIN, Batch(4)).total
    assert uneven == pytest.approx(seconds, rel=1e-3)
    heavy = replace(QWEN, vocab_size=10**7)
    found = step(heavy, Layout(pp=4), PLAIN, Batch(4)).seconds
    assert found["head"] == 4 * step(heavy, Layout(), PLAIN, Batch(1)).seconds["head"]


def test_prefills_fill_a_pipeline_that_drains_once() -> None:
    work = [Batch(1, 256)] * 6
    one, layout = step(HEADLESS, Layout(), PLAIN, work[0], 4).total, Layout(pp=3)
    took = seconds_of(HEADLESS, layout, PLAIN, work, 4)
    assert took == pytest.approx((6 + 2) / 3 * one, rel=1e-3)
    decode = [Batch(3)]
    whole = step(HEADLESS, layout, PLAIN, decode[0], 4).total
    assert seconds_of(HEADLESS, layout, PLAIN, decode, 4) == whole


def test_many_clients_wait_less_where_weights_are_held_once(tmp_path: Path, capsys: Any) -> None:
    command = f"parallel clients --clients 4 128 --json {tmp_path}/c.json"
    assert main(command.split()) == 0
    rows = load_result(tmp_path / "c.json")["rows"]
    found = {(row["machine"], row["clients"], row["layout"]): row for row in rows}
    small = {
        (count, layout): row
        for (name, count, layout), row in found.items()
        if name.startswith("2 L4")
    }
    copies, ranks, stages = (name for count, name in small if count == 4)
    assert copies == "TP 1 × DP 2" and stages == "TP 1 × DP 1 × PP 2"
    assert small[128, stages]["room"] > 2 * small[128, copies]["room"]
    assert small[128, copies]["ttft_p99_s"] > 2 * small[128, stages]["ttft_p99_s"]
    assert small[4, ranks]["itl_ms"] < small[4, copies]["itl_ms"] < small[4, stages]["itl_ms"]
    assert "| 2 L4 on PCIe | 128 | TP 1 × DP 1 × PP 2 |" in capsys.readouterr().out


def test_played_clients_without_a_queue() -> None:
    """One client: each answer takes a prefill and a step for each token behind the first."""
    played = clients.play(QWEN, Layout(), HOST, 1, 1024, 11, 3)
    prefill, decode = (
        step(QWEN, Layout(), HOST, batch).total for batch in (Batch(1, 1024), Batch(1, 1, 1029))
    )
    assert played.ttfts == pytest.approx([prefill] * 3) and len(played.steps) == 30
    assert played.rate == pytest.approx(11 / (prefill + 10 * decode))
    with pytest.raises(ValueError, match="no room for 1035 tokens"):
        clients.play(MODELS["Llama-3.1-70B"], Layout(), HOST, 1, 1024, 11, 3)


def test_layouts_and_engines_take_stages(tmp_path: Path) -> None:
    command = f"parallel layouts --models Llama-3.1-70B --stages 4 --json {tmp_path}/l.json"
    assert main(command.split()) == 0
    rows = load_result(tmp_path / "l.json")["rows"]
    assert all(row["pp"] is None or row["pp"] >= row["step_ms"] for row in rows)
    assert any(row["pp"] for row in rows)
    parser = argparse.ArgumentParser()
    engines.add_arguments(parser)
    with patch.object(engines, "usable_cores", lambda: 4):
        variants = engines.variants_of(parser.parse_args(["--part", "15", "--stages", "2", "3"]))
        assert [v.name for v in variants] == ["one engine", "TP 2", "DP 2", "PP 2", "PP 3"]
        assert variants[-1].settings["pipeline_parallel_size"] == 3
        assert variants[-1].settings["threads"] == 1 and variants[-1].layout.num_ranks == 3
        with pytest.raises(ValueError, match="--stages 5: must be between 2 and"):
            engines.variants_of(parser.parse_args(["--stages", "5"]))
