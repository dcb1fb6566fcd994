"""Part 15's pipeline: stages of layers give one rank's tokens, whatever else is on, and overlap.

Most engines have their ranks as threads, which meet in the memory that processes would share.
"""

import contextlib
import itertools
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import psutil
import pytest
import torch
from part15 import ranks as ranks_module
from part15.config import EngineConfig
from part15.engine import LLMEngine
from part15.model import CausalLM
from part15.pipeline_parallel import Stage
from part15.quantized_layers import QuantizedSource, Recipe

from common.distributed import RankError
from common.distributed.stages import members_of
from common.kernels.reference import ReferenceOps
from common.models.architecture import ModelConfig
from common.models.checkpoint import load_config, resolve
from common.models.weight_slices import open_weights
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.leaks import shared_names
from common.testing.oracle import check_greedy
from common.testing.parts import make_engine
from common.testing.rank_threads import ThreadRanks, engine_in_threads
from common.testing.schedules import Drive, Event
from common.testing.server import RunningServer

LLAMA, QWEN, MOE = "random:tiny-llama", "random:tiny-qwen3", "random:tiny-qwen3-moe"
SMALL = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 6, "max_num_batched_tokens": 20}
TIGHT = {"num_blocks": 17, "max_num_seqs": 8}  # of 4 tokens each: two or three sequences
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [[(7 * i + n) % 500 + 2 for i in range(n)] for n in (1, 5, 12, 30, 16, 16)]
TIMEOUT = 3.0  # seconds: --rank-timeout
DEADLINE = TIMEOUT + 2 * TIMEOUT / 4 + 3.0


@contextlib.contextmanager
def pipeline(
    num_stages: int, model: str = LLAMA, size: int = 1, **flags: Any
) -> Iterator[tuple[Any, ThreadRanks]]:
    """size: ranks of a stage."""
    flags = {"kernels": "reference", "pipeline_parallel_size": num_stages} | SMALL | flags
    engine, others = engine_in_threads(15, model, size, **flags)
    try:
        yield engine, others
    finally:
        engine.shutdown()
    assert not others.errors, others.errors


def schedule(seed: int, num_requests: int = 14) -> list[Event]:
    """Requests that come close together, some of them aborted wherever they are."""
    generator = random.Random(seed)
    return [
        Event(
            request=generator.randrange(12),
            max_tokens=generator.randint(1, 24),
            stop_at=generator.choice([None, None, generator.randrange(24)]),
            abort=generator.choice([None, None, generator.randrange(num_requests)]),
            num_steps=generator.randrange(6),
        )
        for _ in range(num_requests)
    ]


class Watched(Drive):
    """Between steps: what is in flight draws for different sequences, at most `num_stages` steps."""

    deepest = 0

    def steps(self, count: int) -> None:
        engine, wait = self.engine, self.engine.wait

        def seen(pending: Any) -> Any:
            steps = [pending, *engine.in_flight]
            drawn = [sequence for step in steps for sequence in step.scheduled.sampled]
            assert len(set(drawn)) == len(drawn), "a sequence is in two steps"
            assert len(steps) <= engine.config.pipeline_parallel_size
            self.deepest = max(self.deepest, len(steps))
            return wait(pending)

        with patch.object(engine, "wait", seen):
            super().steps(count)


MIXES: list[tuple[int, int, str, dict[str, Any]]] = [
    (2, 1, LLAMA, {"kernels": "auto"}),
    (3, 1, LLAMA, {"prefix_cache": "off", "max_num_batched_tokens": 7}),
    (3, 1, QWEN, TIGHT | {"prefix_cache": "radix"}),
    (2, 2, QWEN, TIGHT),
    (2, 1, LLAMA, TIGHT | {"speculative": "ngram", "prompt_lookup_min": 1}),
    (3, 1, QWEN, TIGHT | {"offload": "both", "host_kv_memory": 1 << 20}),
    (2, 1, QWEN, TIGHT | {"offload": "swap", "speculative": "ngram", "prefix_cache": "radix"}),
]


