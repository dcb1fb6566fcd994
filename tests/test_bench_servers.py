"""`servers`: whose server is asked, how often, and what is made of it; with scripted servers."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.bench import BenchError
from common.bench.__main__ import main
from common.bench.compare import Peer
from common.bench.core.results import load_result
from common.bench.serving import servers
from common.bench.serving.client import Target

OURS, PEER = {"rate": 30.0, "ttft_p50": 20.0, "itl_p50": 4.0, "itl_p99": 9.0}, "vLLM 1.2"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Servers that measure as they are called: vLLM's is half as fast, the variant half as fast again."""
    asked: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def server(name: str) -> Iterator[argparse.Namespace]:
        yield argparse.Namespace(url=name)

    async def measure(
        url: str, count: int, number: int, args: argparse.Namespace, peer: Peer
    ) -> dict[str, float]:
        asked.append((url, count, number))
        slower = {"part": 1.0, "peer": 2.0, "variant": 4.0}[url]
        values = {name: value * (1 + number) * slower for name, value in OURS.items()}
        return values | {"rate": OURS["rate"] * count / slower}

    def is_installed(peer: Peer) -> bool:
        peer.version = "1.2"
        return True

    part = lambda variant, args: server("variant" if variant else "part")  # noqa: E731
    monkeypatch.setattr(servers, "part_server", part)
    monkeypatch.setattr(servers, "peer_server", lambda peer, args: server("peer"))
    monkeypatch.setattr(servers, "measure", measure)
    monkeypatch.setattr(servers, "is_installed", is_installed)
    return asked


def test_servers_take_turns_and_are_compared_by_round(
    scripted: list[tuple[str, int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "servers.json"
    flags = ["--peer", "vllm", "--variant", "int4:quantization=int4", "--rounds", "2"]
    flags += ["--streams", "1", "8", "--quick-limits", "--json", str(path)]
    assert main(["servers", *flags]) == 0
    order = [(url, number) for url, count, number in scripted if count == 1]
    assert order == [
        *(("part", 0), ("variant", 0), ("peer", 0)),
        *(("peer", 1), ("variant", 1), ("part", 1)),
    ]
    rows = load_result(path)["rows"]
    assert [(row["server"], row["streams"]) for row in rows] == [
        (name, count) for count in (1, 8) for name in ("part 15", "part 15, int4", PEER)
    ]
    ours, variant, peer = rows[3:]
    assert (ours["rate"], ours["ttft_p50"], ours["itl_p99"]) == (240, 30, 13.5)
    assert (ours["over_rate"], ours["over_ttft_p50"], ours["over_itl_p99"]) == (2, 0.5, 0.5)
    assert (variant["over_rate"], variant["over_ttft_p50"]) == (0.5, 2)
    assert (peer["over_rate"], peer["rate"]) == (None, 120)
    assert "| part 15, int4 | 8 |" in capsys.readouterr().out


def test_a_peer_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    assert main(["servers", "--peer", "vllm", "--peer-python", str(python)]) == 1
    assert f"vllm is not installed for {python}" in capsys.readouterr().err
    assert main(["servers", "--peer", "vllm", "--peer", "vllm"]) == 2
    assert "--peer may be given once here" in capsys.readouterr().err


@pytest.mark.parametrize("completed", [6, 5])
def test_what_vllms_load_generator_is_told_and_says(completed: int, tmp_path: Path) -> None:
    """A script in its place writes down its flags, and an answer; a request that is lost ends it."""
    script = tmp_path / "python"
    answer = {"completed": completed, "output_throughput": 3.0, "median_ttft_ms": 4.0}
    answer |= {"median_itl_ms": 5.0, "p99_itl_ms": 6.0}
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "flags = sys.argv[3:]\nfolder = flags[flags.index('--result-dir') + 1]\n"
        f"json.dump(sys.argv[2:], open({str(tmp_path / 'flags.json')!r}, 'w'))\n"
        f"json.dump({answer!r}, open(folder + '/result.json', 'w'))\n"
    )
    script.chmod(0o755)
    args = argparse.Namespace(model="random:tiny-llama", prompt_len=7, output_len=9, seed=2)
    given: list[Any] = [Target("http://x", model="m"), 3, 6, 1, args, Peer("vllm", str(script))]
    if completed < 6:
        with pytest.raises(BenchError, match=r"^3 streams: 5 of 6 requests succeeded$"):
            servers.vllm_load(*given)
        return
    found = servers.vllm_load(*given)
    assert found == {"rate": 3.0, "ttft_p50": 4.0, "itl_p50": 5.0, "itl_p99": 6.0}
    mode, *flags = json.loads((tmp_path / "flags.json").read_text())
    told = dict(zip(flags[::2], flags[1::2], strict=False))
    assert mode == "bench" and "--ignore-eos" in flags
    assert (told["--num-prompts"], told["--max-concurrency"], told["--seed"]) == ("6", "3", "2001")
    assert (told["--random-input-len"], told["--random-output-len"]) == ("7", "9")


def test_a_peers_server_is_asked_for_what_ours_runs() -> None:
    args = argparse.Namespace(
        settings=[("threads", 1)], model="random:tiny-llama", streams=[1, 64], verbose=False
    )
    server = servers.peer_server(Peer("vllm", "python3"), args)
    flags = dict(zip(server.command[4::2], server.command[5::2], strict=True))
    assert server.command[0] == "python3" and server.command[2:4] == ["serve", "1"]
    assert flags["--dtype"] == "float32" and flags["--max-num-seqs"] == "64"
    assert flags["--port"].isdigit() and flags["--host"] == "127.0.0.1"
