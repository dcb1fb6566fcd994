"""The benchmark's own arithmetic, parsing and error handling. Nothing here asserts on time."""

import asyncio
import itertools
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench import BenchError, startup
from common.bench.__main__ import SUBCOMMANDS, main
from common.bench.core import processes, report
from common.bench.core.latencies import RequestRecord, percentile, spread_percent, summarize
from common.bench.core.machine import machine, versions
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.results import column, load_result, make_result, save_result
from common.bench.core.workload import (
    Lengths,
    WorkItem,
    draw_lengths,
    load_dataset,
    poisson_arrivals,
    random_work,
)
from common.bench.costs import ModelShape, decode_cost, decode_steps, prefill_flops
from common.bench.offline import offline_row
from common.bench.serving import streaming
from common.bench.serving.client import Target
from common.bench.serving.load import LoadReport, run_load
from common.bench.serving.sse import Event, SSEParser
from common.testing.parts import PARTS

LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}

# Metrics


def test_percentiles_are_linear_between_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile(range(101), 95) == 95
    assert percentile([7.0], 99) == 7.0
    for bad in ([], -1), ([1.0], 101), ([], 50):
        with pytest.raises(ValueError):
            percentile(*bad)


def test_summary_and_spread() -> None:
    assert summarize([2.0, None, 4.0]) == {
        "count": 2, "mean": 3.0, "p50": 3.0, "p95": pytest.approx(3.9), "p99": pytest.approx(3.98),
    }  # fmt: skip
    assert summarize([None]) == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    assert spread_percent([9.0, 10.0, 12.0]) == 30.0
    assert spread_percent([1.0]) is None


def test_latencies_of_a_timeline() -> None:
    record = RequestRecord(0, start=10.0, arrivals=[10.5, 10.75, 11.75], completion_tokens=3)
    assert record.ttft == 0.5
    assert record.itls == [0.25, 1.0]
    assert record.tpot == statistics.mean(record.itls) == 0.625
    assert record.e2e == record.ttft + sum(record.itls) == 1.75


def test_tokens_that_arrive_together_have_no_latency_between_them() -> None:
    record = RequestRecord(0, start=0.0, arrivals=[1.0, 2.0, 4.0], completion_tokens=7)
    assert record.tpot == (1.0 + 2.0 + 0 + 0 + 0 + 0) / 6
    assert record.itls == [1.0, 2.0]


def test_a_whole_response_has_no_time_per_token() -> None:
    record = RequestRecord(0, start=1.0, arrivals=[3.0], completion_tokens=9)
    assert (record.ttft, record.e2e, record.itls, record.tpot) == (2.0, 2.0, [], None)
    silent = RequestRecord(0, completion_tokens=9)
    assert (silent.ttft, silent.e2e, silent.itls, silent.tpot) == (None, None, [], None)


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_end_to_end_is_first_token_plus_latencies(gaps: list[int]) -> None:
    arrivals = [sum(gaps[: i + 1]) / 1024 for i in range(len(gaps))]  # exact in binary
    record = RequestRecord(0, arrivals=arrivals)
    assert record.e2e == arrivals[-1]
    assert record.tpot is None or record.tpot == sum(record.itls) / len(record.itls)


def test_other_work_is_told_where_it_matters() -> None:
    others = OtherWork()
    assert others.cores() is None or others.cores() >= 0
    assert disturbance(None) is None and disturbance(0.01) is None
    assert "kept 900.0 of" in disturbance(900.0)


# Costs


TINY = ModelShape(
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=3,
    intermediate_size=10, vocab_size=50,
)  # fmt: skip


def test_costs_by_hand() -> None:
    attention, mlp, head = 2 * 8 * (4 + 2 + 2 + 4) * 3, 2 * 3 * 8 * 10, 50 * 8
    assert TINY.layer_params == attention + mlp
    assert TINY.params_read(4) == attention + mlp + head
    positions = 1 + 2 + 3
    flops = 2 * (3 * (attention + mlp) + head) + 4 * 2 * 4 * 3 * positions
    assert prefill_flops(TINY, [3]) == flops
    # Prompts of 3 and 5, outputs of 3 and 2: forwards at contexts 4, 5 and 6, in two steps.
    cost = decode_cost(TINY, [3, 5], [3, 2], batch_size=2, dtype_bytes=4)
    assert (cost.num_steps, cost.num_tokens) == (2, 3)
    assert cost.num_bytes == 4 * (2 * (attention + mlp + head) + 2 * 2 * 2 * 3 * (4 + 5 + 6))
    assert cost.flops == 2 * 3 * (attention + mlp + head) + 4 * 2 * 4 * 3 * (4 + 5 + 6)
    assert decode_cost(TINY, [3, 5], [3, 2], 1, 4).num_steps == 3