def test_what_is_given_to_the_next_stage_is_not_written_anew() -> None:
    """It may wait to be sent while rank 0 prepares further steps, and slices of prompts give nothing back
    that would say that they were received."""
    with pipeline(2, LLAMA, max_num_batched_tokens=7) as (engine, _):
        given, give = [], engine.runner.pipeline.give

        def noted(x: torch.Tensor) -> None:
            given.append((x, x.clone()))
            give(x)

        with patch.object(engine.runner.pipeline, "give", noted):
            Drive(engine, LLAMA).run(schedule(0))
        assert len(given) > 20 and all(torch.equal(x, before) for x, before in given)


@pytest.mark.parametrize(("num_stages", "size", "model", "flags"), MIXES, ids=str)
def test_tokens_are_those_of_one_rank(
    num_stages: int, size: int, model: str, flags: dict[str, Any]
) -> None:
    with pipeline(num_stages, model, size, **flags) as (engine, others):
        if "offload" in flags:  # copies always pay
            engine.connector.rates.swap_pays = lambda *_: True
        deepest = 0
        for seed in range(2):
            drive = Watched(engine, model)
            drive.run(schedule(seed))
            deepest = max(deepest, drive.deepest)
        assert deepest == num_stages
        stats = engine.stats()
        if flags.get("num_blocks"):
            assert stats["num_preemptions"], "the pool was not too small"
        if flags.get("speculative"):
            assert stats["num_accepted_tokens"], stats
        if flags.get("offload"):
            copied = [others.runners[rank].connector for rank in others.runners]
            assert stats["num_swapped_tokens"] and all(c.num_copied for c in copied)
        assert sorted(others.runners) == list(range(1, num_stages * size))


def tokens_of(engine: Any, params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = engine.generate(PROMPTS, params, progress=False)
    engine.check_integrity()
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {"quantization": "int8"}),
        (2, {"quantization": "int4", "kv_cache_dtype": "int8"}),
        (1, {"kv_cache_dtype": "fp8", "activations": "int8", "quantization": "int8"}),
    ],
    ids=str,
)
def test_formats(size: int, flags: dict[str, Any]) -> None:
    """Rounded weights, inputs and keys are those of the same ranks in one stage. One prompt at a time:
    where inputs are rounded, a batch of another size may round one of them to the next number."""
    found = []
    for num_stages in (1, 3):
        with pipeline(num_stages, LLAMA, size, **flags) as (engine, _):
            outputs = [engine.generate([prompt], GREEDY, progress=False) for prompt in PROMPTS]
            found.append([output.token_ids for [output] in outputs])
    assert found[0] == found[1]


def test_what_rank_0_samples() -> None:
    """Log probabilities of tokens and of prompts, penalties and seeds come out as without stages."""
    params = SamplingParams(
        temperature=0.8, seed=3, presence_penalty=0.5, max_tokens=8, logprobs=2, prompt_logprobs=2
    )
    found = []
    for num_stages in (1, 2):
        with pipeline(num_stages, size=2) as (engine, _):
            found.append(engine.generate(PROMPTS, params, progress=False))
    for ours, theirs in zip(*found, strict=True):
        assert ours.token_ids == theirs.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            rows = zip(getattr(ours, name), getattr(theirs, name), strict=True)
            for a, b in rows:
                assert a.token_id == b.token_id and a.rank == b.rank
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("level", [1, 2])
def test_all_stages_sleep(level: int) -> None:
    with pipeline(3, QWEN) as (engine, others):
        expected = tokens_of(engine)
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(Request(f"r{number}", prompt, GREEDY))
        outputs: dict[str, list[int]] = {f"r{number}": [] for number in range(len(PROMPTS))}
        for number in itertools.count():
            if number == 8:
                assert len(engine.in_flight) == 2
                engine.sleep(level)
                levels = [runner.rank_sleep.level for runner in others.runners.values()]
                assert levels == [level, level]
                engine.wake_up()
            for output in engine.step():
                outputs[output.request_id] += output.token_ids
            if not engine.has_unfinished():
                break
        assert list(outputs.values()) == expected


