"""What `GET /metrics` says: vLLM's names and types, and numbers that agree with what happened.

First the counting alone, on a clock that the test moves, so that times are exact; then the text
that Prometheus reads; then every part that has the route, under concurrent requests.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import common.metrics as metrics_module
from common.completions import Delta
from common.http.app import Frontend
from common.http.metrics_routes import OPENMETRICS, TEXT, make_registry, render
from common.http.run import ServerConfig
from common.metrics import EngineMetrics
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.http import raw_request, send
from common.testing.parts import PARTS, engine_of, module_of, wrap_model
from common.testing.server import serving_thread
from common.trace import StepRecord

MODEL = "random:tiny-llama"
WIRED = [part for part in PARTS if part >= 4]
SECONDS = 60.0  # for what must happen to happen

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {"num_preemptions", "prompt_tokens", "generation_tokens"}
REQUEST_TIMES = {  # one value for each request that finishes
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
}
REQUEST_SIZES = {"request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"}
PROMPT_SIZES = {"request_params_n", "request_max_num_generation_tokens"}  # one for each prompt
OTHER_HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "iteration_tokens_total",
}
HISTOGRAMS = REQUEST_TIMES | REQUEST_SIZES | PROMPT_SIZES | OTHER_HISTOGRAMS
DASHBOARD = {  # the series that the panels of vLLM's own dashboard ask for
    *(GAUGES | {f"{name}_total" for name in ("prompt_tokens", "generation_tokens")}),
    *(f"e2e_request_latency_seconds_{end}" for end in ("bucket", "sum", "count")),
    *(f"time_to_first_token_seconds_{end}" for end in ("bucket", "sum", "count")),
    *(f"inter_token_latency_seconds_{end}" for end in ("bucket", "sum", "count")),
    *(f"request_{name}_bucket" for name in ("prompt_tokens", "generation_tokens")),
    *(f"request_{name}_time_seconds_sum" for name in ("queue", "prefill", "decode")),
    "request_max_num_generation_tokens_sum",
    "request_success_total",
}

STATS = {
    "num_running": 3,
    "num_waiting": 2,
    "num_preemptions": 7,
    "num_blocks": 40,
    "num_used_blocks": 10,
    "block_size": 16,
}


class Sample:
    """One scrape: each series' value by its name and labels, and each family's type."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.series: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in self.families.values():
            for sample in family.samples:
                self.series.setdefault(sample.name, []).append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series of a name (without `vllm:`) that have these labels."""
        series = self.series[f"vllm:{name}"]
        found = [value for have, value in series if labels.items() <= have.items()]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def finished(self, *reasons: str) -> float:
        return sum(self.value("request_success_total", finished_reason=r) for r in reasons)

    def growing(self) -> dict[str, list[float]]:
        """The values of every series that may only grow, by name."""
        names = {
            sample.name
            for family in self.families.values()
            for sample in family.samples
            if family.type in ("counter", "histogram")
        }
        return {name: [value for _, value in self.series[name]] for name in names}

    def check(self, before: "Sample | None" = None) -> None:
        """What must hold in every scrape, and after an earlier one."""
        done = self.finished("stop", "length")
        for name in HISTOGRAMS:
            bounds = [float(labels["le"]) for labels, _ in self.series[f"vllm:{name}_bucket"]]
            counts = [count for _, count in self.series[f"vllm:{name}_bucket"]]
            assert bounds == sorted(set(bounds)) and bounds[-1] == float("inf"), name
            assert counts == sorted(counts) and counts[-1] == self.value(f"{name}_count"), name
        for name in REQUEST_TIMES | REQUEST_SIZES:
            assert self.value(f"{name}_count") == done, name
        for name in PROMPT_SIZES:
            assert self.value(f"{name}_count") <= done, name
        outputs = self.value("time_to_first_token_seconds_count")
        outputs += self.value("inter_token_latency_seconds_count")
        assert done <= outputs <= self.value("generation_tokens_total")
        queue = self.value("request_queue_time_seconds_sum")
        prefill = self.value("request_prefill_time_seconds_sum")
        decode = self.value("request_decode_time_seconds_sum")
        inference = self.value("request_inference_time_seconds_sum")
        assert min(queue, prefill, decode) >= 0
        assert inference == pytest.approx(prefill + decode)
        assert self.value("e2e_request_latency_seconds_sum") == pytest.approx(queue + inference)
        if before is not None:
            now = self.growing()
            for name, values in before.growing().items():
                pairs = zip(values, now[name], strict=True)
                assert all(old <= new for old, new in pairs), f"{name} fell"


class Bench:
    """Metrics of an engine that the test plays."""

    def __init__(self, max_model_len: int = 100) -> None:
        self.now, self.step_number = 1000.0, 0
        self.metrics = EngineMetrics(lambda: dict(STATS), max_model_len)
        self.registry = make_registry(self.metrics, "a model")

    def request(self, ids: str, lengths: tuple[int, ...] = (4,), **params: Any) -> None:
        values = SamplingParams(**params)
        choices = [(length, choice) for length in lengths for choice in range(values.n)]
        requests = [
            Request(request_id, [1] * length, values.for_choice(choice), choice)
            for request_id, (length, choice) in zip(ids.split(), choices, strict=True)
        ]
        self.metrics.on_requests(requests)

    def step(self, **scheduled: int) -> None:
        begin = metrics_module.time.perf_counter()
        self.metrics.on_step(StepRecord(self.step_number, begin, scheduled=scheduled))
        self.step_number += 1

    def output(self, request_id: str, count: int = 1, reason: str | None = None) -> None:
        self.metrics.on_output(request_id, Delta("", [5] * count, finish_reason=reason))

    def sample(self) -> Sample:
        content, _ = render(self.registry, "")
        return Sample(content.decode())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: bench.now))
    return bench


# The counting.


def test_the_parts_of_a_requests_time(bench: Bench) -> None:
    bench.request("a")
    bench.now += 2  # it waits
    bench.step(a=4)
    bench.now += 3  # the prefill
    bench.output("a")
    for _ in range(4):
        bench.now += 0.25
        bench.step(a=1)
        bench.output("a")
    bench.now += 0.25
    bench.output("a", reason="length")
    sample = bench.sample()
    sample.check()
    sums = {
        "request_queue_time_seconds": 2,
        "request_prefill_time_seconds": 3,
        "request_decode_time_seconds": 1.25,
        "request_inference_time_seconds": 4.25,
        "e2e_request_latency_seconds": 6.25,
        "time_to_first_token_seconds": 5,
        "inter_token_latency_seconds": 1.25,
        "request_time_per_output_token_seconds": 0.25,
        "request_prompt_tokens": 4,
        "request_generation_tokens": 6,
        "iteration_tokens_total": 8,
    }
    assert {name: sample.value(f"{name}_sum") for name in sums} == pytest.approx(sums)
    assert sample.value("inter_token_latency_seconds_count") == 5
    assert sample.value("inter_token_latency_seconds_bucket", le="0.2") == 0
    assert sample.value("inter_token_latency_seconds_bucket", le="0.3") == 5
    assert sample.value("iteration_tokens_total_count") == 5


def test_a_value_on_a_bound_belongs_below_it(bench: Bench) -> None:
    bench.request("a", max_tokens=20)
    bench.step(a=16)
    bench.output("a", reason="stop")
    sample = bench.sample()
    assert sample.value("iteration_tokens_total_bucket", le="8.0") == 0
    assert sample.value("iteration_tokens_total_bucket", le="16.0") == 1
    assert sample.value("request_params_max_tokens_bucket", le="10.0") == 0
    assert sample.value("request_params_max_tokens_bucket", le="20.0") == 1
    assert sample.value("e2e_request_latency_seconds_bucket", le="0.3") == 1


def test_a_request_is_scheduled_once(bench: Bench) -> None:
    """After a preemption it waits again: that time is no longer its queue time."""
    bench.request("a")
    bench.now += 1
    bench.step(a=4)
    bench.now += 5
    bench.step(a=5)
    bench.output("a", reason="length")
    sample = bench.sample()
    assert sample.value("request_queue_time_seconds_sum") == pytest.approx(1)
    assert sample.value("request_prefill_time_seconds_sum") == pytest.approx(5)


def test_a_record_counts_once(bench: Bench) -> None:
    record = StepRecord(0, 0.0, scheduled={"x": 3})
    for seen in (None, record, record, StepRecord(1, 0.0), StepRecord(2, 0.0, scheduled={"x": 1})):
        bench.metrics.on_step(seen)
    sample = bench.sample()
    assert sample.value("iteration_tokens_total_count") == 2, "an idle step ran nothing"
    assert sample.value("iteration_tokens_total_sum") == 4


def test_choices_and_prompts(bench: Bench) -> None:
    """Each choice is a request; what a client asked for counts once for each prompt."""
    bench.request("a0 a1 a2 b0 b1 b2", lengths=(3, 5), n=3, max_tokens=9)
    bench.step(a0=3, a1=3, a2=3, b0=5, b1=5, b2=5)
    for index, request_id in enumerate(("a0", "a1", "a2", "b0", "b1")):
        bench.output(request_id, count=index + 1, reason="stop")
    sample = bench.sample()
    assert sample.value("request_params_n_count") == 1, "a choice of the second prompt still runs"
    bench.output("b2", count=2, reason="length")
    sample = bench.sample()
    sample.check()
    assert sample.finished("stop") == 5 and sample.finished("length") == 1
    assert sample.value("prompt_tokens_total") == 3 * 3 + 3 * 5
    assert sample.value("generation_tokens_total") == 1 + 2 + 3 + 4 + 5 + 2
    assert sample.value("request_params_n_count") == 2
    assert sample.value("request_params_n_sum") == 6
    assert sample.value("request_max_num_generation_tokens_sum") == 3 + 5
    assert sample.value("request_params_max_tokens_sum") == 6 * 9


def test_no_limit_is_what_is_left_of_the_context(bench: Bench) -> None:
    bench.request("a", lengths=(30,), max_tokens=None)
    bench.step(a=30)
    bench.output("a", reason="stop")
    assert bench.sample().value("request_params_max_tokens_sum") == 100 - 30


def test_one_token_has_no_time_per_token(bench: Bench) -> None:
    bench.request("a")
    bench.step(a=4)
    bench.output("a", reason="length")
    sample = bench.sample()
    sample.check()
    assert sample.value("request_time_per_output_token_seconds_count") == 0
    assert sample.value("inter_token_latency_seconds_count") == 0


def test_several_tokens_at_once(bench: Bench) -> None:
    """They share one gap, as in vLLM; the mean time per token is of tokens."""
    bench.request("a")
    bench.step(a=4)
    bench.output("a")
    bench.now += 3
    bench.output("a", count=4, reason="length")
    sample = bench.sample()
    assert sample.value("inter_token_latency_seconds_count") == 1
    assert sample.value("inter_token_latency_seconds_sum") == pytest.approx(3)
    per_token = sample.value("request_time_per_output_token_seconds_sum")
    assert per_token == pytest.approx(0.75)


def test_an_output_without_tokens_may_be_the_last(bench: Bench) -> None:
    bench.request("a")
    bench.step(a=4)
    bench.now += 1
    bench.output("a", count=3)
    bench.now += 1
    bench.output("a", count=0)
    bench.output("a", count=0, reason="length")
    sample = bench.sample()
    sample.check()
    assert sample.value("generation_tokens_total") == 3
    assert sample.value("e2e_request_latency_seconds_sum") == pytest.approx(1)


@pytest.mark.parametrize("moment", ["waiting", "scheduled", "decoding"])
@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_breaks_off(bench: Bench, moment: str, reason: str) -> None:
    """It counts under its reason, its tokens count; it says nothing of how long requests take."""
    bench.request("a b", n=2)
    if moment != "waiting":
        bench.step(a=4)
    if moment == "decoding":
        bench.output("a", count=2)
    if reason == "abort":
        bench.metrics.on_close("a")
    else:
        bench.output("a", count=0, reason="error")
    for _ in range(2):  # closing what has ended changes nothing
        bench.metrics.on_close("a")
    bench.output("a", count=5, reason="stop")  # too late
    sample = bench.sample()
    sample.check()
    assert sample.finished(reason) == sample.finished("stop", "length", "abort", "error") == 1
    decoding = moment == "decoding"
    assert sample.value("generation_tokens_total") == 2 * decoding
    assert sample.value("time_to_first_token_seconds_count") == decoding
    assert sample.value("prompt_tokens_total") == 4 * decoding
    bench.step(b=4)
    bench.output("b", reason="stop")
    sample = bench.sample()
    assert sample.finished("stop") == 1
    assert sample.value("request_params_n_count") == 0, "one of the two choices was never made"
    assert not bench.metrics._requests and not bench.metrics._unscheduled


class Machine(RuleBasedStateMachine):
    """Requests, steps, outputs and aborts in any order: nothing falls, nothing is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(max_model_len=200)  # room for each: others never come so far
        self.open: dict[str, int] = {}  # request -> tokens so far
        self.scheduled: set[str] = set()
        self.num_requests = self.num_tokens = 0
        self.last: Sample | None = None

    @rule(num_prompts=st.integers(1, 3), n=st.integers(1, 3), length=st.integers(1, 120))
    def request(self, num_prompts: int, n: int, length: int) -> None:
        ids = [f"r{self.num_requests + i}" for i in range(num_prompts * n)]
        self.bench.request(" ".join(ids), lengths=(length,) * num_prompts, n=n)
        self.open |= dict.fromkeys(ids, 0)
        self.num_requests += len(ids)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.open))))
        self.bench.step(**dict.fromkeys(sorted(ids), 3))
        self.scheduled |= ids

    @precondition(lambda self: self.scheduled)
    @rule(data=st.data(), count=st.integers(1, 4), reason=st.sampled_from([None, "stop", "length"]))
    def output(self, data: st.DataObject, count: int, reason: str | None) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduled)))
        self.bench.output(request_id, count, reason)
        self.open[request_id] += count
        self.num_tokens += count
        if reason is not None:
            self.forget(request_id)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), is_error=st.booleans())
    def break_off(self, data: st.DataObject, is_error: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        if is_error:
            self.bench.output(request_id, 0, "error")
        self.bench.metrics.on_close(request_id)
        self.forget(request_id)

    def forget(self, request_id: str) -> None:
        del self.open[request_id]
        self.scheduled.discard(request_id)

    @invariant()
    def consistent(self) -> None:
        sample = self.bench.sample()
        sample.check(self.last)
        self.last = sample
        ended = sample.finished("stop", "length", "abort", "error")
        assert ended == self.num_requests - len(self.open)
        assert sample.value("generation_tokens_total") == self.num_tokens
        assert set(self.bench.metrics._requests) == set(self.open)
        assert set(self.bench.metrics._unscheduled) == set(self.open) - self.scheduled


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
test_any_order = Machine.TestCase


def test_the_check_can_fail(bench: Bench) -> None:
    """Its own control: a scrape that lost a request, a counter that fell, a bucket that shrank."""
    bench.request("a")
    bench.step(a=4)
    bench.output("a", reason="stop")
    before = bench.sample()
    before.check()
    bench.metrics.counters["vllm:prompt_tokens"] -= 1
    with pytest.raises(AssertionError, match="prompt_tokens_total"):
        bench.sample().check(before)
    bench.metrics.counters["vllm:prompt_tokens"] += 1
    bench.metrics.finished["stop"] += 1
    with pytest.raises(AssertionError):
        bench.sample().check()
    bench.metrics.finished["stop"] -= 1
    bench.metrics.histograms["vllm:request_queue_time_seconds"].sum += 1
    with pytest.raises(AssertionError):
        bench.sample().check()


# The text.


def test_names_types_and_labels_are_vllms(bench: Bench) -> None:
    sample = bench.sample()
    types = {
        name.removeprefix("vllm:"): family.type
        for name, family in sample.families.items()
        if name.startswith("vllm:")
    }
    assert types == {
        **dict.fromkeys(GAUGES | {"cache_config_info"}, "gauge"),
        **dict.fromkeys(COUNTERS | {"request_success"}, "counter"),
        **dict.fromkeys(HISTOGRAMS, "histogram"),
    }
    assert {f"vllm:{name}" for name in DASHBOARD} <= set(sample.series)
    for name, labels in ((n, have) for n, series in sample.series.items() for have, _ in series):
        if name.startswith("vllm:"):
            extra = {
                "vllm:request_success_total": {"finished_reason"},
                "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
            }.get(name, set())
            extra |= {"le"} if name.endswith("_bucket") else set()
            is_info = name == "vllm:cache_config_info"
            assert set(labels) == extra | {"engine"} | (set() if is_info else {"model_name"}), name
            assert labels["engine"] == "0" and labels.get("model_name") in ("a model", None)
    process = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
    assert process <= set(sample.series)


def test_what_the_engine_says_is_read_at_each_scrape(bench: Bench) -> None:
    stats = dict(STATS)
    bench.metrics.stats = lambda: stats
    sample = bench.sample()
    assert sample.value("num_requests_running") == 3
    assert sample.value("num_requests_waiting") == 2
    assert sample.value("kv_cache_usage_perc") == 0.25
    assert sample.value("num_preemptions_total") == 7
    assert sample.value("cache_config_info", block_size="16", num_gpu_blocks="40") == 1
    stats |= {"num_running": 0, "num_used_blocks": 40}
    sample = bench.sample()
    assert sample.value("num_requests_running") == 0
    assert sample.value("kv_cache_usage_perc") == 1
    stats.clear()  # an engine that keeps none of it
    assert not set(bench.sample().series) & {"vllm:num_requests_running", "vllm:cache_config_info"}


def test_token_buckets_end_at_the_context() -> None:
    bench = Bench(max_model_len=2048)
    buckets = bench.sample().series["vllm:request_prompt_tokens_bucket"]
    bounds = [labels["le"] for labels, _ in buckets]
    assert bounds[:4] == ["1.0", "2.0", "5.0", "10.0"] and bounds[-2:] == ["2000.0", "+Inf"]
    assert len(bounds) == 12


def test_a_models_name_is_escaped() -> None:
    name = 'odd "name" \\ with\na line é'
    content, _ = render(make_registry(EngineMetrics(lambda: dict(STATS), 100), name), "")
    assert Sample(content.decode()).value("num_requests_running", model_name=name) == 3


def test_two_apps_in_one_process(bench: Bench) -> None:
    other = Bench()
    bench.request("a")
    bench.step(a=4)
    bench.output("a", reason="stop")
    assert bench.sample().finished("stop") == 1
    assert other.sample().finished("stop") == 0


class StubEngine:
    config = SimpleNamespace(model="stub")
    tokenizer = None
    max_model_len, vocab_size = 100, 50


def client(**config: Any) -> TestClient:
    frontend = Frontend(StubEngine(), ServerConfig(**config), streaming=True, max_n=1)
    frontend.add_metrics(EngineMetrics(lambda: dict(STATS), 100))
    return TestClient(frontend.app, base_url="http://127.0.0.1")


def test_the_route_speaks_both_formats() -> None:
    get = client(served_model_name="named").get
    plain = get("/metrics")
    assert (plain.status_code, plain.headers["content-type"]) == (200, TEXT)
    assert Sample(plain.text).value("num_requests_running", model_name="named") == 3
    prometheus = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    )
    answer = get("/metrics", headers={"Accept": prometheus})
    assert answer.headers["content-type"].startswith(f"{OPENMETRICS}; version=1.0.0")
    families = {family.name for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert {"vllm:prompt_tokens", "vllm:iteration_tokens_total"} <= families
    samples = {re.split("[{ ]", line)[0] for line in answer.text.splitlines() if line[:1] != "#"}
    assert "vllm:prompt_tokens_total" in samples, "a name's colon is no character to escape"
    assert not any(name.startswith("vllm_") for name in samples)
    with pytest.raises(ValueError):  # the parser does look
        list(openmetrics.text_string_to_metric_families(plain.text))


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "nonsense",
        "text/plain; version=é",
        "application/openmetrics-text; version=x",
        ";",
    ],
)
def test_any_accept_header_is_answered(accept: str) -> None:
    answer = client().get("/metrics", headers={"Accept": accept.encode("latin-1")})
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] in ("text/plain", OPENMETRICS)


