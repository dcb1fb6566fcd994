"""`bench router`: what it measures, on a small model and few requests."""

import json
from pathlib import Path

import pytest

from common.bench.__main__ import main


def test_overhead_is_measured_and_no_stream_fails(tmp_path: Path):
    path = tmp_path / "overhead.json"
    flags = ["--overhead", "--requests", "20", "--streams", "40", "--quick-limits"]
    assert main(["router", *flags, "--json", str(path)]) == 0
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["streams that failed"]["routed"] == rows["streams that failed"]["direct"] == 0
    assert rows["a whole answer, median"]["routed"] > rows["a whole answer, median"]["direct"]
    assert rows["40 streams at once, all of them"]["routed"] >= 10


@pytest.mark.long
def test_policies_on_branching_agents(tmp_path: Path):
    path = tmp_path / "routing.json"
    flags = ["--policies", "round-robin", "cache-aware", "--pairs", "1", "--quick-limits"]
    model = ["--model", "random:tiny-llama", "--engines", "4"]
    assert main(["router", *flags, *model, "--json", str(path)]) == 0
    rows = {row["policy"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["cache-aware"]["hit_rate"] >= 1.5 * rows["round-robin"]["hit_rate"]
    assert rows["cache-aware"]["skew"] < 2