# What overlaps.


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_first_stage_does_not_wait_for_the_last(num_stages: int) -> None:
    """The logits of a step are held back until the first stage has begun as many steps after it as
    there are further stages. Were it to wait for them, that would never be."""
    begun, given, lock = [0], itertools.count(), threading.Condition()
    with pipeline(num_stages, max_num_batched_tokens=16) as (engine, others):
        model, last = engine.runner.model, others.runners[num_stages - 1].pipeline
        forward, give_back = model.forward, last.give_back

        def begin(*args: Any) -> torch.Tensor:
            with lock:
                begun[0] += 1
                lock.notify_all()
            return forward(*args)

        def hold(logits: torch.Tensor) -> None:
            number = next(given)
            with lock:
                if number <= 6 - num_stages:
                    enough = lock.wait_for(lambda: begun[0] >= number + num_stages, timeout=10)
                    assert enough, f"{begun[0]} steps, the logits of step {number} are not there"
            give_back(logits)

        with patch.object(model, "forward", begin), patch.object(last, "give_back", hold):
            prompts = [[number + 2] * 16 for number in range(6)]  # a step each
            engine.generate(prompts, GREEDY, progress=False)
        assert next(given) == begun[0] > 6
        devices = [spans for record in engine.trace.records() for spans in record.device]
        assert any(later[1] < earlier[2] for earlier, later in itertools.pairwise(devices))
        events = engine.trace.to_perfetto()["traceEvents"]
        tracks: dict[int, list[tuple[float, float]]] = {}
        for event in events:
            if event["ph"] == "X" and event["tid"] >= 3:
                span = event["ts"], event["ts"] + event["dur"]
                tracks.setdefault(event["tid"], []).append(span)
        assert len(tracks) == num_stages
        for spans in tracks.values():
            ordered = sorted(spans)
            assert all(a[1] <= b[0] + 10 for a, b in itertools.pairwise(ordered))


def test_a_step_takes_its_share_of_the_sequences() -> None:
    """Sequences that decode spread over the steps in flight, and each runs as often as any other."""
    with pipeline(3, max_num_seqs=7, max_num_batched_tokens=64) as (engine, _):
        for number in range(7):
            engine.add_request(Request(f"r{number}", [number + 2] * 4, GREEDY))
        for _ in range(30):
            engine.step()
            lengths = [s.num_tokens for s in engine.sequences.values()]
            assert max(lengths) - min(lengths) <= 1, lengths
        sizes = [len(pending.scheduled.sampled) for pending in engine.in_flight]
        assert sum(sizes) >= 4 and max(sizes) <= 3, sizes
        engine.drop_requests()


# What a stage has.


def load(model: str, number: int, num_stages: int) -> tuple[CausalLM, list[str], int]:
    """A stage's model, the tensors that it has read, and how many it calls unused."""
    folder = resolve(model)
    shape = ModelConfig.from_transformers(load_config(folder, quantized=True), 512, moe=True)
    source, reads = QuantizedSource(open_weights(folder, quantized=True), folder, Recipe()), []
    read = source.read

    def recorded(name: str, *args: Any) -> torch.Tensor:
        reads.append(name)
        return read(name, *args)

    source.read = recorded
    unused: list[str] = []
    with patch("part15.model.report_unused", unused.extend):
        where = torch.float32, torch.device("cpu"), None, None
        stage = Stage.of(shape, number, num_stages)
        made = CausalLM(shape, ReferenceOps(), source, *where, stage)
    return made, reads, len(unused)


@pytest.mark.parametrize("model", [LLAMA, QWEN, MOE])
def test_a_stage_reads_its_layers_and_no_more(model: str) -> None:
    """Together the stages read every tensor once; the embedding twice where it is the head, too."""
    whole, all_names, num_unused = load(model, 0, 1)
    assert num_unused == 0
    for num_stages in (2, 3):
        parts = [load(model, number, num_stages) for number in range(num_stages)]
        assert not any(unused for _, _, unused in parts)
        names = [name for _, reads, _ in parts for name in reads]
        tied = ["model.embed_tokens.weight"] if whole.config.tie_word_embeddings else []
        assert sorted(names) == sorted(all_names + tied)
        copied = whole.config.vocab_size * whole.config.hidden_size * 4 * len(tied)
        assert sum(part.num_bytes for part, _, _ in parts) == whole.num_bytes + copied
        assert sum(part.local.num_layers for part, _, _ in parts) == whole.config.num_layers


