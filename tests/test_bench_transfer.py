"""`python -m common.bench transfer`: what it counts, on a few blocks. No assertion on time."""

from pathlib import Path

import pytest

from common.bench import transfer
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.transfer import row_of


def test_each_transport_moves_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "run_worker", lambda job: {"unmeasured": "for a test"})
    path = tmp_path / "transfer.json"
    flags = ["--block-sizes", "16", "--num-tokens", "32", "40", "--repeats", "1"]
    assert main(["transfer", *flags, "--json", str(path)]) == 0
    rows = load_result(path)["rows"]
    kinds = [(row["transport"], row["num_blocks"]) for row in rows]
    assert kinds == [("shm", 2), ("shm", 3), ("tcp", 2), ("tcp", 3)]
    for row in rows:
        assert row["block_kib"] == 720 and row["mib"] == row["num_blocks"] * 720 / 1024
        assert row["transfer_gbps"] <= row["moving_gbps"]


def test_a_row_has_medians_and_the_median_of_the_pairs() -> None:
    samples = [(1.0, 2.0, 4.0), (2.0, 2.0, 4.0), (3.0, 4.0, 4.0)]
    row = row_of("shm", 16, 2, 8 * 10**9, samples)
    assert (row["copy_gbps"], row["moving_gbps"], row["transfer_gbps"]) == (4.0, 4.0, 2.0)
    assert (row["share"], row["ms"]) == (50.0, 4000.0)


def test_an_unknown_transport_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["transfer", "--transports", "pigeon"])
    assert "pigeon" in capsys.readouterr().err
