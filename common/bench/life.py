"""`life`: one request's life from socket to token, drawn from a server's own trace.

A server of the part is started, warmed up, and given some streams as company; then one more client streams
an answer and notes its own times. The server's `/trace.requests.jsonl` has what happened around the engine,
`/trace.jsonl` what the engine's steps did. All times are of one clock, the machine's monotonic one.

    client    connect, send | ............. wait ............. | first byte ... last byte
    HTTP           parse, template, tokenise, hand over                | detokenise, JSON, send
    engine                              queue | prefill slices | decode steps
    device                                      work, step by step

The table has each stage's begin and length, of what happens for every token the median.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    settings_of,
)
from common.bench.core.processes import PartServer, post_json
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts, random_texts
from common.bench.ladder import known_vocab_size
from common.bench.prefix.plot import check_plot
from common.trace import Trace

PART = 15
COLUMNS = [
    column("stage", "stage"),
    column("where", "where"),
    column("begin_ms", "begin", "ms", 2),
    column("length_ms", "length", "ms", 2),
    column("times", "times", digits=0),
]
WAIT_SECONDS = 60.0  # for the company to have its first tokens


@dataclass(frozen=True)
class Span:
    """A piece of the life on one track, in seconds from the client's begin."""

    track: str  # client, HTTP, engine or device
    name: str
    begin: float
    end: float


@dataclass
class Life:
    """All that is known of a request, in seconds from the client's begin."""

    spans: list[Span]
    marks: dict[str, float] = field(default_factory=dict)  # moments that the picture names
    tokens: list[dict[str, float]] = field(default_factory=list)  # of each output: its stations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=PART, help=f"default: {PART}")
    add_engine_arguments(parser)
    parser.add_argument("--prompt-len", type=positive, default=400, help="tokens (default: 400)")
    parser.add_argument("--output-len", type=positive, default=24, help="tokens (default: 24)")
    parser.add_argument("--company", type=int, default=2, help="other streams (default: 2)")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    if args.company < 0:
        raise ValueError(f"--company must not be negative, but is {args.company}")
    path, bodies = requests_for(args)
    with PartServer(args.part, args.model, settings_of(args), verbose=args.verbose) as server:
        post_json(f"{server.url}{path}", bodies["warm-up"])
        with Company(f"{server.url}{path}", bodies["company"]) as streams:
            client = stream(server.url, path, bodies["one"])
            served = [life for life in lives_of(server.url) if life["id"] in client["id"]]
            if not served:
                raise BenchError("the server's log of requests has not this one")
            trace = trace_of(server.url)
        if failed := [error for _, error in streams if error]:
            raise BenchError(f"a stream of the company failed: {failed[0]}")
    life = assemble(client, served[0], trace)
    result = life_result(args, life)
    if args.plot:
        from common.bench.life_plot import plot_life

        plot_life(life, result, args.plot)
    finish(args, result)
    return 0