def test_a_tensor_that_no_stage_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage.of(load(LLAMA, 0, 1)[0].config, 1, 2)
    assert list(stage.layers) == [2] and stage.is_last and not stage.is_first
    here = ("model.layers.2.extra", "model.layers.7.extra", "lm_head.weight", "vision.weight")
    assert not any(map(stage.is_elsewhere, here))
    there = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
    assert all(map(stage.is_elsewhere, there))


def test_bytes_of_the_stages() -> None:
    """Weights and keys and values are divided, so the same memory has more blocks."""
    with pipeline(1, size=2) as (engine, _):
        whole = engine.stats()["rank_bytes"]
    with pipeline(3, size=2) as (engine, others):
        stages = engine.stats()["rank_bytes"]
        shapes = [r.kv.data.shape for r in (engine.runner, *others.runners.values())]
        assert all(shape[:2] == (40, 1) for shape in shapes)
    assert [sum(held[i] for held in stages) for i in (0, 1)] == [
        sum(held[i] for held in whole) for i in (0, 1)
    ]
    blocks = []
    for num_stages in (1, 3):
        with pipeline(num_stages, num_blocks=None, kv_cache_memory=1 << 17) as (engine, _):
            blocks.append(engine.stats()["num_blocks"])
    assert blocks[1] // 3 == blocks[0]


# Experts: those of a stage's layers are spread over the ranks of this stage, in all engines.


@pytest.mark.parametrize("num_engines", [1, 2])
def test_experts(num_engines: int, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"ep_backend": "all_to_all", "num_redundant_experts": 4}
    flags |= {"enable_expert_parallel": True, "tensor_parallel_size": 3 - num_engines}
    flags |= {"eplb": True, "eplb_interval": 5, "pipeline_parallel_size": 2, "threads": 1}
    if num_engines > 1:
        address = str(tmp_path / "meet")
        flags |= {"data_parallel_size": num_engines, "data_parallel_address": address}
    load_config(resolve(MOE))  # imports transformers, which several threads cannot at a time
    others = ThreadRanks(15)

    def start(number: int) -> Any:
        own = {"data_parallel_rank": number, "kernels": "reference"}
        return make_engine(15, MOE, **(SMALL | flags | own))

    numbers = range(num_engines)
    with ThreadPoolExecutor(num_engines) as pool:
        with patch.object(ranks_module, "connect", others.connect):
            engines = list(pool.map(start, numbers))
        try:
            work = [PROMPTS, PROMPTS[2:4]][:num_engines]

            def complete(number: int) -> list[tuple[list[int], list[int]]]:
                outputs = engines[number].generate(work[number], GREEDY, progress=False)
                engines[number].check_integrity()
                return [(p, o.token_ids) for p, o in zip(work[number], outputs, strict=True)]

            for rows in pool.map(complete, numbers):
                verdict = check_greedy(MOE, rows)
                assert verdict.is_right, verdict
            stats = engines[0].stats()
            assert stats["num_expert_moves"] > 0
        finally:
            list(pool.map(lambda engine: engine.shutdown(), engines))


# Settings that cannot be.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size is 4: the model's num_layers is 3"),
        (
            {"speculative": "self"},
            "pipeline_parallel_size is 2: speculative self runs all layers on each rank",
        ),
        (
            {"speculative": "draft", "draft_model": QWEN},
            "pipeline_parallel_size is 2: speculative draft runs all layers on each rank",
        ),
        (
            {"disk_kv": "kv", "offload": "prefix"},
            "pipeline_parallel_size is 2: disk_kv is for one rank",
        ),
        (
            {"role": "prefill", "kv_secret": "s" * 32},
            "pipeline_parallel_size is 2: role prefill is for one rank",
        ),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size must be at least 1, not 0"),
    ],
    ids=str,
)
def test_what_does_not_compose(flags: dict[str, Any], message: str) -> None:
    before = psutil.Process().children()
    with pytest.raises(ValueError, match=f"^{message}"):
        LLMEngine(EngineConfig(**({"model": LLAMA, "pipeline_parallel_size": 2} | flags)))
    assert psutil.Process().children() == before


def test_the_groups_of_ranks() -> None:
    assert members_of(1, 4) == {}
    assert members_of(2, 2) == {"pipe 0 0": [0, 1], "back": [1, 0]}
    of_six = {"stage 0": [0, 1], "stage 1": [2, 3], "stage 2": [4, 5]}
    of_six |= {"pipe 0 0": [0, 2], "pipe 0 1": [1, 3], "pipe 1 2": [2, 4], "pipe 1 3": [3, 5]}
    assert members_of(3, 6) == of_six | {"back": [4, 0]}


