"""What a server counts: requests, tokens and latencies, named as in vLLM so that its dashboards fit.

The engine need not know. Requests and outputs are seen where they pass between the clients and the
engine's thread; the trace's records tell when a request was first scheduled and what a step ran; the
rest is read from the engine's `stats()` when somebody asks. A request's time falls into parts:

    arrived --queue-- scheduled --prefill-- first token --decode-- last token
                      '---------------- inference ----------------'
    '------------------------------- end to end ------------------------------'

Here are plain numbers, each with one writer: `on_step` runs in the engine's thread, all else on the
event loop. So nothing is locked, and a token costs about half a microsecond. `http/metrics_routes.py` writes
them in Prometheus's format.
"""

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.completions import Delta
from common.requests import Request
from common.trace import StepRecord

# fmt: off
LATENCY_BOUNDS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)
TOKEN_GAP_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)
STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES_BOUNDS = (1, 2, 5, 10, 20)
PREEMPTIONS_BOUNDS = (1, 2, 3, 4, 5, 10, 20)
# fmt: on
UP_TO_CONTEXT = ()  # 1, 2, 5, 10, 20, 50, … up to the model's context

# Name -> (what it measures, bounds of the buckets, which are vLLM's).
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", FIRST_TOKEN_BOUNDS),
    "vllm:inter_token_latency_seconds": (
        "Between an output of a request and the one before.",
        TOKEN_GAP_BOUNDS,
    ),
    "vllm:request_time_per_output_token_seconds": (
        "Mean time per token after the first, of requests with two tokens or more.",
        TOKEN_GAP_BOUNDS,
    ),
    "vllm:e2e_request_latency_seconds": ("From arrival to the last token.", LATENCY_BOUNDS),
    "vllm:request_queue_time_seconds": ("From arrival to the first step.", LATENCY_BOUNDS),
    "vllm:request_inference_time_seconds": (
        "From the first step to the last token.",
        LATENCY_BOUNDS,
    ),
    "vllm:request_prefill_time_seconds": (
        "From the first step to the first token.",
        LATENCY_BOUNDS,
    ),
    "vllm:request_decode_time_seconds": (
        "From the first token to the last token.",
        LATENCY_BOUNDS,
    ),
    "vllm:request_prompt_tokens": ("Tokens of a request's prompt.", UP_TO_CONTEXT),
    "vllm:request_generation_tokens": ("Tokens generated for a request.", UP_TO_CONTEXT),
    "vllm:request_max_num_generation_tokens": (
        "Tokens of the longest of a prompt's choices.",
        UP_TO_CONTEXT,
    ),
    "vllm:request_params_n": ("Choices asked for, per prompt.", CHOICES_BOUNDS),
    "vllm:request_params_max_tokens": ("Tokens that a request may generate.", UP_TO_CONTEXT),
    "vllm:iteration_tokens_total": ("Tokens that a step of the engine ran.", STEP_BOUNDS),
}

# Those that only a complete exposition has, as do the counters of tokens by source.
MORE_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "vllm:request_num_preemptions": (
        "Times that a request went back to waiting.",
        PREEMPTIONS_BOUNDS,
    ),
    "vllm:request_prefill_kv_computed_tokens": (
        "Tokens of a request's prompt that were computed, and not found.",
        UP_TO_CONTEXT,
    ),
}
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")  # of a prompt's tokens

COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens of requests that have their first token.",
    "vllm:generation_tokens": "Tokens generated.",
}

Counts = dict[str, list[float]]  # all that an EngineMetrics has counted, by name

FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Reading:
    """A number that the engine keeps: `stats()[key]`, divided by `stats()[per]` if that is given.

    kind: `gauge`, or `counter` for what never falls. An engine without the key has no such metric.
    """

    name: str
    kind: str
    text: str
    key: str
    per: str | None = None


