"""`life`: the client's times, the server's log and the engine's trace put together. No assertion on time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.bench import BenchError, life
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.life import Span, assemble, has_token, stations
from common.bench.life_plot import plot_life
from common.http.run import ServerConfig
from common.testing.parts import engine_of, module_of
from common.testing.server import serving_thread
from common.trace import StepRecord, Trace

CLIENT = {
    "id": "cmpl-x", "begin": 10.0, "connected": 10.1, "sent": 10.2, "first_token": 13.4, "end": 14.0,
}  # fmt: skip
SERVED = {
    "id": "x", "request_ids": ["r"], "num_prompt_tokens": [6],
    "arrived": 10.3, "read": 10.4, "tokenize": 10.5, "tokenized": 10.7, "submitted": 10.8,
    "taken": [13.1, 13.6], "detokenized": [13.2, 13.7], "sent": [13.3, 13.8, 13.85], "ended": 13.9,
}  # fmt: skip


def trace() -> Trace:
    """Two slices of a prompt and a decode step, launched one step before each is read."""
    made = Trace()
    for record in (
        StepRecord(0, 9.0, 9.5, scheduled={"other": 3}),
        StepRecord(1, 11.0, 11.2, scheduled={"r": 4, "other": 1}),
        StepRecord(2, 11.2, 12.0, scheduled={"r": 2}, device=[(1, 11.2, 11.9)]),
        StepRecord(3, 12.0, 13.0, scheduled={"r": 1}, device=[(2, 11.9, 12.9)]),
        StepRecord(4, 13.0, 13.5, device=[(3, 12.9, 13.4)]),
    ):
        made._records.append(record)
    return made


def named(spans: list[Span], track: str) -> list[tuple[str, float, float]]:
    own = [span for span in spans if span.track == track]
    return [(span.name, round(span.begin, 6), round(span.end, 6)) for span in own]


def test_a_life_by_hand() -> None:
    one = assemble(CLIENT, SERVED, trace())
    assert named(one.spans, "client") == [
        ("connect", 0, 0.1),
        ("send", 0.1, 0.2),
        ("wait", 0.2, 3.4),
        ("stream", 3.4, 4.0),
    ]
    assert named(one.spans, "engine") == [
        ("queue", 0.8, 1.0),
        ("prefill: 4", 1.0, 1.2),
        ("prefill: 2", 1.2, 2.0),
        ("decode", 2.0, 3.0),
    ]
    assert named(one.spans, "device") == [
        ("prefill: 4", 1.2, 1.9),
        ("prefill: 2", 1.9, 2.9),
        ("decode", 2.9, 3.4),
    ]
    http = named(one.spans, "HTTP")
    assert http[:4] == [
        ("socket to handler", 0.2, 0.3),
        ("read and check JSON", 0.3, 0.5),
        ("template and tokenise", 0.5, 0.7),
        ("hand over", 0.7, 0.8),
    ]
    assert http[4:7] == [
        ("to the event loop", 3.0, 3.1),
        ("detokenise", 3.1, 3.2),
        ("JSON, SSE, send", 3.2, 3.3),
    ]
    assert one.marks["first step"] == pytest.approx(1.0)
    assert one.marks["first token sent"] == pytest.approx(3.3)


def test_a_found_prefix_is_no_prefill() -> None:
    """Of 6 prompt tokens 4 were in the cache: one slice, and what follows decodes."""
    made = Trace()
    made._records.append(StepRecord(0, 11.0, 11.5, scheduled={"r": 2}, cached={"r": 4}))
    made._records.append(StepRecord(1, 11.5, 12.0, scheduled={"r": 1}))
    names = [name for name, _, _ in named(assemble(CLIENT, SERVED, made).spans, "engine")]
    assert names == ["queue", "prefill: 2", "decode"]


def test_outputs_belong_to_the_step_before() -> None:
    found = list(stations(SERVED, [12.0, 13.0, 13.5, 20.0]))
    assert [token["step"] for token in found] == [13.0, 13.5]
    assert [token["sent"] for token in found] == [13.3, 13.8]


def test_other_clocks_and_lost_beginnings_are_told() -> None:
    with pytest.raises(BenchError, match="clock is not the client's"):
        assemble({**CLIENT, "begin": 11.0}, SERVED, trace())
    with pytest.raises(BenchError, match="trace has lost the request"):
        assemble(CLIENT, {**SERVED, "request_ids": ["gone"]}, trace())


def test_a_chats_opening_is_no_token() -> None:
    opening = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    assert not has_token(opening) and not has_token({"choices": []})
    assert has_token({"choices": [{"delta": {"content": "a"}}]})
    assert has_token({"choices": [{"index": 0, "text": ""}]})  # of a model without a tokenizer


class InProcess:
    """Stands for `PartServer`: a part's app in a thread."""

    def __init__(self, part: int, model: str, settings: dict[str, Any], verbose: bool) -> None:
        self.part, self.model, self.settings = part, model, settings

    def __enter__(self) -> "InProcess":
        self.stack = contextlib.ExitStack()
        engine = engine_of(self.part, self.model, **self.settings)
        app = module_of(self.part, "server").create_app(engine, ServerConfig(port=0))
        self.url = self.stack.enter_context(serving_thread(app))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(life, "PartServer", InProcess)
    yield


def test_a_real_life(in_process: None, tmp_path: Path, capsys: Any) -> None:
    text = "life --model random:tiny-llama --set threads=1 --set max_num_batched_tokens=32"
    text += f" --prompt-len 80 --output-len 6 --json {tmp_path / 'l.json'}"
    assert main([*text.split(), "--plot", str(tmp_path / "l.png")]) == 0
    result = load_result(tmp_path / "l.json")
    stages = {(row["where"], row["stage"].split(":")[0]): row for row in result["rows"]}
    assert {stage for where, stage in stages if where == "engine"} == {"queue", "prefill", "decode"}
    prefills = [row["stage"] for row in result["rows"] if row["where"] == "engine"]
    assert sum(int(n.split(": ")[1]) for n in prefills if "prefill" in n) >= 32
    assert stages["HTTP", "detokenise"]["times"] == 6
    assert all(row["length_ms"] >= 0 for row in result["rows"])
    assert all(span["end"] >= span["begin"] >= 0 for span in result["spans"])
    marks = result["marks"]
    order = ["arrives", "tokenised", "submitted", "first step", "first token sent", "last byte"]
    assert list(marks) == order and list(marks.values()) == sorted(marks.values())
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert "| template and tokenise | HTTP |" in capsys.readouterr().out


def test_a_part_without_the_log_is_told(in_process: None, capsys: Any) -> None:
    text = "life --part 14 --model random:tiny-llama --set threads=1 --company 0 --output-len 2"
    assert main(text.split()) == 1
    assert "the part's server has no /trace.requests.jsonl" in capsys.readouterr().err


def test_every_stage_has_a_colour(tmp_path: Path) -> None:
    one = assemble(CLIENT, SERVED, trace())
    result = {"machine": {"cpu": "x", "cores": 2}, "limits": {}, "date": "2026-01-01", "rows": []}
    plot_life(one, result, tmp_path / "l.svg")
    text = (tmp_path / "l.svg").read_text()
    assert "<svg" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--company -1", "--company must not be negative, but is -1"),
        ("--plot x.gif", "--plot must name a .png or an .svg"),
        ("--prompt-len 0", "must be a positive integer, not '0'"),
    ],
)
def test_bad_flags_give_one_line(text: str, says: str, capsys: Any) -> None:
    try:
        status = main(["life", "--model", "random:tiny-llama", *text.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and says in error
