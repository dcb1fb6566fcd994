"""`GET /metrics` of part 15 against vLLM's list of metrics; HTTP requests counted; lives logged."""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from common.completions import Delta
from common.http import request_log
from common.http.app import Admission
from common.http.errors import ApiError
from common.http.metrics_routes import make_registry, render
from common.http.run import ServerConfig
from common.metrics import SOURCES, EngineMetrics
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.http import raw_request, send
from common.testing.parts import engine_of, module_of
from common.testing.server import serving_thread
from common.trace import StepRecord, Trace
from common.vllm_metrics import ABSENT, CACHE_CONFIG_INFO, HAD, HAD_WITH, OWN, VllmMetric

MODEL = "random:tiny-llama"
EVERYTHING = {"speculative": "ngram", "offload": "both", "prefix_cache": "hash"}
HAD_ALL = [*HAD, CACHE_CONFIG_INFO, *(metric for some in HAD_WITH.values() for metric in some)]


class Server:
    """Part 15's app over a tiny model."""

    def __init__(self, url: str, engine: Any) -> None:
        self.url, self.engine = url, engine

    def families(self) -> dict[str, Any]:
        text = httpx.get(f"{self.url}/metrics").text
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series of that name with these labels."""
        samples = [s for family in self.families().values() for s in family.samples]
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def complete(self, **body: Any) -> httpx.Response:
        body = {"temperature": 0, "ignore_eos": True, "max_tokens": 6, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def lives(self) -> list[dict[str, Any]]:
        text = httpx.get(f"{self.url}/trace.requests.jsonl").text
        return [json.loads(line) for line in text.splitlines()]


def serve(config: ServerConfig, **flags: Any) -> Iterator[Server]:
    engine = engine_of(15, MODEL, threads=1, **flags)
    with serving_thread(module_of(15, "server").create_app(engine, config)) as url:
        yield Server(url, engine)


@pytest.fixture(scope="module")
def everything() -> Iterator[Server]:
    for server in serve(ServerConfig(port=0), **EVERYTHING):
        for _ in range(2):
            assert server.complete(prompt=[5, 6, 7] * 20).status_code == 200
        yield server


@pytest.fixture(scope="module")
def families(everything: Server) -> dict[str, Any]:
    """One scrape, with everything on."""
    return everything.families()


@pytest.fixture
def plain() -> Iterator[Server]:
    yield from serve(ServerConfig(port=0))


# vLLM's list


def labels_of(family: Any) -> set[str]:
    """Labels of a family's series, without those that its type brings."""
    names = [set(s.labels) for s in family.samples if not s.name.endswith("_created")]
    assert names, f"{family.name} has no series"
    own = {"histogram": {"le"}, "summary": {"quantile"}}.get(family.type, set())
    return set.union(*names) - own


def family_name(metric: VllmMetric) -> str:
    """As the parser has it: without what prometheus_client adds to a counter."""
    return metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name


@pytest.mark.parametrize("metric", HAD_ALL, ids=lambda metric: metric.name)
def test_what_the_table_has_the_server_has(families: dict[str, Any], metric: VllmMetric) -> None:
    family = families.get(family_name(metric))
    assert family is not None, f"{metric.name} is not exported"
    assert family.type == metric.kind
    assert labels_of(family) == metric.labels


def test_nothing_under_vllms_prefix_is_missing_in_the_table(families: dict[str, Any]) -> None:
    known = {family_name(metric) for metric in HAD_ALL} | OWN
    ours = {name for name in families if name.startswith("vllm:")}
    assert {name for name in ours if not name.endswith("_created")} <= known


def test_what_is_absent_is_absent_and_says_why(families: dict[str, Any]) -> None:
    assert len({metric.name for metric in [*HAD_ALL, *ABSENT]}) == len(HAD_ALL) + len(ABSENT)
    for metric in ABSENT:
        assert family_name(metric) not in families, f"{metric.name} is there: say so"
        assert metric.absent.endswith("."), metric.name
        assert metric.kind in ("counter", "gauge", "histogram"), metric
    assert all(not metric.absent for metric in HAD_ALL)