def test_the_route_needs_the_key() -> None:
    get = client(api_key="secret").get
    assert get("/metrics").status_code == 401
    assert get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_counting_needs_no_prometheus() -> None:
    """A machine that only runs engines may lack it."""
    modules = ["common.metrics", *(f"part{part:02d}.async_engine" for part in WIRED)]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'prometheus_client' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The parts.


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so. Raises AssertionError when it never is."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.005)


class Served:
    """A part's app in a thread, with the engine that stands behind it."""

    def __init__(self, part: int, url: str, engine: Any) -> None:
        self.part, self.url, self.engine = part, url, engine
        self.begin = self.scrape()
        last = engine.trace.last_record
        self.first_step = 0 if last is None else last.step + 1

    def scrape(self) -> Sample:
        answer = httpx.get(f"{self.url}/metrics", timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        return Sample(answer.text)

    def post(self, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and usage of a completion."""
        body = {"temperature": 0, "ignore_eos": True, **body}
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=SECONDS)
        text = answer.text
        if body.get("stream"):
            text = text.rpartition("data: [DONE]")[0].strip().rpartition("data: ")[2]
        return answer.status_code, json.loads(text).get("usage")

    def records(self) -> list[StepRecord]:
        """The steps since the beginning."""
        return [r for r in self.engine.trace.records() if r.step >= self.first_step]

    def watch(self, is_over: threading.Event) -> int:
        """Scrape again and again, and check each scrape after the one before; how many."""
        samples = [self.begin]
        while not is_over.is_set():
            samples.append(self.scrape())
            samples[-1].check(samples[-2])
        return len(samples) - 1

    def until_ended(self, count: int) -> Sample:
        """The scrape in which that many requests have ended since the beginning."""
        reasons = ("stop", "length", "abort", "error")
        ended = self.begin.finished(*reasons) + count
        until(lambda: self.scrape().finished(*reasons) >= ended, f"{count} requests ended")
        sample = self.scrape()
        sample.check(self.begin)
        return sample


@pytest.fixture(params=WIRED, ids=lambda part: f"part{part:02d}")
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(request.param) as served:
        yield served


@contextlib.contextmanager
def serve(part: int, **flags: Any) -> Iterator[Served]:
    engine = engine_of(part, MODEL, threads=1, **flags)
    app = module_of(part, "server").create_app(engine, ServerConfig(port=0))
    with serving_thread(app) as url:
        yield Served(part, url, engine)


def grown(served: Served, sample: Sample, name: str, **labels: str) -> float:
    """By how much a metric grew since the beginning."""
    return sample.value(name, **labels) - served.begin.value(name, **labels)


BODIES: list[dict[str, Any]] = [
    {"prompt": [5, 6, 7], "max_tokens": 1},
    {"prompt": [5, 6, 7, 8], "max_tokens": 12, "stream": True},
    {"prompt": [[9], [10, 11, 12, 13, 14]], "max_tokens": 7},
    {"prompt": [3, 4], "max_tokens": 5, "n": 3, "temperature": 1, "seed": 1},
    {"prompt": [[3, 4], [8]], "max_tokens": 6, "n": 2, "temperature": 1, "stream": True},
]


def prompts_of(body: dict[str, Any]) -> list[list[int]]:
    return body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]


def test_numbers_agree_with_the_answers(served: Served) -> None:
    bodies, is_over = BODIES * 3, threading.Event()
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        watching = pool.submit(served.watch, is_over)
        try:
            answers = list(pool.map(lambda body: served.post(**body), bodies))
        finally:
            is_over.set()
        assert watching.result() > 0
    assert [status for status, _ in answers] == [200] * len(bodies)
    num_choices = sum(len(prompts_of(body)) * body.get("n", 1) for body in bodies)
    sample = served.until_ended(num_choices)

    assert grown(served, sample, "request_success_total", finished_reason="length") == num_choices
    generated = sum(usage["completion_tokens"] for _, usage in answers)
    assert grown(served, sample, "generation_tokens_total") == generated
    assert grown(served, sample, "request_generation_tokens_sum") == generated
    prompt_tokens = sum(sum(map(len, prompts_of(b))) * b.get("n", 1) for b in bodies)
    assert grown(served, sample, "prompt_tokens_total") == prompt_tokens
    assert grown(served, sample, "request_prompt_tokens_sum") == prompt_tokens
    num_prompts = sum(len(prompts_of(body)) for body in bodies)
    asked = sum(len(prompts_of(b)) * b.get("n", 1) for b in bodies)
    for name in PROMPT_SIZES:
        assert grown(served, sample, f"{name}_count") == num_prompts
    assert grown(served, sample, "request_params_n_sum") == asked
    most = sum(len(prompts_of(b)) * b.get("n", 1) * b["max_tokens"] for b in bodies)
    assert grown(served, sample, "request_params_max_tokens_sum") == most
    longer = sum(len(prompts_of(b)) * b.get("n", 1) for b in bodies if b["max_tokens"] > 1)
    assert grown(served, sample, "request_time_per_output_token_seconds_count") == longer
    assert grown(served, sample, "time_to_first_token_seconds_count") == num_choices

    records = [record for record in served.records() if record.scheduled]
    assert grown(served, sample, "iteration_tokens_total_count") == len(records)
    ran = sum(sum(record.scheduled.values()) for record in records)
    assert grown(served, sample, "iteration_tokens_total_sum") == ran
    assert sample.value("num_requests_running") == sample.value("num_requests_waiting") == 0
    stats = served.engine.stats()
    labels = {"block_size": str(stats["block_size"]), "num_gpu_blocks": str(stats["num_blocks"])}
    assert sample.value("cache_config_info", **labels) == 1


class Gate:
    """Stands before each forward of the model and lets through as many as it is told."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.num_arrived = 0

        def gated(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
            self.num_arrived += 1
            if not self._is_open:
                assert self._permits.acquire(timeout=SECONDS), "nobody opened the gate"
            return real()

        wrap_model(engine, monkeypatch, gated)

    def let(self, count: int) -> None:
        arrived = self.num_arrived
        self._permits.release(count)
        until(lambda: self.num_arrived >= arrived + count, "the next forward")

    def open(self) -> None:
        self._is_open = True
        self._permits.release(1)


def test_a_scrape_during_generation(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(served.engine, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, prompt=[5, 6, 7], max_tokens=40)
        until(lambda: gate.num_arrived, "the first forward")
        sample = served.scrape()
        sample.check(served.begin)
        assert sample.value("num_requests_running") == 1
        assert sample.value("kv_cache_usage_perc") > 0
        assert grown(served, sample, "generation_tokens_total") == 0
        gate.let(5)
        count = "inter_token_latency_seconds_count"
        until(lambda: grown(served, served.scrape(), count) >= 2, "tokens have left")
        sample = served.scrape()
        sample.check(served.begin)
        assert grown(served, sample, "time_to_first_token_seconds_count") == 1
        assert 3 <= grown(served, sample, "generation_tokens_total") < 40
        assert grown(served, sample, "e2e_request_latency_seconds_count") == 0
        gate.open()
        assert answer.result()[0] == 200
    sample = served.until_ended(1)
    assert grown(served, sample, "generation_tokens_total") == 40
    until(lambda: served.scrape().value("num_requests_running") == 0, "nobody running")


def test_a_client_that_goes_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(served.engine, monkeypatch)
    body = {"prompt": [5, 6, 7], "max_tokens": 50, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=SECONDS) as answer:
        until(lambda: gate.num_arrived, "the first forward")
        gate.let(3)
        assert next(answer.iter_lines())
    sample = served.until_ended(1)
    gate.open()
    assert grown(served, sample, "request_success_total", finished_reason="abort") == 1
    assert grown(served, sample, "e2e_request_latency_seconds_count") == 0
    assert grown(served, sample, "request_params_n_count") == 0
    assert grown(served, sample, "generation_tokens_total") >= 1
    until(lambda: not served.engine.has_unfinished(), "the engine idle")


def test_a_step_that_fails(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        raise RuntimeError("a test's")

    with monkeypatch.context() as patch:
        wrap_model(served.engine, patch, fail)
        status, _ = served.post(prompt=[[5, 6], [7]], max_tokens=4)
    assert status == 500
    sample = served.until_ended(2)
    assert grown(served, sample, "request_success_total", finished_reason="error") == 2
    assert served.post(prompt=[5, 6], max_tokens=4)[0] == 200
    sample = served.until_ended(3)
    assert grown(served, sample, "request_success_total", finished_reason="length") == 1


def test_a_refused_request_is_none(served: Served) -> None:
    assert served.post(prompt=[5, 6], max_tokens=0)[0] == 400
    assert served.post(prompt=[10**6], max_tokens=4)[0] == 400
    assert served.post(prompt=[5, 6], max_tokens=1)[0] == 200
    sample = served.until_ended(1)
    assert grown(served, sample, "request_success_total") == 1


@pytest.mark.parametrize("part", WIRED)
def test_preemptions_are_counted(part: int) -> None:
    """Too few blocks for all: some are preempted, and each prompt still counts once."""
    with serve(part, num_blocks=8, block_size=4, max_num_seqs=4) as served:
        bodies = [{"prompt": [i, i + 1, i + 2], "max_tokens": 20} for i in range(5, 9)]
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: served.post(**body), bodies))
        assert [status for status, _ in answers] == [200] * 4
        sample = served.until_ended(4)
        preempted = sum(len(record.preempted) for record in served.records())
        assert preempted > 0, "the test's own premise"
        assert grown(served, sample, "num_preemptions_total") == preempted
        assert grown(served, sample, "prompt_tokens_total") == 12
        assert grown(served, sample, "generation_tokens_total") == 80


@pytest.mark.parametrize("part", WIRED)
def test_the_parts_route_needs_the_key(part: int) -> None:
    config = ServerConfig(port=0, api_key="secret")
    app = module_of(part, "server").create_app(engine_of(part, MODEL, threads=1), config)
    with serving_thread(app) as url:
        for header, status in ((), 401), (("Authorization: Bearer secret",), 200):
            assert send(url, raw_request("GET", "/metrics", *header))[0] == status