# Processes.


def wait_until(condition: Callable[[], Any], seconds: float) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"in vain for {seconds} s"
        time.sleep(0.02)


def test_ranks_as_processes() -> None:
    """Three stages in processes that share memory; the one in the middle is killed."""
    flags = {"model": LLAMA, "pipeline_parallel_size": 3, "threads": 1, "num_blocks": 64}
    engine = LLMEngine(EngineConfig(**flags, rank_timeout=TIMEOUT))
    try:
        rows = list(zip(PROMPTS, tokens_of(engine), strict=True))
        assert check_greedy(LLAMA, rows).is_right
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(Request(f"r{number}", prompt, replace(GREEDY, max_tokens=100)))
        for _ in range(10):
            engine.step()
        os.kill(engine.runner.ranks.children.processes[0].pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(RankError, match=r"^rank 1 was killed by SIGKILL$"):
            while time.monotonic() < begin + DEADLINE:
                engine.step()
    finally:
        engine.shutdown()


@pytest.mark.long
def test_stages_of_two_hosts() -> None:
    """Two processes as torchrun starts them, with gloo between them, and messages longer than what a
    socket holds: the prompt's hidden states, and the scores of all of its tokens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = "--model", LLAMA, "--pp", "2", "--num-blocks", "64", "--max-num-batched-tokens", "900"
    both = [RunningServer(15, *flags, env=where | {"RANK": str(rank)}) for rank in range(2)]
    try:
        both[0].wait_until_ready()
        prompts = [*PROMPTS, [(11 * i) % 500 + 2 for i in range(600)]]
        body = {"model": LLAMA, "max_tokens": 8, "temperature": 0, "prompt": prompts}
        body |= {"ignore_eos": True, "echo": True, "logprobs": 1}
        url = f"{both[0].base_url}/v1/completions"
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert len(choices) == len(prompts)
        with pipeline(1, LLAMA, max_num_batched_tokens=900, num_blocks=200) as (engine, _):
            params = SamplingParams(
                temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1
            )
            expected = engine.generate(prompts, params, progress=False)
        for choice, theirs in zip(choices, expected, strict=True):
            scores = [None, *(s.logprob for s in [*theirs.prompt_logprobs, *theirs.logprobs])]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-3)
        both[0].process.send_signal(signal.SIGTERM)
        assert [server.process.wait(30) for server in both] == [0, 0]
    finally:
        for server in both:
            server.kill()


def test_the_last_stage_is_stopped() -> None:
    """Every request ends with an error in time, the server says what is wrong, and leaves nothing."""
    segments = shared_names()
    flags = "--num-blocks", "200", "--max-num-seqs", "4", "--rank-timeout", str(TIMEOUT)
    server = RunningServer(15, "--model", LLAMA, "--pp", "3", *flags)
    try:
        server.wait_until_ready()
        workers = sorted(c.pid for c in psutil.Process(server.process.pid).children(recursive=True))
        assert len(workers) == 2
        received, ends = itertools.count(), []

        def stream() -> str:
            body = {"model": LLAMA, "prompt": [3, 4, 5], "max_tokens": 900, "stream": True}
            url, last = f"{server.base_url}/v1/completions", ""
            body |= {"ignore_eos": True, "temperature": 0}
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                for line in filter(None, answer.iter_lines()):
                    next(received)
                    last = line
            return last

        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(stream) for _ in range(6)]  # more than run at once
            wait_until(lambda: next(received) > 60, 30)
            os.kill(workers[1], signal.SIGSTOP)
            begin = time.monotonic()
            ends = [client.result(60) for client in clients]
            assert time.monotonic() - begin < DEADLINE
        assert all(last.startswith('data: {"error"') for last in ends), ends
        answer = httpx.get(f"{server.base_url}/health", timeout=10)
        said = answer.json()["reason"]
        assert answer.status_code == 503
        assert "rank 2" in said, said
        assert server.stop() == 0
        wait_until(lambda: not any(map(psutil.pid_exists, workers)), 5)
        assert shared_names() <= segments
    finally:
        server.kill()
