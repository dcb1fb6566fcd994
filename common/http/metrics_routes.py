"""`GET /metrics`: an engine's numbers and the process's own, in the formats Prometheus reads."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from common.metrics import (
    CACHE_CONFIG,
    COUNTERS,
    DIRECTIONS,
    HISTOGRAMS,
    MORE_HISTOGRAMS,
    OFFLOADED,
    READINGS,
    TRANSFERS,
    EngineMetrics,
)

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"

LABELS = ["model_name", "engine"]
ENGINE = "0"  # one engine behind a server
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level


class EngineCollector(Collector):
    """Reads an engine's numbers whenever its registry is asked for them.

    complete: with all that `common/vllm_metrics.py` lists as had.
    """

    def __init__(self, metrics: EngineMetrics, model_name: str, complete: bool = False) -> None:
        self.metrics, self.complete = metrics, complete
        self.values = [model_name, ENGINE]

    def collect(self) -> Iterator[Metric]:
        metrics = self.metrics.total()
        yield from self._readings()
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self.values, metrics.counters[name])
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success",
            "Requests that ended, by how.",
            labels=[*LABELS, "finished_reason"],
        )
        for reason, count in metrics.finished.items():
            finished.add_metric([*self.values, reason], count)
        yield finished
        shown = HISTOGRAMS
        if self.complete:
            shown = HISTOGRAMS | MORE_HISTOGRAMS
            yield from self._frontends(metrics)
        for name, (text, _) in shown.items():
            histogram = metrics.histograms[name]
            family = HistogramMetricFamily(name, text, labels=LABELS)
            bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
            counts = accumulate(histogram.counts)
            family.add_metric(self.values, list(zip(bounds, counts, strict=True)), histogram.sum)
            yield family

    def _frontends(self, metrics: EngineMetrics) -> Iterator[Metric]:
        """What is known on this side of the engine, beyond `COUNTERS`."""
        sources = metrics.prompt_sources
        by_source = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens that were computed, found here, or came from elsewhere.",
            labels=[*LABELS, "source"],
        )
        for source, count in sources.items():
            by_source.add_metric([*self.values, source], count)
        cached = CounterMetricFamily(
            "vllm:prompt_tokens_cached", "Prompt tokens that were not computed.", labels=LABELS
        )
        cached.add_metric(self.values, sum(sources.values()) - sources["local_compute"])
        refused = CounterMetricFamily(
            "vllm:admission_rejections",
            "Completions that were refused for want of room.",
            labels=["model_name", "reason"],
        )
        refused.add_metric([self.values[0], "max_num_queued_reqs"], metrics.num_refused)
        yield from (by_source, cached, refused)

    def _more_readings(self, stats: dict[str, Any]) -> Iterator[Metric]:
        """What vLLM tells apart by a label of its own."""
        for name, text, kind, label, numbers in labelled(stats):
            family = kind(name, text, labels=[*LABELS, label])
            for value, number in numbers.items():
                family.add_metric([*self.values, value], number)
            yield family
        for name, (text, key) in TRANSFERS.items():
            if key in stats:
                counter = CounterMetricFamily(name, text, labels=LABELS)
                counter.add_metric(self.values, stats[key])
                yield counter

    def _readings(self) -> Iterator[Metric]:
        """What the engine's `stats()` says."""
        stats = self.metrics.stats()
        if self.complete:
            stats = with_defaults(stats)
            yield from self._more_readings(stats)
        for reading in READINGS:
            if reading.key in stats:
                kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
                family = kinds[reading.kind](reading.name, reading.text, labels=LABELS)
                unit = stats[reading.per] if reading.per is not None else 1
                family.add_metric(self.values, stats[reading.key] / (unit or 1))
                yield family
        if "offload_bytes_save" in stats:
            for name, (text, key) in OFFLOADED.items():
                family = CounterMetricFamily(name, text, labels=[*LABELS, "transfer_type"])
                for direction, end in DIRECTIONS.items():
                    family.add_metric([*self.values, direction], stats[f"offload_{key}_{end}"])
                yield family
        if "sleep_level" in stats:
            yield self._sleep_state(stats["sleep_level"])
        if all(key in stats for key in CACHE_CONFIG.values()):
            info = GaugeMetricFamily(
                "vllm:cache_config_info",
                "How the KV cache is laid out; the value is 1.",
                labels=[*CACHE_CONFIG, "engine"],
            )
            info.add_metric([*(str(stats[key]) for key in CACHE_CONFIG.values()), ENGINE], 1)
            yield info

    def _sleep_state(self, level: int) -> Metric:
        text = "Whether the engine is awake, sleeps at level 1, or at level 2; of three one is 1."
        labels = [*LABELS, "sleep_state"]
        family = GaugeMetricFamily("vllm:engine_sleep_state", text, labels=labels)
        for state, name in enumerate(SLEEP_STATES):
            family.add_metric([*self.values, name], int(state == level))
        return family


def with_defaults(stats: dict[str, Any]) -> dict[str, Any]:
    """As vLLM counts: a request that waits for keys and values waits, what came from other workers
    was found beyond the device, and what an engine does not have it has had none of."""
    num_loading, num_fetched = stats.get("num_loading", 0), stats.get("num_kv_tokens", 0)
    return stats | {
        "num_waiting": stats["num_waiting"] + num_loading,
        "num_external_queries": stats.get("num_external_queries", 0) + num_fetched,
        "num_host_hits": stats.get("num_host_hits", 0) + num_fetched,
        "waiting_by_reason": {"capacity": stats["num_waiting"], "deferred": num_loading},
        "hits_by_source": {
            "device": stats.get("num_prefix_cache_hits", 0),
            "host": stats.get("num_host_hits", 0),  # also what it had on its disk
            "p2p": num_fetched,
        },
    }


def labelled(stats: dict[str, Any]) -> Iterator[tuple[str, str, Any, str, dict[str, float]]]:
    """(name, what it measures, class of its family, label, number by the label's value)."""
    yield (
        "vllm:num_requests_waiting_by_reason",
        "Requests that wait for room (capacity), or for keys and values (deferred).",
        GaugeMetricFamily,
        "reason",
        stats["waiting_by_reason"],
    )
    yield (
        "vllm:prompt_tokens_cached_by_source",
        "Tokens that were found, by what held their keys and values.",
        CounterMetricFamily,
        "source",
        stats["hits_by_source"],
    )
    if "num_accepted_at" in stats:
        yield (
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that stayed, by their place in the draft.",
            CounterMetricFamily,
            "position",
            {str(place): count for place, count in enumerate(stats["num_accepted_at"])},
        )


def make_registry(
    metrics: EngineMetrics, model_name: str, complete: bool = False, own_process: bool = True
) -> CollectorRegistry:
    """A registry of its own for each app, beside which others may live in the process.

    complete: as `EngineCollector` has it. own_process: with what this process uses. It is one of several
    where the next scrape may meet another.
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(metrics, model_name, complete))
    if not own_process:
        return registry
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """What the registry holds, and its content type: OpenMetrics for those who accept it."""
    if OPENMETRICS in accept:
        content = openmetrics.generate_latest(registry, escaping=openmetrics.ALLOWUTF8)
        return content, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), TEXT
