"""`GET /metrics`: an engine's numbers and the process's own, in the formats Prometheus reads."""

from collections.abc import Iterator
from itertools import accumulate

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
    OFFLOADED,
    READINGS,
    EngineMetrics,
)

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"

LABELS = ["model_name", "engine"]
ENGINE = "0"  # one engine behind a server
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # by level


class EngineCollector(Collector):
    """Reads an engine's numbers whenever its registry is asked for them."""

    def __init__(self, metrics: EngineMetrics, model_name: str) -> None:
        self.metrics = metrics
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
        for name, histogram in metrics.histograms.items():
            family = HistogramMetricFamily(name, HISTOGRAMS[name][0], labels=LABELS)
            bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
            counts = accumulate(histogram.counts)
            family.add_metric(self.values, list(zip(bounds, counts, strict=True)), histogram.sum)
            yield family

    def _readings(self) -> Iterator[Metric]:
        """What the engine's `stats()` says."""
        stats = self.metrics.stats()
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


def make_registry(
    metrics: EngineMetrics, model_name: str, own_process: bool = True
) -> CollectorRegistry:
    """A registry of its own for each app, beside which others may live in the process.

    own_process: with what this process uses. It is one of several where the next scrape may meet another.
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(metrics, model_name))
    if not own_process:
        return registry
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """What the registry holds, and its content type: OpenMetrics for those who accept it."""
    if OPENMETRICS in accept:
        return openmetrics.generate_latest(registry), openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), TEXT
