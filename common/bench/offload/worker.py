"""The fresh process behind `offload`: one engine, requests that depend on each other, its counters.

Run as `python -m common.bench.offload.worker`; the frame is that of `common.bench.core.worker`.
"""

import sys
from typing import Any

from common.bench import BenchError
from common.bench.core.worker import JOBS, engine_facts, main, start_engine
from common.bench.prefix.requests import Request
from common.bench.prefix.worker import Driver, warm_up_requests

COUNTERS = (
    "num_preemptions", "num_recomputed_tokens", "num_swapped_tokens", "num_prefix_cache_queries",
    "num_prefix_cache_hits", "num_host_hits", "num_disk_hits", "offload_bytes_save",
    "offload_bytes_load", "offload_seconds_save", "offload_seconds_load",
)  # fmt: skip


class GapDriver(Driver):
    """A driver that also notes the longest time between two of a request's outputs, in seconds."""

    def take(self, output: Any, now: float) -> None:
        record = self.records.get(output.request_id)
        super().take(output, now)
        if record is None:
            self.records[output.request_id] |= {"last": now, "gap_s": 0.0}
        elif output.token_ids:
            record["gap_s"] = max(record["gap_s"], now - record["last"])
            record["last"] = now


def offload_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "vocab_size", "requests"} -> seconds, records by request, what
    the engine's counters said (without the warm-up), seconds of its start, facts.

    The warm-up has other tokens, and its blocks are those that are evicted first.
    """
    engine, config, started = start_engine(job)
    requests = [Request(**values) for values in job["requests"]]
    Driver(engine, warm_up_requests(requests, job["vocab_size"])).run()
    before = engine.stats()
    driver = GapDriver(engine, requests)
    seconds = driver.run()
    after = engine.stats()
    engine.check_integrity()
    facts = engine_facts(engine, config)
    token_bytes = engine.kv.num_bytes // (engine.kv.num_blocks * engine.kv.block_size)
    engine.shutdown()
    counters = {name: after[name] - before[name] for name in COUNTERS if name in after}
    answer = {"seconds": seconds, "records": driver.records, "counters": counters, **facts}
    return answer | {"construct_s": started["construct_s"], "token_bytes": token_bytes}


if __name__ == "__main__":
    JOBS["offload"] = offload_job
    try:
        main()
    except BenchError as error:
        sys.exit(str(error))
