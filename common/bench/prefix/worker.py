"""The fresh process behind `prefix`: drives engines through workloads, one JSON job in, one answer out.

Run as `python -m common.bench.prefix.worker`; the frame is that of `common.bench.core.worker`.
"""

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from common.bench import BenchError
from common.bench.core.worker import JOBS, engine_facts, main, start_engine
from common.bench.core.workload import random_prompts
from common.bench.prefix.requests import Request

COUNTERS = ("num_preemptions", "num_prefix_cache_queries", "num_prefix_cache_hits")


class Driver:
    """Hands requests to an engine when those that they depend on have ended, and notes what comes.

    records, by request id: ttft_s, seconds from handing it over to its first token; prompt_tokens;
    cached_tokens, how many of these the engine found in its cache; token_ids, the output.
    """

    def __init__(
        self,
        engine: Any,
        requests: list[Request],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine, self.clock = engine, clock
        self.records: dict[str, dict[str, Any]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.begins: dict[str, float] = {}
        self.requests = {request.request_id: request for request in requests}
        self.waiting: dict[str | None, list[Request]] = defaultdict(list)
        for request in requests:
            self.waiting[request.depends_on].append(request)

    def run(self) -> float:
        """All of them, to their ends; returns the seconds. Raises BenchError."""
        begin = self.clock()
        self.hand_over(None)
        while self.engine.has_unfinished():
            outputs = self.engine.step()
            now = self.clock()
            for output in outputs:
                self.take(output, now)
        if missing := self.requests.keys() - self.records.keys():
            raise BenchError(f"{min(missing)} got no token, or waits for what does not end")
        return self.clock() - begin

    def hand_over(self, ended: str | None) -> None:
        """The requests that waited for this one."""
        from common.requests import Request as EngineRequest
        from common.sampling import SamplingParams

        now = self.clock()
        for request in self.waiting.pop(ended, []):
            before: list[int] = []
            if request.parent is not None:
                before = self.prompts[request.parent] + self.records[request.parent]["token_ids"]
            name, prompt = request.request_id, before + request.prompt_token_ids
            self.prompts[name], self.begins[name] = prompt, now
            params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            self.engine.add_request(EngineRequest(name, prompt, params))

    def take(self, output: Any, now: float) -> None:
        """One output of a step; the first of a request says what was found in the cache."""
        name = output.request_id
        if name not in self.records:
            num_prompt, num_cached = (
                len(self.prompts[name]),
                getattr(output, "num_cached_tokens", 0),
            )
            if not 0 <= num_cached < num_prompt:
                raise BenchError(f"{name}: {num_cached} of {num_prompt} prompt tokens cached")
            self.records[name] = {
                "ttft_s": now - self.begins[name],
                "prompt_tokens": num_prompt,
                "cached_tokens": num_cached,
                "token_ids": [],
            }
        token_ids = self.records[name]["token_ids"]
        token_ids += output.token_ids
        if output.finished:
            asked = self.requests[name].max_tokens
            if len(token_ids) != asked:
                ended = f"{len(token_ids)} of {asked} tokens, then {output.finish_reason!r}"
                raise BenchError(f"{name}: {ended}")
            self.hand_over(name)


def warm_up_requests(requests: list[Request], vocab_size: int) -> list[Request]:
    """Other tokens, in the shapes that come: a slice of a long prompt, and a batch that decodes."""
    longest = min(256, *(len(request.prompt_token_ids) for request in requests))
    prompts = random_prompts([longest] + [16] * 7, vocab_size, "warm-up")
    return [Request(f"warm-up-{n}", 0, None, None, prompt, 4) for n, prompt in enumerate(prompts)]


def run_workload(job: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    """One workload on an engine of its own; what its counters said is without the warm-up."""
    settings = {**job["settings"], "num_blocks": workload["num_blocks"]}
    engine, config, _ = start_engine({**job, "settings": settings})
    requests = [Request(**values) for values in workload["requests"]]
    Driver(engine, warm_up_requests(requests, job["vocab_size"])).run()
    before = engine.stats()
    driver = Driver(engine, requests)
    seconds = driver.run()
    after = engine.stats()
    engine.check_integrity()
    facts = engine_facts(engine, config)
    engine.shutdown()
    counters = {name: after[name] - before[name] for name in COUNTERS if name in after}
    return {"seconds": seconds, "records": driver.records, "counters": counters, "facts": facts}


def prefix_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "vocab_size", "workloads": [{"name", "requests", "num_blocks"}]}
    -> "runs": a run by each workload's name, and what `engine_facts` says."""
    runs: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for workload in job["workloads"]:
        run = run_workload(job, workload)
        facts = run.pop("facts")
        runs[workload["name"]] = run
        gc.collect()  # the last engine's memory, before the next one takes its own
    return {"runs": runs, **facts}


def costs_job(job: dict[str, Any]) -> dict[str, Any]:
    """See `common.bench.prefix.costs.measure`."""
    from common.bench.prefix.costs import measure

    return measure(job)


if __name__ == "__main__":
    JOBS.update({"prefix": prefix_job, "prefix_costs": costs_job})
    try:
        main()
    except BenchError as error:
        sys.exit(str(error))