def requests_for(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The path, and the bodies of what is sent: chats, or token ids where there is no tokenizer."""
    from common.models.checkpoint import resolve
    from common.models.tokenizer import Tokenizer

    names = ["warm-up", "one", *(f"company {n}" for n in range(args.company))]
    lengths = [args.prompt_len] * 2 + [max(args.prompt_len // 4, 1)] * args.company
    outputs = [4, args.output_len] + [4 * args.output_len] * args.company
    common = {"temperature": 0, "ignore_eos": True, "stream": True}
    if Tokenizer.load(resolve(args.model)) is None:
        path = "/v1/completions"
        ids = [
            random_prompts([n], known_vocab_size(args.model), f"life {n} {i}")[0]
            for i, n in enumerate(lengths)
        ]
        prompts: list[dict[str, Any]] = [{"prompt": tokens} for tokens in ids]
    else:
        path = "/v1/chat/completions"
        texts = [random_texts([n], f"life {i}")[0] for i, n in enumerate(lengths)]
        prompts = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    made = {
        name: {**prompt, "max_tokens": count, **common}
        for name, prompt, count in zip(names, prompts, outputs, strict=True)
    }
    made["warm-up"]["stream"] = False
    others = [body for name, body in made.items() if name.startswith("company")]
    return path, {"warm-up": made["warm-up"], "one": made["one"], "company": others}


class Company:
    """Other streams that run meanwhile: [number of events, error] of each, in the end."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self.states: list[list[Any]] = [[0, None] for _ in bodies]
        self.threads = [
            threading.Thread(target=self.read, args=(url, body, state), daemon=True)
            for body, state in zip(bodies, self.states, strict=True)
        ]

    def read(self, url: str, body: dict[str, Any], state: list[Any]) -> None:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
                for _ in answer:
                    state[0] += 1
        except OSError as error:
            state[1] = error

    def __enter__(self) -> list[list[Any]]:
        for thread in self.threads:
            thread.start()
        deadline = time.monotonic() + WAIT_SECONDS
        while not all(count or error for count, error in self.states):
            if time.monotonic() > deadline:
                raise BenchError(f"the company got no token in {WAIT_SECONDS:g} s")
            time.sleep(0.01)
        return self.states

    def __exit__(self, *_: object) -> None:
        for thread in self.threads:
            thread.join()


def stream(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Stream one answer; its id, and the client's times in seconds of `time.perf_counter`."""
    data = json.dumps(body).encode()
    place = urlsplit(url)
    begin = time.perf_counter()
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    connection.connect()
    connected = time.perf_counter()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    sent = time.perf_counter()
    answer = connection.getresponse()
    if answer.status != 200:
        raise BenchError(f"{path}: {answer.status} {answer.read(300).decode(errors='replace')}")
    events = [(time.perf_counter(), line[6:]) for line in answer if line.startswith(b"data: {")]
    end = time.perf_counter()
    connection.close()
    chunks = [(moment, json.loads(line)) for moment, line in events]
    times = [moment for moment, chunk in chunks if has_token(chunk)]
    if not times:
        raise BenchError("the stream had no token")
    return {
        "id": chunks[0][1]["id"],
        "begin": begin,
        "connected": connected,
        "sent": sent,
        "first_token": times[0],
        "end": end,
    }


def has_token(chunk: dict[str, Any]) -> bool:
    """Whether a chunk is more than a chat's opening; a model without a tokenizer has no text."""
    return any("text" in choice or choice["delta"].get("content") for choice in chunk["choices"])


def lives_of(url: str) -> Iterator[dict[str, Any]]:
    """The server's log of requests. It has a request as soon as its last byte has gone."""
    time.sleep(0.2)
    try:
        with urllib.request.urlopen(f"{url}/trace.requests.jsonl") as answer:
            for line in answer:
                yield json.loads(line)
    except OSError as error:
        raise BenchError(f"the part's server has no /trace.requests.jsonl: {error}") from None


def trace_of(url: str) -> Trace:
    with urllib.request.urlopen(f"{url}/trace.jsonl") as answer:
        text = answer.read()
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(text)
        file.flush()
        return Trace.load(Path(file.name))


def assemble(client: dict[str, Any], served: dict[str, Any], trace: Trace) -> Life:
    """The life, from the client's times, the server's log and the engine's trace. Raises BenchError
    where these are not of one clock, or the trace has lost the beginning."""
    [request_id] = served["request_ids"]
    if not client["begin"] <= served["arrived"] <= served["ended"] <= client["end"] + 1:
        raise BenchError("the server's clock is not the client's: their times cannot be compared")
    records = [record for record in trace.records() if request_id in record.scheduled]
    if not records:
        raise BenchError("the engine's trace has lost the request: it was too long ago")
    zero, first = client["begin"], records[0]
    device = {step: (a, b) for r in trace.records() for step, a, b in r.device}
    spans = [
        Span("client", "connect", client["begin"], client["connected"]),
        Span("client", "send", client["connected"], client["sent"]),
        Span("client", "wait", client["sent"], client["first_token"]),
        Span("client", "stream", client["first_token"], client["end"]),
        Span("HTTP", "socket to handler", client["sent"], served["arrived"]),
        Span("HTTP", "read and check JSON", served["arrived"], served["tokenize"]),
        Span("HTTP", "template and tokenise", served["tokenize"], served["tokenized"]),
        Span("HTTP", "hand over", served["tokenized"], served["submitted"]),
        Span("engine", "queue", served["submitted"], first.begin),
    ]
    num_left = sum(served["num_prompt_tokens"]) - sum(
        r.cached.get(request_id, 0) for r in records[:1]
    )
    for record in records:
        count = record.scheduled[request_id]
        name = f"prefill: {count}" if num_left > 0 else "decode"
        num_left -= count
        spans.append(Span("engine", name, record.begin, record.end))
        if record.step in device:
            spans.append(Span("device", name, *device[record.step]))
    tokens = list(stations(served, [record.end for record in trace.records()]))
    for token in tokens:
        spans.append(Span("HTTP", "to the event loop", token["step"], token["taken"]))
        spans.append(Span("HTTP", "detokenise", token["taken"], token["detokenized"]))
        spans.append(Span("HTTP", "JSON, SSE, send", token["detokenized"], token["sent"]))
    moved = [Span(s.track, s.name, s.begin - zero, max(s.end, s.begin) - zero) for s in spans]
    marks = {
        "arrives": served["arrived"],
        "tokenised": served["tokenized"],
        "submitted": served["submitted"],
        "first step": first.begin,
        "first token sent": tokens[0]["sent"],
        "last byte": client["end"],
    }
    own = [{name: value - zero for name, value in token.items()} for token in tokens]
    return Life(moved, {name: value - zero for name, value in marks.items()}, own)


def stations(served: dict[str, Any], step_ends: list[float]) -> Iterator[dict[str, float]]:
    """Of each output: the end of the step that gave it, when the event loop took it, when its text was
    known, and when it had been sent."""
    for taken, detokenized in zip(served["taken"], served["detokenized"], strict=True):
        before = [end for end in step_ends if end <= taken]
        sent = [moment for moment in served["sent"] if moment >= detokenized]
        if before and sent:
            times = {"step": before[-1], "taken": taken}
            yield {**times, "detokenized": detokenized, "sent": sent[0]}


def life_result(args: argparse.Namespace, life: Life) -> dict[str, Any]:
    groups: dict[tuple[str, str], list[Span]] = {}
    for span in life.spans:
        groups.setdefault((span.track, span.name), []).append(span)
    rows = [
        {
            "stage": name,
            "where": track,
            "begin_ms": 1000 * min(span.begin for span in spans),
            "length_ms": 1000 * statistics.median(span.end - span.begin for span in spans),
            "times": len(spans),
        }
        for (track, name), spans in groups.items()
    ]
    rows.sort(key=lambda row: row["begin_ms"])
    first = 1000 * life.marks["first token sent"]
    notes = [
        f"Model {args.model}, part {args.part:02d}: a prompt of about {args.prompt_len} tokens and"
        f" {args.output_len} out, beside {args.company} other streams. The first token had been sent after"
        f" {first:.1f} ms, the last byte had come after {1000 * life.marks['last byte']:.1f} ms. Lengths of"
        " what happens more than once are medians."
    ]
    limits = {"unmeasured": "one request, not a rate"}
    title = "One request's life, from socket to token"
    result = make_result(title, COLUMNS, rows, limits=limits, parts=[args.part], notes=notes)
    result["spans"] = [vars(span) for span in life.spans]
    result["marks"] = life.marks
    return result