READINGS = (
    Reading("vllm:num_requests_running", "gauge", "Requests that steps run.", "num_running"),
    Reading("vllm:num_requests_waiting", "gauge", "Requests that wait to run.", "num_waiting"),
    Reading(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "KV cache blocks in use; 1 is all of them.",
        "num_used_blocks",
        per="num_blocks",
    ),
    Reading(
        "vllm:num_preemptions",
        "counter",
        "Times that a running request went back to waiting.",
        "num_preemptions",
    ),
    Reading(
        "vllm:prefix_cache_queries",
        "counter",
        "Tokens of requests that the prefix cache was asked for.",
        "num_prefix_cache_queries",
    ),
    Reading(
        "vllm:prefix_cache_hits",
        "counter",
        "Tokens of requests that were found in the prefix cache.",
        "num_prefix_cache_hits",
    ),
    Reading(
        "vllm:external_prefix_cache_queries",
        "counter",
        "Tokens of requests, not in the prefix cache, that were looked for beyond the device.",
        "num_external_queries",
    ),
    Reading(
        "vllm:external_prefix_cache_hits",
        "counter",
        "Tokens of requests that were found beyond the device.",
        "num_host_hits",
    ),
    Reading(
        "vllm:kv_offload_cpu_cache_usage_perc",
        "gauge",
        "Blocks in use in the host's memory; 1 is all of them.",
        "num_used_host_blocks",
        per="num_host_blocks",
    ),
    Reading(
        "engine:swapped_tokens",
        "counter",
        "Tokens of preempted requests whose keys and values went to the host.",
        "num_swapped_tokens",
    ),
    Reading(
        "engine:recomputed_tokens",
        "counter",
        "Tokens that were computed once more after a preemption.",
        "num_recomputed_tokens",
    ),
    Reading("vllm:spec_decode_num_drafts", "counter", "Drafts that were verified.", "num_drafts"),
    Reading(
        "vllm:spec_decode_num_draft_tokens",
        "counter",
        "Tokens of drafts that were verified.",
        "num_draft_tokens",
    ),
    Reading(
        "vllm:spec_decode_num_accepted_tokens",
        "counter",
        "Tokens of drafts that stayed.",
        "num_accepted_tokens",
    ),
    Reading(
        "vllm:spec_decode_draft_acceptance_rate",
        "gauge",
        "Share of the drafts' tokens that stayed, since the start.",
        "num_accepted_tokens",
        per="num_draft_tokens",
    ),
    Reading(
        "vllm:spec_decode_mean_accepted_length",
        "gauge",
        "Tokens of a draft that stayed, on average since the start.",
        "num_accepted_tokens",
        per="num_drafts",
    ),
    Reading(
        "vllm:eplb_balancedness",
        "gauge",
        "Tokens of the mean rank over those of the busiest, as experts lie now; 1 is even.",
        "expert_balancedness",
    ),
    Reading(
        "vllm:eplb_moved_experts",
        "counter",
        "Times that a rank has replaced one of its experts by another.",
        "num_expert_moves",
    ),
    # Of a worker that has prompts computed by others, and of one that computes them.
    Reading("kv_transfer:fetched", "counter", "Prompts that others computed.", "num_kv_fetched"),
    Reading("kv_transfer:tokens", "counter", "Tokens of these prompts.", "num_kv_tokens"),
    Reading(
        "kv_transfer:local",
        "counter",
        "Prompts too short, or too well known here, to ask others for.",
        "num_kv_local",
    ),
    Reading(
        "kv_transfer:failed",
        "counter",
        "Prompts that others were asked for, and that were computed here.",
        "num_kv_failed",
    ),
    Reading("kv_transfer:cancelled", "counter", "Prompts wanted no more.", "num_kv_cancelled"),
    Reading(
        "kv_transfer:queue_seconds",
        "counter",
        "From asking for a prompt to the first layer of its first slice.",
        "kv_seconds_queue",
    ),
    Reading(
        "kv_transfer:prefill_seconds",
        "counter",
        "From there until all of it was computed.",
        "kv_seconds_prefill",
    ),
    Reading(
        "kv_transfer:room_seconds",
        "counter",
        "From there until there were blocks for it.",
        "kv_seconds_room",
    ),
    Reading(
        "kv_transfer:transfer_seconds",
        "counter",
        "From there until all had come.",
        "kv_seconds_transfer",
    ),
    Reading("kv_transfer:held", "gauge", "Prompts that were not fetched yet.", "num_kv_held"),
)

# vLLM's names for what is copied between the device and the host -> ends of the keys of stats().
OFFLOADED = {
    "vllm:kv_offload_total_bytes": ("Bytes copied, by direction.", "bytes"),
    "vllm:kv_offload_total_time": ("Seconds that copies took, by direction.", "seconds"),
}
DIRECTIONS = {"GPU_to_CPU": "save", "CPU_to_GPU": "load"}