def test_decode_steps_fill_the_place_that_is_free_first() -> None:
    assert decode_steps([4, 1, 1, 1], 2) == 4
    assert decode_steps([3, 3, 3], 2) == 6
    assert decode_steps([], 4) == 0


def test_experts_touched_by_a_batch() -> None:
    config = {
        "num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 99,
        "moe_intermediate_size": 5, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 10,
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    shared = 4 * 4 * 4 + 4 * 8 + 40
    assert shape.params_read(1) == pytest.approx(shared + 2 * 60)
    assert shape.params_read(1000) == pytest.approx(shared + 8 * 60)
    with pytest.raises(ValueError, match="hidden_size"):
        ModelShape.from_config({"num_attention_heads": 1})


# Server-sent events


def events_of(parser: SSEParser, stream: bytes, cuts: list[int]) -> list[Event]:
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert b"".join(pieces) == stream
    return [event for piece in pieces for event in parser.feed(piece)]


@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8), min_size=1
        )
    ),
    st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=1),
    st.lists(st.integers(0, 400)),
)
def test_events_survive_any_chunk_borders(
    messages: list[list[str]], ends: list[str], cuts: list[int]
) -> None:
    text, line = "", 0
    for message in messages:
        for entry in (": ping", *(f"data: {part}" for part in message), ""):
            end = ends[line % len(ends)]
            # An empty line after a bare CR must not begin with LF, or the two would be one CRLF.
            text += entry + ("\r" if text.endswith("\r") and entry + end == "\n" else end)
            line += 1
    found = events_of(SSEParser(), text.encode(), cuts)
    assert found == [Event("\n".join(message)) for message in messages]


def test_event_names_fields_and_unfinished_events() -> None:
    stream = (
        b"\xef\xbb\xbfevent: error\ndata:x\nid: 3\nretry\n\nevent: lonely\n\ndata: y\n\ndata: z"
    )
    assert SSEParser().feed(stream) == [Event("x", "error"), Event("y")]


# Workloads


def test_arrivals_are_seeded_and_poisson() -> None:
    times = poisson_arrivals(4000, rate=50.0, seed=3)
    assert times == poisson_arrivals(4000, 50.0, 3) != poisson_arrivals(4000, 50.0, 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0 and min(gaps) > 0
    # An exponential distribution has its mean as its standard deviation, and 1/e of it above.
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.07)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def test_work_is_seeded_and_within_its_ranges() -> None:
    lengths = draw_lengths(50, (3, 9), (2, 5), seed=1)
    assert lengths == draw_lengths(50, (3, 9), (2, 5), seed=1)
    assert {3, 9} <= set(lengths.prompt) <= set(range(3, 10))
    work = random_work(lengths, 512, seed=1)
    assert work == random_work(lengths, 512, seed=1) != random_work(lengths, 512, seed=2)
    assert [len(item.prompt) for item in work] == lengths.prompt
    assert all(100 <= token < 512 for item in work for token in item.prompt)
    assert all(len(i.prompt.split()) == n for i, n in zip(random_work(lengths, None, 1), lengths.prompt, strict=True))  # fmt: skip


def test_dataset(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 2}\n\n{"prompt": [1, 2], "max_tokens": 3}\n')
    assert load_dataset(path, 3) == [WorkItem("a", 2), WorkItem([1, 2], 3), WorkItem("a", 2)]
    for line in (
        '{"prompt": "a"}',
        '{"prompt": [], "max_tokens": 1}',
        "[]",
        "{",
        '{"max_tokens": 1}',
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"data\.jsonl:1: "):
            load_dataset(path, None)


# A server that does as its script says


