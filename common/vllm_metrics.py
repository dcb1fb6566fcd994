"""vLLM's metrics, name by name: which of them the server has, and why it does not have the others.

The names are from the source of vLLM 0.32.0, the version that the benchmarks compare with; its
documentation lists most of them. Names are those of metric families: Prometheus shows a counter's
samples with `_total` at the end. `*` stands for the labels of an engine's metrics, `model_name` and
`engine`. `tests/test_part15_metrics.py` compares this table with what a running server gives out.
"""

from typing import NamedTuple

VERSION = "0.32.0"
ENGINE_LABELS = ("model_name", "engine")


class VllmMetric(NamedTuple):
    """A metric family of vLLM. absent: why the server does not have it; empty where it does."""

    name: str
    kind: str
    labels: frozenset[str]
    absent: str = ""


def _read(text: str, absent: str = "") -> list[VllmMetric]:
    """text: lines of a name, a type and labels."""
    metrics = []
    for line in text.strip().splitlines():
        name, kind, *labels = line.split()
        if labels[:1] == ["*"]:
            labels[:1] = ENGINE_LABELS
        metrics.append(VllmMetric(name, kind, frozenset(labels), absent))
    return metrics


HAD = _read("""
vllm:num_requests_running gauge *
vllm:num_requests_waiting gauge *
vllm:num_requests_waiting_by_reason gauge * reason
vllm:engine_sleep_state gauge * sleep_state
vllm:kv_cache_usage_perc gauge *
vllm:prefix_cache_queries counter *
vllm:prefix_cache_hits counter *
vllm:external_prefix_cache_queries counter *
vllm:external_prefix_cache_hits counter *
vllm:num_preemptions counter *
vllm:prompt_tokens counter *
vllm:prompt_tokens_by_source counter * source
vllm:prompt_tokens_cached counter *
vllm:prompt_tokens_cached_by_source counter * source
vllm:generation_tokens counter *
vllm:request_success counter * finished_reason
vllm:admission_rejections counter model_name reason
vllm:request_prompt_tokens histogram *
vllm:request_generation_tokens histogram *
vllm:iteration_tokens_total histogram *
vllm:request_max_num_generation_tokens histogram *
vllm:request_params_n histogram *
vllm:request_params_max_tokens histogram *
vllm:time_to_first_token_seconds histogram *
vllm:inter_token_latency_seconds histogram *
vllm:request_time_per_output_token_seconds histogram *
vllm:e2e_request_latency_seconds histogram *
vllm:request_queue_time_seconds histogram *
vllm:request_inference_time_seconds histogram *
vllm:request_prefill_time_seconds histogram *
vllm:request_decode_time_seconds histogram *
vllm:request_num_preemptions histogram *
vllm:request_prefill_kv_computed_tokens histogram *
vllm:sleep_mode_operation_duration_seconds histogram operation
vllm:sleep_mode_operations_in_flight gauge operation
http_requests counter handler method status
http_request_size_bytes summary handler
http_response_size_bytes summary handler
http_request_duration_highr_seconds histogram
http_request_duration_seconds histogram handler method
""")

# Shown when their technique is on, as in vLLM.
HAD_WITH = {
    "speculation": _read("""
vllm:spec_decode_num_drafts counter *
vllm:spec_decode_num_draft_tokens counter *
vllm:spec_decode_num_accepted_tokens counter *
vllm:spec_decode_num_accepted_tokens_per_pos counter * position
"""),
    "offload": _read("""
vllm:kv_offload_load_bytes counter *
vllm:kv_offload_load_time counter *
vllm:kv_offload_store_bytes counter *
vllm:kv_offload_store_time counter *
vllm:kv_offload_total_bytes counter * transfer_type
vllm:kv_offload_total_time counter * transfer_type
vllm:kv_offload_cpu_cache_usage_perc gauge *
"""),
}

# In vLLM its labels are the fields of the cache configuration; these are the ones shown here.
CACHE_CONFIG_INFO = VllmMetric(
    "vllm:cache_config_info", "gauge", frozenset({"block_size", "num_gpu_blocks", "engine"})
)