# The same under vLLM's newer names, one for each direction -> key of stats().
TRANSFERS = {
    "vllm:kv_offload_store_bytes": ("Bytes copied to the host.", "offload_bytes_save"),
    "vllm:kv_offload_store_time": ("Seconds that these copies took.", "offload_seconds_save"),
    "vllm:kv_offload_load_bytes": ("Bytes copied from the host.", "offload_bytes_load"),
    "vllm:kv_offload_load_time": ("Seconds that these copies took.", "offload_seconds_load"),
}

# Label of vllm:cache_config_info -> key of stats().
CACHE_CONFIG = {"block_size": "block_size", "num_gpu_blocks": "num_blocks"}


class Histogram:
    """How many values fell below each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class _Prompt:
    """What the choices of one prompt have in common."""

    num_tokens: int
    max_tokens: int
    num_choices: int
    num_finished: int = 0
    longest: int = 0  # tokens, of the choices that have finished


@dataclass(slots=True)
class _Request:
    """One choice under way. Times in seconds of `time.perf_counter`, as the trace has them."""

    prompt: _Prompt
    arrived: float
    scheduled: float | None = None
    first_token: float = 0.0
    last_token: float = 0.0
    num_tokens: int = 0
    num_cached: int | None = None  # tokens of its prompt that were there when it first ran
    num_loaded: int = 0  # of these, from beyond the device
    num_preemptions: int = 0


class EngineMetrics:
    """The numbers of one engine behind one server.

    stats: the engine's; called on the event loop while the engine's thread runs.
    max_model_len: the model's context, in tokens.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]], max_model_len: int) -> None:
        self.stats = stats
        self.max_model_len = max_model_len
        lengths = tuple(
            m * 10**p for p in range(8) for m in (1, 2, 5) if m * 10**p <= max_model_len
        )
        self.histograms = {
            name: Histogram(bounds or lengths)
            for name, (_, bounds) in (HISTOGRAMS | MORE_HISTOGRAMS).items()
        }
        self.prompt_sources = dict.fromkeys(SOURCES, 0)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.num_refused = 0  # completions, for want of room
        self.others: Counts = {}  # what other processes have counted for the same engine
        self._requests: dict[str, _Request] = {}
        self._unscheduled: dict[str, _Request] = {}
        self._last_step = -1

    def on_requests(self, requests: Sequence[Request]) -> None:
        """Requests are about to go to the engine: all choices of a prompt one after the other."""
        now = time.perf_counter()
        starts = [i for i, request in enumerate(requests) if request.choice == 0]
        for start, end in itertools.pairwise([*starts, len(requests)]):
            first = requests[start]
            num_tokens = len(first.prompt_token_ids)
            prompt = _Prompt(num_tokens, first.limit(self.max_model_len) - num_tokens, end - start)
            for request in requests[start:end]:
                entry = _Request(prompt, now)
                self._requests[request.request_id] = self._unscheduled[request.request_id] = entry

    def on_step(self, record: StepRecord | None) -> None:
        """In the engine's thread, before a step's outputs are handed over: what the step ran."""
        if record is None or record.step <= self._last_step:
            return
        self._last_step = record.step
        if record.scheduled:
            num_tokens = sum(record.scheduled.values())
            self._observe("vllm:iteration_tokens_total", num_tokens)
        self.on_scheduled(record)

    def on_scheduled(self, record: StepRecord | None) -> None:
        """Of `on_step` what concerns the requests of this process: another counts the steps."""
        if record is None:
            return
        if self._unscheduled:
            for request_id in record.scheduled:
                if request := self._unscheduled.pop(request_id, None):
                    request.scheduled = record.begin
        for request_id, count in record.loaded.items():
            if (request := self._requests.get(request_id)) and request.num_cached is None:
                request.num_loaded += count
        for request_id, count in record.cached.items():
            if (request := self._requests.get(request_id)) and request.num_cached is None:
                request.num_cached = count
        for request_id in record.preempted:
            if request := self._requests.get(request_id):
                request.num_preemptions += 1

    def on_refused(self, count: int) -> None:
        """So many completions were refused for want of room."""
        self.num_refused += count

    def on_output(self, request_id: str, delta: Delta) -> None:
        """New tokens of a request leave for its client; with a finish reason they are its last."""
        request = self._requests.get(request_id)
        if request is None:
            return
        now = time.perf_counter()
        if delta.token_ids:
            if not request.num_tokens:
                request.first_token = now
                self._count_prompt(request)
                self._observe("vllm:time_to_first_token_seconds", now - request.arrived)
            else:
                self._observe("vllm:inter_token_latency_seconds", now - request.last_token)
            request.last_token = now
            request.num_tokens += len(delta.token_ids)
            self.counters["vllm:generation_tokens"] += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._forget(request_id)
            self.finished[delta.finish_reason] += 1
            if delta.finish_reason in ("stop", "length"):
                self._finish(request)

    def on_close(self, request_id: str) -> None:
        """Nobody waits for a request any more: unless it has finished, it is aborted."""
        if request_id in self._requests:
            self._forget(request_id)
            self.finished["abort"] += 1

    def counts(self) -> Counts:
        """All that was counted until now."""
        histograms = {name: [*one.counts, one.sum] for name, one in self.histograms.items()}
        counters = {name: [value] for name, value in self.counters.items()}
        more = {
            "finished": list(self.finished.values()),
            "sources": list(self.prompt_sources.values()),
            "refused": [self.num_refused],
        }
        return {**histograms, **counters, **more}

    def total(self) -> "EngineMetrics":
        """With what the others have counted."""
        if not self.others:
            return self
        both = EngineMetrics(self.stats, self.max_model_len)
        sums = {
            name: [own + other for own, other in zip(values, self.others[name], strict=True)]
            for name, values in self.counts().items()
        }
        for name, histogram in both.histograms.items():
            *counts, histogram.sum = sums[name]
            histogram.counts = [int(count) for count in counts]
        both.counters = {name: sums[name][0] for name in self.counters}
        both.finished = dict(zip(self.finished, sums["finished"], strict=True))
        both.prompt_sources = dict(zip(self.prompt_sources, sums["sources"], strict=True))
        [both.num_refused] = sums["refused"]
        return both

    def _forget(self, request_id: str) -> None:
        del self._requests[request_id]
        self._unscheduled.pop(request_id, None)

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def _count_prompt(self, request: _Request) -> None:
        """Its tokens count when its first output token leaves, by where their keys and values are from."""
        num_tokens, num_cached = request.prompt.num_tokens, request.num_cached or 0
        num_loaded = min(request.num_loaded, num_cached)
        self.counters["vllm:prompt_tokens"] += num_tokens
        counts = (num_tokens - num_cached, num_cached - num_loaded, num_loaded)
        for source, count in zip(SOURCES, counts, strict=True):
            self.prompt_sources[source] += count

    def _finish(self, request: _Request) -> None:
        """What is known of a request only at its end; one that broke off would distort it."""
        prompt = request.prompt
        decode = request.last_token - request.first_token
        self._observe("vllm:e2e_request_latency_seconds", request.last_token - request.arrived)
        self._observe("vllm:request_decode_time_seconds", decode)
        if request.num_tokens > 1:
            per_token = decode / (request.num_tokens - 1)
            self._observe("vllm:request_time_per_output_token_seconds", per_token)
        if request.scheduled is not None:
            begin = request.scheduled
            self._observe("vllm:request_queue_time_seconds", begin - request.arrived)
            self._observe("vllm:request_prefill_time_seconds", request.first_token - begin)
            self._observe("vllm:request_inference_time_seconds", request.last_token - begin)
        self._observe("vllm:request_prompt_tokens", prompt.num_tokens)
        self._observe("vllm:request_generation_tokens", request.num_tokens)
        self._observe("vllm:request_params_max_tokens", prompt.max_tokens)
        self._observe("vllm:request_num_preemptions", request.num_preemptions)
        num_computed = prompt.num_tokens - (request.num_cached or 0)
        self._observe("vllm:request_prefill_kv_computed_tokens", num_computed)
        prompt.num_finished += 1
        prompt.longest = max(prompt.longest, request.num_tokens)
        if prompt.num_finished == prompt.num_choices:
            self._observe("vllm:request_params_n", prompt.num_choices)
            self._observe("vllm:request_max_num_generation_tokens", prompt.longest)