def test_what_needs_a_technique_is_there_with_it_alone(plain: Server) -> None:
    families = plain.families()
    assert not {family_name(metric) for metric in HAD_WITH["speculation"]} & set(families)
    assert {family_name(m) for m in HAD if not m.name.startswith("http")} <= set(families)


def test_the_text_is_openmetrics_too(everything: Server) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
    text = httpx.get(f"{everything.url}/metrics", headers=accept).text
    families = {family.name for family in openmetrics.text_string_to_metric_families(text)}
    assert {"http_requests", "vllm:prompt_tokens_by_source"} <= families
    assert "\nvllm:sleep_mode_operations_in_flight{" in text and "vllm_" not in text


def test_earlier_parts_have_what_they_had() -> None:
    """Without an admission the exposition is the plain one."""
    metrics = EngineMetrics(lambda: {"num_waiting": 3, "num_loading": 2}, 100)
    plain = render(make_registry(metrics, "m"), "")[0].decode()
    assert "num_preemptions" not in plain and "by_source" not in plain
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 3.0' in plain
    metrics.on_refused(7)
    complete = render(make_registry(metrics, "m", complete=True), "")[0].decode()
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 5.0' in complete
    assert re.search(r"waiting_by_reason\{.*reason=\"deferred\"\} 2\.0", complete)
    assert re.search(r"admission_rejections_total\{.*\} 7\.0", complete)


# Where a prompt's tokens came from, and how often a request was preempted


class Played:
    """Metrics of an engine that the test plays."""

    def __init__(self) -> None:
        self.metrics, self.step_number = EngineMetrics(dict, 1000), 0

    def request(self, request_id: str, length: int) -> None:
        request = Request(request_id, [1] * length, SamplingParams(max_tokens=9))
        self.metrics.on_requests([request])

    def step(self, **happened: Any) -> None:
        self.metrics.on_step(StepRecord(self.step_number, 0.0, **happened))
        self.step_number += 1

    def output(self, request_id: str, reason: str | None = None) -> None:
        self.metrics.on_output(request_id, Delta("", [5], finish_reason=reason))

    def sums(self, name: str) -> tuple[float, int]:
        histogram = self.metrics.histograms[f"vllm:{name}"]
        return histogram.sum, sum(histogram.counts)


def test_prompt_tokens_by_source() -> None:
    played = Played()
    played.request("computed", 10)
    played.request("found", 20)
    played.request("fetched", 30)
    played.step(cached={"computed": 0, "found": 16}, scheduled={"computed": 10, "found": 4})
    played.step(loaded={"fetched": 13}, cached={"fetched": 29}, scheduled={"fetched": 1})
    for name in ("computed", "found", "fetched"):
        assert (
            sum(played.metrics.prompt_sources.values())
            == played.metrics.counters["vllm:prompt_tokens"]
        )
        played.output(name)
    counts = dict(zip(SOURCES, (10 + 4 + 1, 16 + 16, 13), strict=True))
    assert played.metrics.prompt_sources == counts
    for name in ("computed", "found", "fetched"):
        played.output(name, "length")
    assert played.sums("request_prefill_kv_computed_tokens") == (15, 3)
    assert played.sums("request_num_preemptions") == (0, 3)


def test_a_preemption_is_no_second_prompt() -> None:
    """What is found when a request comes back was computed for it before."""
    played = Played()
    played.request("a", 10)
    played.step(cached={"a": 0}, scheduled={"a": 10})
    played.output("a")
    played.step(preempted=["a"])
    played.step(loaded={"a": 8}, cached={"a": 8}, scheduled={"a": 3})
    played.step(preempted=["a"])
    played.step(cached={"a": 0}, scheduled={"a": 11})
    played.output("a", "stop")
    assert played.metrics.prompt_sources == dict(zip(SOURCES, (10, 0, 0), strict=True))
    assert played.sums("request_num_preemptions") == (2, 1)
    assert played.sums("request_prefill_kv_computed_tokens") == (10, 1)
    played.step(preempted=["a"], cached={"b": 4})  # of requests that nobody knows