class FakeServer(BaseHTTPRequestHandler):
    """An OpenAI server; the first token of a prompt picks its behaviour from `script`."""

    protocol_version = "HTTP/1.1"
    script: ClassVar[dict[int, str]] = {
        1: "http 500", 2: "http 503", 3: "disconnect", 4: "error event", 5: "truncated",
        6: "bad event", 7: "garbage", 8: "aborted", 9: "silent",
    }  # fmt: skip
    seen: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "fake"}]})
        else:
            self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body))
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        behaviour = self.script.get(prompt[0], "good") if isinstance(prompt, list) else "good"
        if behaviour.startswith("http"):
            error = {"error": {"message": "scripted", "type": "server_error"}}
            self.answer(int(behaviour.split()[1]), error)
        elif body.get("stream"):
            self.stream(behaviour, body, "messages" in body)
        else:
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
            self.answer(200, {"choices": [choice], "usage": usage})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, behaviour: str, body: dict[str, Any], chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number in range(body["max_tokens"]):
            if number == 1 and behaviour != "good" and self.interrupt(behaviour):
                return
            time.sleep(0.001)
            text = "" if behaviour == "silent" else "né"
            choice = {"delta": {"content": text}} if chat else {"text": text}
            self.event({"choices": [{"index": 0, **choice, "finish_reason": None}]})
        end = {"delta": {}} if chat else {"text": ""}
        reason = "abort" if behaviour == "aborted" else "length"
        self.event({"choices": [{"index": 0, **end, "finish_reason": reason}]})
        usage = {"prompt_tokens": 4, "completion_tokens": body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.write(b"data: [DONE]\r\n\r\n")
        self.write(b"")

    def interrupt(self, behaviour: str) -> bool:
        """Misbehave after the first token; whether the response is over."""
        if behaviour == "disconnect":
            self.close_connection = True
        elif behaviour == "error event":
            self.event({"error": {"message": "out of memory"}})
            self.write(b"")
        elif behaviour == "truncated":
            self.write(b"")
        elif behaviour == "bad event":
            self.write(b"data: {half\n\n")
            self.write(b"")
        elif behaviour == "garbage":
            self.wfile.write(b"not a chunk\r\n")
            self.close_connection = True
        else:
            return False
        return True

    def event(self, data: dict[str, Any]) -> None:
        encoded = b"data: " + json.dumps(data).encode() + b"\r\n\r\n"
        for start in range(0, len(encoded), 7):
            self.write(encoded[start : start + 7])

    def write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def load(url: str, items: list[WorkItem], **options: Any) -> LoadReport:
    target = Target(url, "fake", **options.pop("target", {}))
    return asyncio.run(run_load(target, items, **options or {"concurrency": 4}))


def test_failures_are_counted_by_kind_and_left_out(fake_url: str) -> None:
    good = [WorkItem([200, n], 5) for n in range(12)]
    bad = [WorkItem([kind, 0], 5) for kind in (1, 2, 2, 3, 4, 5, 6, 7, 8)]
    items = good + bad
    random.Random(0).shuffle(items)
    report = load(fake_url, items, concurrency=5)
    assert report.errors == {
        "http_500": 1, "http_503": 2, "disconnect": 2, "error_event": 1, "truncated": 1,
        "bad_event": 1, "finish_abort": 1,
    }  # fmt: skip
    assert len(report.requests) == len(items) and len(report.completed) == len(good)
    assert [record.index for record in report.requests] == list(range(len(items)))
    for record in report.completed:
        assert len(record.arrivals) == record.completion_tokens == 5
        assert (record.prompt_tokens, record.finish_reason) == (4, "length")
        assert record.start <= record.first_byte <= record.arrivals[0] <= record.end
        assert record.e2e == record.ttft + sum(record.itls)
    assert report.token_rate("completion") == 60 / report.duration
    details = {record.error: record.detail for record in report.requests}
    assert details["http_503"] == "scripted" and details["error_event"] == "out of memory"


def test_nobody_listens() -> None:
    report = load("http://127.0.0.1:9", [WorkItem([1], 1)], concurrency=1)
    assert report.errors == {"connect": 1}


def test_silent_streams_have_no_latencies(fake_url: str) -> None:
    record = load(fake_url, [WorkItem([9, 0], 5)]).requests[0]
    assert record.error is None and record.arrivals == [] and record.completion_tokens == 5


def test_whole_responses_and_chat(fake_url: str) -> None:
    record = load(fake_url, [WorkItem([200], 5)], target={"stream": False}).requests[0]
    assert record.arrivals and record.tpot is None and record.completion_tokens == 5
    record = load(fake_url, [WorkItem("hi", 5)], target={"endpoint": "chat"}).requests[0]
    assert record.error is None and len(record.arrivals) == 5  # the role is no token
    path, body = FakeServer.seen[-1]
    assert path == "/v1/chat/completions" and body["messages"] == [
        {"role": "user", "content": "hi"}
    ]
    assert body["stream_options"] == {"include_usage": True}


def test_open_loop_follows_its_schedule(fake_url: str) -> None:
    arrivals = poisson_arrivals(10, 500.0, seed=0)
    items = [WorkItem([200, n], 2) for n in range(10)]
    report = load(fake_url, items, arrivals=arrivals, probe_interval=0.005)
    assert len(report.completed) == 10 and all(record.lag >= 0 for record in report.requests)
    first = report.requests[0]
    for record, offset in zip(report.requests, arrivals, strict=True):
        assert record.start - first.start >= offset - first.lag
    assert report.health.latencies and not report.health.failures


def test_serve_command(fake_url: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, log, picture = tmp_path / "serve.json", tmp_path / "log.jsonl", tmp_path / "cdf.png"
    flags = f"serve --url {fake_url} --num-requests 6 --output-range 2 4 --input-range 3 8"
    flags += f" --probe-health 0.01 --no-limits --json {out} --save-requests {log}"
    assert main(flags.split()) == 0
    result = load_result(out)
    rows = {row["metric"]: row for row in result["rows"]}
    assert list(rows) == ["TTFT", "ITL", "TPOT", "E2E", "GET /health"]
    assert rows["TTFT"]["count"] == 6 and rows["E2E"]["p50"] <= rows["E2E"]["p99"]
    assert result["summary"]["num_completed"] == 6 and "Errors: none" in result["notes"][0]
    assert result["limits"] == {"unmeasured": "the server may be another machine"}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert all(line["completion_tokens"] == 1 + len(line["itls"]) for line in lines)
    assert main(["report", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| TTFT | 6 |" in capsys.readouterr().out


def test_serve_with_failures_only(fake_url: str, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": [2, 3], "max_tokens": 4}\n')
    flags = ["serve", "--url", fake_url, "--no-limits", "--dataset", str(data)]
    assert main(flags) == 1
    assert "warm-up failed: http_503: scripted" in capsys.readouterr().err
    assert main([*flags, "--warmup", "0", "--num-requests", "3"]) == 1
    output = capsys.readouterr().out
    assert "0 of 3 requests completed" in output and "Errors: 3 http_503" in output
    assert "| TTFT | 0 | – | – | – | – |" in output


# Results and reports


def small_result(**changes: Any) -> dict[str, Any]:
    columns = [column("engine", "engine"), column("speed", "speed", "tok/s", 1)]
    rows = [{"engine": "a|b", "speed": 1234.56}, {"engine": "c", "speed": None}]
    return make_result("A title", columns, rows, limits=LIMITS, notes=["c: no GPU."]) | changes


def test_result_round_trip_and_table(tmp_path: Path) -> None:
    result = small_result()
    save_result(tmp_path / "deep" / "result.json", result)
    assert load_result(tmp_path / "deep" / "result.json") == result
    assert os.listdir(tmp_path / "deep") == ["result.json"]
    lines = report.render(result).splitlines()
    assert lines[:6] == [
        "**A title**", "", "| engine | speed (tok/s) |", "| --- | ---: |",
        "| a\\|b | 1,234.6 |", "| c | – |",
    ]  # fmt: skip
    assert "10 GB/s read, 100 GFLOP/s fp32" in lines[7]
    assert f"python {versions()['python']}" in lines[7] and result["date"][:10] in lines[7]
    assert lines[-1] == "- c: no GPU."


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ('{"format": 1, "title": NaN}', "NaN is not a number"),
        ("[]", "must be an object, not list"),
        ('{"format": 2}', "format must be 1, not 2"),
        ('{"format": 1}', "title must be a str, but is missing"),
    ],
)
def test_bad_json_is_refused(text: str, complaint: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert "bad.json: " in error and complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rows": [{"engine": "a"}]}, "row 1 has no 'speed'"),
        ({"rows": [{"engine": "a", "speed": [1]}]}, "must be a plain value"),
        ({"rows": [{"engine": "a", "speed": float("nan")}]}, "must be finite"),
        ({"rows": [3]}, "row 1 must be an object, not int"),
        ({"columns": [{"key": "engine"}]}, "lacks 'label'"),
        ({"columns": []}, "at least one"),
        ({"notes": [1]}, "notes must be texts"),
        ({"limits": None}, "limits must be a dict"),
    ],
)
def test_bad_results_are_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        save_result(tmp_path / "bad.json", small_result(**changes))
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="must not replace 'rows'"):
        make_result("t", [column("a", "a")], [], limits={}, extra={"rows": []})


README = """# A part

<!-- table: {path} -->
stale
<!-- /table -->

```markdown
<!-- table: results/not_a_block.json -->
```
The end, with no line feed"""


def test_tables_are_written_into_readmes(tmp_path: Path, capsys: Any) -> None:
    part = tmp_path / "part01_first"
    save_result(part / "results" / "speed.json", small_result())
    (part / "README.md").write_text(README.format(path="results/speed.json"))
    (tmp_path / "README.md").write_text(README.format(path="part01_first/results/speed.json"))
    command = ["report", "--write", "--root", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == ["README.md", "part01_first/README.md"]
    text = (part / "README.md").read_text()
    table = report.render(small_result())
    before, after = README.format(path="results/speed.json").split("stale")
    assert text.startswith(before) and text.endswith(after)
    assert table.split("\n\n")[1] in text and "stale" not in text
    assert main(command) == 0 and (part / "README.md").read_text() == text
    assert capsys.readouterr().out == ""
    assert main(["report", "--all", "--root", str(tmp_path)]) == 0
    assert "| c | – |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- table: results/x.json -->\n<!-- /table -->\n", "No such file"),
        ("<!-- table: ../x.json -->\n<!-- /table -->\n", "leads out of"),
    ],
)
def test_bad_blocks(text: str, complaint: str, tmp_path: Path, capsys: Any) -> None:
    part = tmp_path / "part01_first"
    part.mkdir()
    (part / "README.md").write_text(text)
    assert main(["report", "--write", "--part", "1", "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "part01_first/README.md:1: " in error and complaint in error
    assert (part / "README.md").read_text() == text


def test_unclosed_blocks(tmp_path: Path) -> None:
    save_result(tmp_path / "results" / "x.json", small_result())
    opening = "<!-- table: results/x.json -->\n"
    with pytest.raises(BenchError, match="is not closed by"):
        report.filled(opening, tmp_path, "README.md")
    with pytest.raises(BenchError, match="before it is not closed"):
        report.filled(opening * 2, tmp_path, "README.md")


# Command line


@pytest.mark.parametrize(
    "flags",
    [
        "", "nonsense", "offline", "offline --part 0", "offline --part 99", "limits --device tpu",
        "offline --part 1 --prompt-len 3 --input-range 1 2", "offline --part 1 --input-range 5 2",
        "offline --part 1 --set threads", "serve --concurrency 2 --request-rate 1",
        "serve --request-rate -1", "serve --dataset /nowhere.jsonl --no-limits", "serve --body 3",
        "startup --parts x", "streaming --parts 98", "report", "report --part 98",
        "report --write x.json", "limits --dev cpu",
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


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"`{name}`" in capsys.readouterr().out


# Machine and engines


def test_machine_and_limits(capsys: Any, tmp_path: Path) -> None:
    facts = machine()
    assert 1 <= facts["cores"] <= os.cpu_count() and facts["cpu"]
    assert main(["limits", "--quick", "--device", "cpu", "--json", str(tmp_path / "l.json")]) == 0
    limits = load_result(tmp_path / "l.json")["limits"]
    assert limits["read_gbps"] > 0 and limits["fp32_gflops"] > 0
    assert limits["bf16_tflops"] is None and limits["quick"] is True


FAKE_ENGINE = """
import time
from types import SimpleNamespace

class LLMEngine:
    def __init__(self, config):
        print("engines may print")
        self.config = config

    def generate(self, prompts, sampling_params, progress=True):
        time.sleep(0.002 * max(params.max_tokens for params in sampling_params))
        return [
            SimpleNamespace(token_ids=[1] * params.max_tokens)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
"""
FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class EngineConfig:
    model: str
    max_num_seqs: int = 4
"""
FAKE_PART_SERVER = """
import sys
from http.server import ThreadingHTTPServer
from test_bench import FakeServer

server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
print(f"Serving on http://127.0.0.1:{server.server_address[1]}")
server.serve_forever()
"""


@pytest.fixture
def fake_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts 01 (cannot stream) and 77, found before any real ones, here and in child processes."""
    for name in ("part01", "part77"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "engine.py").write_text(FAKE_ENGINE)
        (folder / "config.py").write_text(FAKE_CONFIG)
        (folder / "server.py").write_text(FAKE_PART_SERVER)
    paths = [str(tmp_path), str(Path(__file__).parent)]
    for path in paths:
        monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    environment = processes.child_environment

    def fakes_first() -> dict[str, str]:
        found = environment()
        return found | {"PYTHONPATH": os.pathsep.join([*paths, found["PYTHONPATH"]])}

    monkeypatch.setattr(processes, "child_environment", fakes_first)


def without_limits(job: dict[str, Any], **options: Any) -> dict[str, Any]:
    return LIMITS if job["job"] == "limits" else processes.run_worker(job, **options)


def test_offline_on_a_fake_part(fake_parts: None, tmp_path: Path, capsys: Any) -> None:
    flags = "offline --part 77 --model none --num-prompts 3 --input-range 2 6 --output-len 9"
    flags += f" --repeats 2 --set max_num_seqs=2 --quick-limits --json {tmp_path / 'o.json'}"
    assert main(flags.split()) == 0
    result = load_result(tmp_path / "o.json")
    (row,) = result["rows"]
    assert (row["num_prompts"], row["output_len"], len(row["whole_runs_s"])) == (3, 9, 2)
    assert row["decode_tps"] > 0 and row["prefill_tps"] > 0 and row["import_s"] >= 0
    assert row["decode_mbu"] is None and "config is not known" in " ".join(result["notes"])
    assert result["limits"]["read_gbps"] > 0
    assert main([*flags.split(), "--set", "nonsense=1"]) == 1
    error = capsys.readouterr().err
    assert "nonsense" in error and error.strip().count("\n") == 0


def test_offline_arithmetic() -> None:
    def runs(first: float, whole: float) -> dict[str, Any]:
        return {
            "first": {"seconds": first, "output": [1, 1]},
            "whole": {"seconds": whole, "output": [5, 5]},
        }

    answer = {
        "runs": [runs(2.0, 6.0), runs(1.0, 5.0), runs(3.0, 7.0)],
        "other_cores": None,
        "memory": {"peak_mib": 5.0}, "import_s": 1.0, "construct_s": 1.0, "device": "cpu",
        "dtype": "float32", "max_num_seqs": 2,
        "shape": {
            "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 3, "intermediate_size": 10, "vocab_size": 50,
        },
    }  # fmt: skip
    row, reasons = offline_row(Lengths([10, 20], [5, 5]), answer, LIMITS)
    assert (row["prefill_tps"], row["decode_tps"], row["total_s"]) == (15.0, 2.0, 6.0)
    assert reasons == []
    cost = decode_cost(TINY, [10, 20], [5, 5], 2, 4)
    assert row["decode_mbu"] == pytest.approx(100 * cost.num_bytes / 4.0 / 10e9)
    assert row["prefill_mfu"] == pytest.approx(100 * prefill_flops(TINY, [10, 20]) / 2.0 / 100e9)
    row, reasons = offline_row(Lengths([10, 20], [5, 6]), answer | {"dtype": "bfloat16"}, LIMITS)
    assert row["decode_mfu"] is None and row["decode_mbu"] is not None
    assert "10 tokens of 11" in reasons[0] and "bfloat16 matrix rate" in reasons[1]


def test_startup_of_a_fake_part(fake_parts: None, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(startup, "run_worker", without_limits)
    flags = f"startup --parts 77 --model fake --repeats 1 --json {tmp_path / 's.json'}"
    assert main(flags.split()) == 0
    (row,) = load_result(tmp_path / "s.json")["rows"]
    assert row["ready_s"] > 0 and row["peak_mib"] >= row["rss_mib"] > 0 and row["pss_mib"] > 0


def test_streaming_of_fake_parts(fake_parts: None, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(streaming, "run_worker", without_limits)
    flags = "streaming --parts 1 77 --model fake --repeats 1 --streams 3 --output-len 5"
    assert main([*flags.split(), "--json", str(tmp_path / "s.json")]) == 0
    whole, stream = load_result(tmp_path / "s.json")["rows"]
    assert (whole["mode"], stream["mode"]) == ("whole", "stream")
    assert whole["ttft_ms"] == whole["total_ms"] and stream["ttft_ms"] < stream["total_ms"]
    assert stream["num_probes"] > 0 and stream["health_failures"] == 0


def test_a_server_that_dies_is_told_in_one_line(fake_parts: None, tmp_path: Path) -> None:
    (tmp_path / "part77" / "server.py").write_text("raise SystemExit('no such model')")
    with (
        pytest.raises(BenchError, match="ended with 1: no such model"),
        processes.PartServer(77, "x"),
    ):
        pass
    assert processes.as_flags({"max_model_len": 5, "kv_cache": False}) == ["--max-model-len", "5", "--no-kv-cache"]  # fmt: skip


def test_offline_on_part_01(tmp_path: Path) -> None:
    if not (processes.ROOT / "part01_simple_server" / "engine.py").exists():
        pytest.skip("part 01 is not there")
    flags = "offline --part 1 --model random:tiny-llama --prompt-len 8 --output-len 4 --repeats 2"
    assert main([*flags.split(), "--quick-limits", "--json", str(tmp_path / "o.json")]) == 0
    result = load_result(tmp_path / "o.json")
    (row,) = result["rows"]
    assert row["output_len"] == 4 and row["prefill_tps"] > 0 and row["peak_mib"] > 0
    assert row["prefill_mfu"] > 0 and "float32" in result["notes"][0]
    assert list(result["code"]) == ["part01"]


@pytest.mark.skipif(max(PARTS) < 6, reason="part 06 is not there")
def test_a_long_prompt_among_streams(monkeypatch: Any, tmp_path: Path) -> None:
    """Counted in a real engine: tokens of each stream, and gaps that the newcomer falls into."""
    from common.bench.serving import arrival
    from common.testing.parts import engine_of

    job = {"streams": 3, "stream_prompt_len": 4, "output_len": 20, "prompt_len": 60, "before": 5}
    engine = engine_of(6, "random:tiny-llama", threads=1, max_num_batched_tokens=16)
    answer = arrival.measure(engine, job | {"vocab_size": 500, "seed": "0"})
    assert [len(times) for times in answer["tokens"]] == [20] * 4
    assert all(times == sorted(times) for times in answer["tokens"])
    assert 9 <= len(answer["gaps"]) <= 45 and min(answer["gaps"]) >= 0
    assert answer["ttft_s"] > 0 and answer["tokens"][-1][0] == pytest.approx(answer["ttft_s"])
    monkeypatch.setattr(arrival, "run_worker", lambda job, **_: {**answer, "wall_other_cores": 0.0, "unmeasured": "x"})  # fmt: skip
    flags = ["arrival", "--parts", "5", "6", "--repeats", "2", "--json", str(tmp_path / "a.json")]
    assert main([*flags, "--plot", str(tmp_path / "a.png")]) == 0
    before, after = load_result(tmp_path / "a.json")["rows"]
    assert before["worst_ms"] == 1000 * max(answer["gaps"]) and after["worst_ratio"] == 1
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="before must be less"):
        arrival.run(arrival_flags(flags, before=100))


def arrival_flags(flags: list[str], **change: Any) -> Any:
    from common.bench.__main__ import build_parser

    args = build_parser().parse_args(flags)
    vars(args).update(change)
    return args