ABSENT = [
    *_read(
        "vllm:corrupted_requests counter *",
        "A request whose logits are NaN ends with the reason error, in vllm:request_success.",
    ),
    *_read(
        "vllm:num_requests_kv_fetch_by_stage gauge * stage",
        "The seconds of each stage are kv_transfer:queue_seconds and its fellows.",
    ),
    *_read(
        """
vllm:estimated_flops_per_gpu_total counter *
vllm:estimated_read_bytes_per_gpu_total counter *
vllm:estimated_write_bytes_per_gpu_total counter *
""",
        "python -m common.bench measures MFU and MBU against the machine's limits, outside of serving.",
    ),
    *_read(
        """
vllm:kv_block_lifetime_seconds histogram *
vllm:kv_block_idle_before_evict_seconds histogram *
vllm:kv_block_reuse_gap_seconds histogram *
""",
        "Off in vLLM by default: a sample of blocks would have to be followed step by step. The trace"
        " has each block's owners.",
    ),
    *_read(
        """
vllm:kv_offload_size histogram * transfer_type
vllm:kv_offload_load_size histogram *
vllm:kv_offload_store_size histogram *
vllm:kv_offload_lookup_sync_delay_seconds histogram *
vllm:kv_offload_lookup_async_delay_seconds histogram *
vllm:kv_offload_allocation_failure counter *
vllm:kv_offload_stores_skipped counter *
vllm:kv_offload_cpu_allocation_size histogram *
vllm:kv_offload_cpu_cache_write_usage_perc gauge *
vllm:kv_offload_cpu_cache_read_usage_perc gauge *
""",
        "The host tier counts bytes, seconds, tokens and blocks in use, and not single copies or"
        " lookups.",
    ),
    *_read(
        """
vllm:kv_offload_tiering_lookup_sync_delay_seconds histogram * tier
vllm:kv_offload_tiering_lookup_async_delay_seconds histogram * tier
vllm:kv_offload_tiering_read_bytes counter * tier
vllm:kv_offload_tiering_read_time counter * tier
vllm:kv_offload_tiering_write_bytes counter * tier
vllm:kv_offload_tiering_write_time counter * tier
vllm:kv_offload_tiering_promotion_job_failures counter * tier
vllm:kv_offload_tiering_cascade_job_failures counter * tier
vllm:kv_offload_tiering_chunk_queries counter * tier
vllm:kv_offload_tiering_chunk_hits counter * tier
vllm:kv_offload_tiering_primary_write_usage_perc gauge * tier
vllm:kv_offload_tiering_primary_read_usage_perc gauge * tier
vllm:kv_offload_tiering_promotion_allocation_failures counter *
vllm:kv_offload_tiering_active_promotion_jobs gauge * tier
vllm:kv_offload_tiering_active_cascade_jobs gauge * tier
vllm:kv_offload_tiering_backpressure_store_latency_ema gauge * tier
vllm:kv_offload_tiering_backpressure_stores_dropped counter * tier
vllm:kv_offload_tiering_backpressure_blocks_dropped counter * tier
vllm:simple_kv_offload_save_outcomes_total counter * outcome
vllm:simple_kv_offload_load_blocks_total counter *
vllm:simple_kv_offload_used_blocks gauge *
vllm:simple_kv_offload_pending_store_blocks gauge *
vllm:simple_kv_offload_info gauge * backend page_cache lazy_offload capacity_blocks
""",
        "Of other designs of offloading. Here the disk is a part of the host tier, which counts it.",
    ),
    *_read(
        """
vllm:nixl_xfer_time_seconds histogram *
vllm:nixl_post_time_seconds histogram *
vllm:nixl_bytes_transferred histogram *
vllm:nixl_num_descriptors histogram *
vllm:nixl_num_failed_transfers counter *
vllm:nixl_num_failed_notifications counter *
vllm:nixl_num_kv_expired_reqs counter *
vllm:nixl_num_notifications_after_expiry counter *
""",
        "kv_transfer:* counts prompts, tokens, failures and seconds for every transport, NIXL's too.",
    ),
    *_read(
        """
vllm:mooncake_store_operation_time_seconds histogram * operation status
vllm:mooncake_store_operation_total counter * operation status
vllm:mooncake_store_operation_keys_total counter * operation status
vllm:mooncake_store_operation_bytes_total counter * operation status
vllm:mooncake_store_operation_failed_keys_total counter * operation status
vllm:hf3fs_save_duration_seconds histogram *
vllm:hf3fs_load_duration_seconds histogram *
vllm:hf3fs_num_failed_save counter *
vllm:hf3fs_num_failed_load counter *
vllm:hisparse_cache_hits counter *
vllm:hisparse_cache_misses counter *
vllm:hisparse_host_to_device_bytes counter *
vllm:hisparse_host_cache_usage_perc gauge *
vllm:hisparse_pending_page_transfers gauge *
vllm:hisparse_host_block_lifetime_seconds histogram *
vllm:hisparse_host_block_idle_before_evict_seconds histogram *
vllm:hisparse_host_block_reuse_gap_seconds histogram *
""",
        "Of KV connectors that are not here.",
    ),
    *_read(
        "vllm:tool_call_parser_invocations_total counter model_name mode outcome request_type",
        "Tool calls are seen in answers and not counted.",
    ),
    *_read(
        """
vllm:mm_cache_queries counter *
vllm:mm_cache_hits counter *
vllm:websocket_connections_active gauge
vllm:websocket_connections_total counter
vllm:websocket_connection_duration_seconds histogram
""",
        "Text only, and no WebSockets.",
    ),
    *_read(
        """
vllm:diffusion_num_denoising_steps counter *
vllm:diffusion_num_canvas_positions counter *
vllm:diffusion_num_committed_tokens counter *
""",
        "No models that generate by diffusion.",
    ),
    *_read(
        "vllm:lora_requests_info gauge max_lora waiting_lora_adapters running_lora_adapters",
        "No LoRA adapters.",
    ),
    *_read("vllm:watermark_requests counter * status", "No watermarks."),
    *_read(
        """
vllm:rl_weight_update_operation_duration_seconds histogram operation
vllm:rl_weight_update_operations_in_flight gauge operation
""",
        "Weights are not updated while serving.",
    ),
]

# Under vLLM's prefix, but not in its 0.32.0: names of older versions, or in their manner.
OWN = {
    "vllm:spec_decode_draft_acceptance_rate",
    "vllm:spec_decode_mean_accepted_length",
    "vllm:eplb_balancedness",
    "vllm:eplb_moved_experts",
}