def test_numbers_agree_with_a_real_engine(everything: Server) -> None:
    """The same prompt again: what the prefix cache found is no longer computed."""
    sources = {
        name: everything.value("vllm:prompt_tokens_by_source_total", source=name)
        for name in SOURCES
    }
    assert sum(sources.values()) == everything.value("vllm:prompt_tokens_total")
    assert sources["local_cache_hit"] == everything.value("vllm:prompt_tokens_cached_total") > 0
    by_tier = everything.value("vllm:prompt_tokens_cached_by_source_total")
    hits = everything.value("vllm:prefix_cache_hits_total")
    assert by_tier == hits + everything.value("vllm:external_prefix_cache_hits_total")
    per_place = everything.value("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    assert per_place == everything.value("vllm:spec_decode_num_accepted_tokens_total")


def test_accepted_tokens_by_place() -> None:
    """Of three drafts of four tokens, two, none and all of the tokens stay."""
    speculator = module_of(15, "speculative").Speculator(None, 4, Trace())
    speculator.lengths = SimpleNamespace(observe=lambda *_: None)
    request = Request("a", [5, 6], SamplingParams())
    for num_accepted in (2, 0, 4):
        sequence = module_of(15, "sequence").Sequence(request, 0, frozenset(), 100)
        sequence.draft_token_ids = speculator.proposed[sequence] = [1, 2, 3, 4]
        speculator.settle([sequence], [[9] * (num_accepted + 1)])
    stats = speculator.stats()
    assert stats["num_accepted_at"] == [2, 2, 1, 1]
    assert sum(stats["num_accepted_at"]) == stats["num_accepted_tokens"] == 6


def test_what_the_host_gave_is_external() -> None:
    """A prefix that was evicted to the host and came back: counted once, by its source."""
    flags = {"num_blocks": 12, "block_size": 4, "offload": "prefix", "host_kv_memory": 1 << 20}
    for server in serve(ServerConfig(port=0), **flags):
        prompts = [[i] * 24 for i in range(5, 11)]
        for prompt in [*prompts, *prompts]:
            assert server.complete(prompt=prompt, max_tokens=2).status_code == 200
        stats = server.engine.stats()
        assert stats["num_host_hits"] > 0, "the test's own premise"
        loaded = server.value("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
        assert loaded == stats["num_host_hits"]
        total = server.value("vllm:prompt_tokens_by_source_total")
        assert total == server.value("vllm:prompt_tokens_total") == 2 * 6 * 24


# HTTP requests


def test_requests_are_counted_by_handler(plain: Server) -> None:
    assert plain.complete(prompt=[5, 6]).status_code == 200
    assert plain.complete(prompt=[10**6]).status_code == 400
    assert plain.complete(prompt=[5, 6], stream=True).status_code == 200
    assert httpx.get(f"{plain.url}/made/up/path").status_code == 404
    assert httpx.get(f"{plain.url}/health").status_code == 200
    completions = {"handler": "/v1/completions", "method": "POST"}
    assert plain.value("http_requests_total", status="2xx", **completions) == 2
    assert plain.value("http_requests_total", status="4xx", **completions) == 1
    assert plain.value("http_requests_total", handler="none") == 1
    assert plain.value("http_request_duration_seconds_count", **completions) == 3
    assert plain.value("http_request_duration_highr_seconds_count") == 4
    assert plain.value("http_request_size_bytes_sum", handler="/v1/completions") > 3 * 50
    handlers = {s.labels["handler"] for s in plain.families()["http_requests"].samples}
    assert handlers == {"/v1/completions", "none"}, "health and metrics are not counted"


def test_clients_make_up_no_labels(plain: Server) -> None:
    """Paths and methods that nobody serves share one series: memory is bounded."""
    for i in range(30):
        send(plain.url, raw_request(f"METHOD{i}", f"/path/{i}"))
    samples = plain.families()["http_requests"].samples
    assert {s.labels["method"] for s in samples} == {"other"}
    assert {s.labels["handler"] for s in samples} == {"none"}


def test_refused_requests_are_counted() -> None:
    """Of the key, before any route; of the full server, as completions."""
    flags = {"max_num_seqs": 1}
    for server in serve(ServerConfig(port=0, api_key="secret", max_waiting=1), **flags):
        assert server.complete(prompt=[5]).status_code == 401
        header = {"Authorization": "Bearer secret"}
        body = {"prompt": [5], "n": 3, "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=header)
        assert answer.status_code == 400, "more than there is room for at all is another error"
        server_text = httpx.get(f"{server.url}/metrics", headers=header).text
        assert re.search(r'http_requests_total\{.*status="4xx"\} 1\.0', server_text)
        assert re.search(r"admission_rejections_total\{.*\} 0\.0", server_text)


def test_completions_without_room_are_counted() -> None:
    admission, refused = Admission(4), []
    admission.on_refused = refused.append
    with admission.admit(3):
        for _ in range(2):
            with pytest.raises(ApiError, match="the server is full"):
                admission.check(2)
        admission.check(1)
        with pytest.raises(ApiError, match="n times"):  # the request is wrong, not the moment
            admission.check(5)
    admission.check(4)
    assert refused == [2, 2]


def test_sleeping_is_timed(plain: Server) -> None:
    name = "vllm:sleep_mode_operation_duration_seconds_count"
    assert plain.value(name) == 0
    assert httpx.post(f"{plain.url}/sleep", timeout=60).status_code == 200
    assert httpx.post(f"{plain.url}/wake_up", timeout=60).status_code == 200
    assert plain.value(name, operation="sleep") == plain.value(name, operation="wake") == 1
    assert plain.value("vllm:sleep_mode_operations_in_flight") == 0


# Lives


def test_a_life_has_its_stages_in_order(plain: Server) -> None:
    assert plain.complete(prompt=[[5, 6, 7], [8, 9]], max_tokens=5, stream=True).status_code == 200
    assert plain.complete(prompt=[10**6]).status_code == 400  # leaves no life
    assert plain.complete(prompt=[4] * 9, max_tokens=3).status_code == 200
    streamed, whole = plain.lives()
    assert streamed["stream"] and streamed["num_prompt_tokens"] == [3, 2]
    assert len(streamed["request_ids"]) == 2 and len(streamed["taken"]) >= 5
    assert not whole["stream"] and len(whole["sent"]) == 1 and whole["status"] == 200
    for life in (streamed, whole):
        stages = [life[name] for name in ("arrived", "read", "tokenize", "tokenized", "submitted")]
        stages += [life["taken"][0], life["detokenized"][0], life["sent"][-1], life["ended"]]
        assert stages == sorted(stages)
        assert life["taken"] == sorted(life["taken"]) and life["sent"] == sorted(life["sent"])
        assert all(a <= b for a, b in zip(life["taken"], life["detokenized"], strict=True))
    # The same clock as the engine's trace: the first step that ran it lies in between.
    [first] = [r for r in plain.engine.trace.records() if whole["request_ids"][0] in r.arrived]
    assert whole["submitted"] <= first.end <= whole["taken"][0] or first.scheduled == {}


def test_lives_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, however many requests there were."""
    monkeypatch.setattr(request_log, "CAPACITY", 2)
    for server in serve(ServerConfig(port=0)):
        for length in (3, 4, 5):
            server.complete(prompt=[7] * length, max_tokens=1)
        assert [life["num_prompt_tokens"] for life in server.lives()] == [[4], [5]]


def test_the_log_needs_the_key() -> None:
    for server in serve(ServerConfig(port=0, api_key="secret")):
        assert httpx.get(f"{server.url}/trace.requests.jsonl").status_code == 401
