"""Part 12's sleep mode: memory goes and comes back, and nothing that a client sees changes but time."""

import contextlib
import importlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.http.run import ServerConfig
from common.memory import DeviceMemory, HostMemory, SleepError, files, find_tensors, host, process
from common.memory.process import mappings
from common.models.checkpoint import is_random
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.leaks import open_files
from common.testing.parts import engine_of, make_engine, module_of
from common.testing.rank_threads import engine_in_threads
from common.testing.server import RunningServer, server_process, serving_thread

PAGE = mmap.PAGESIZE
MODEL, DRAFT = "random:tiny-llama", "random:tiny-qwen3"
sleep_module = importlib.import_module("common.memory.sleeping")
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(seed=3, temperature=0.9, top_p=0.95, max_tokens=20, ignore_eos=True)
PENALISED = SamplingParams(seed=5, presence_penalty=0.7, max_tokens=20, ignore_eos=True)
PARAMS = (GREEDY, SEEDED, PENALISED)
PROMPTS = [[3 + i, 4, 5, 6, 7] * (1 + i) for i in range(6)]


# Memory of tensors.


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


@given(
    st.lists(st.tuples(st.integers(0, 9 * PAGE), st.integers(0, 5 * PAGE)), min_size=1, max_size=6),
    st.booleans(),
)
@settings(max_examples=30)
def test_whole_pages_of_tensors_go_and_come_back(
    extents: list[tuple[int, int]], is_saved: bool
) -> None:
    """Tensors anywhere in a piece of memory, also one over the other. What is not theirs stays."""
    block = mmap.mmap(-1, 16 * PAGE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    whole.copy_(torch.randint(1, 256, whole.shape, dtype=torch.uint8))
    expected, before = whole.clone(), open_files()
    start = whole.data_ptr()
    gone = torch.zeros(16, dtype=torch.bool)  # pages all of whose bytes are a tensor's
    owned = torch.zeros(len(whole), dtype=torch.bool)
    for begin, size in extents:
        owned[begin : begin + size] = True
    gone = owned.view(16, PAGE).all(dim=1)
    memory = HostMemory([whole[begin : begin + size] for begin, size in extents])
    assert start % PAGE == 0
    if is_saved:
        memory.save()
    memory.discard()
    pages, expected_pages = whole.view(16, PAGE), expected.view(16, PAGE)
    assert (pages[gone] == 0).all() and (pages[~gone] == expected_pages[~gone]).all()
    memory.restore()
    if is_saved:
        assert torch.equal(whole, expected)
    else:
        assert (pages[gone] == 0).all()
    assert open_files() <= before, "a file stays open"


def test_resident_memory_falls_by_what_is_discarded() -> None:
    size = 96 << 20
    tensor = torch.full((size,), 7, dtype=torch.uint8)
    address, held = tensor.data_ptr(), process.held_bytes(torch.device("cpu"))
    memory = HostMemory([tensor])
    assert size - 2 * PAGE <= memory.num_bytes <= size
    memory.save()
    memory.discard()
    assert process.held_bytes(torch.device("cpu")) < held - 0.95 * size
    memory.restore()
    assert (tensor == 7).all() and tensor.data_ptr() == address


def test_memory_that_processes_share_is_freed_for_all() -> None:
    file = os.memfd_create("kv")
    os.ftruncate(file, 64 * PAGE)
    shared = torch.frombuffer(mmap.mmap(file, 64 * PAGE), dtype=torch.uint8)
    shared.fill_(1)
    assert os.fstat(file).st_blocks * 512 >= 64 * PAGE
    HostMemory([shared]).discard()
    assert os.fstat(file).st_blocks == 0
    assert (shared == 0).all()
    os.close(file)


def test_what_a_checkpoint_has_is_not_copied(tmp_path: Path) -> None:
    """Pages of a mapped file are read from it again; once written to, they are saved."""
    from safetensors import safe_open

    values = torch.randn(64 * PAGE // 4)
    save_file({"x": values}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        x = opened.get_tensor("x")
    memory = HostMemory([x])
    memory.save()
    assert memory.file is not None and os.fstat(memory.file).st_size == 0
    memory.discard()
    memory.restore()
    assert torch.equal(x, values)
    x[5] = 42.0
    memory.save()
    assert os.fstat(memory.file).st_size > 60 * PAGE
    memory.discard()
    memory.restore()
    assert x[5] == 42.0 and torch.equal(x[6:], values[6:])


def test_weights_are_not_copied_to_a_file_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensor, before = torch.ones(64 * PAGE, dtype=torch.uint8), open_files()
    memory = HostMemory([tensor])
    monkeypatch.setattr(files, "file_system", lambda folder: "tmpfs")
    with pytest.raises(OSError, match="lies in memory"):
        memory.save()
    monkeypatch.setattr(files, "file_system", lambda folder: "ext4")
    monkeypatch.setattr(files, "SPARE", 1 << 60)
    with pytest.raises(OSError, match="bytes free"):
        memory.save()
    monkeypatch.setattr(files, "SPARE", 0)

    def full(file: int, data: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host, "write_all", full)
    with pytest.raises(OSError, match="No space"):
        memory.save()
    assert memory.file is None and open_files() <= before
    assert (tensor == 1).all()


def test_a_file_system_is_known_by_its_folder() -> None:
    assert files.file_system(Path("/dev/shm")) == "tmpfs"
    assert files.file_system(Path("/proc")) == "proc"


def test_files_of_libraries_are_let_go_and_nothing_else() -> None:
    """Only pages that a file has as well; the process goes on as before."""
    code = [m for m in mappings() if m.flags.startswith("r-xp") and "libtorch_cpu" in m.path]
    assert code and all(mapping.is_in_file and mapping.is_constant for mapping in code)
    for mapping in mappings():
        if not mapping.path or "[" in mapping.path:
            assert not mapping.is_in_file, mapping
    values = torch.arange(1000.0)
    process.release_unused()
    resident = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("Rss")
    }
    assert resident["RssFile"] < 100_000, resident  # KiB; torch alone has more
    assert values.sin().sum() == torch.arange(1000.0).sin().sum()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.booleans())
@settings(max_examples=25)
def test_storages_become_empty_and_have_memory_again(sizes: list[int], is_saved: bool) -> None:
    """As on a GPU, with the CPU's storages."""
    tensors = [torch.randn(size) for size in sizes]
    views = [tensor[len(tensor) // 2 :] for tensor in tensors]  # of the same storages
    expected = [tensor.clone() for tensor in tensors]
    memory = DeviceMemory([*tensors, *views, *tensors])
    assert memory.num_bytes == 4 * sum(sizes)
    if is_saved:
        memory.save()
    memory.discard()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    memory.restore()
    memory.restore()  # once more, as after another rank's failure
    for tensor, view, known in zip(tensors, views, expected, strict=True):
        assert torch.equal(tensor, known if is_saved else torch.zeros_like(known))
        assert torch.equal(view, tensor[len(tensor) // 2 :])


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("model", [MODEL, "random:tiny-qwen3-moe"])
def test_all_weights_are_found(model: str, kernels: str) -> None:
    engine = engine_of(12, model, threads=1, kernels=kernels, num_blocks=8)
    tensors = find_tensors(engine.runner.model, module_of(12, "model").__name__)
    found = sum(tensor.nbytes for tensor in tensors)
    assert found >= engine.runner.num_weight_bytes
    assert engine.kv.data.data_ptr() not in {tensor.data_ptr() for tensor in tensors}


# An engine.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector of garbage, and without reading all libraries again."""
    monkeypatch.setattr(sleep_module, "release_unused", lambda: None)


def known(engine: Any) -> list[list[int]]:
    params = [PARAMS[i % len(PARAMS)] for i in range(len(PROMPTS))]
    return [c.token_ids for c in engine.generate(PROMPTS, params, progress=False)]


class Drive:
    """Requests of PROMPTS, and what they have been given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.outputs: list[list[int]] = []
        self.reasons: dict[int, str] = {}

    def add(self, index: int) -> None:
        params, number = PARAMS[index % len(PARAMS)], len(self.outputs)
        self.engine.add_request(Request(str(number), PROMPTS[index], params))
        self.outputs.append([])

    def step(self) -> None:
        for output in self.engine.step():
            number = int(output.request_id)
            assert number not in self.reasons, "an output after the end"
            self.outputs[number] += output.token_ids
            if output.finish_reason is not None:
                self.reasons[number] = output.finish_reason
        self.engine.check_integrity()

    def end(self) -> None:
        for _ in range(10_000):
            if not self.engine.has_unfinished():
                return
            self.step()
        raise AssertionError("requests that never end")


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "radix": {"prefix_cache": "radix", "max_num_batched_tokens": 7},
    "offload": {"offload": "both", "num_blocks": 14, "block_size": 4},
    "ngram": {"speculative": "ngram", "prompt_lookup_min": 1},
    "self": {"speculative": "self", "draft_layers": 2, "offload": "swap"},
    "draft": {"speculative": "draft", "draft_model": DRAFT},
    "reference": {"kernels": "reference", "dtype": "bfloat16"},
    "experts": {"model": "random:tiny-qwen3-moe"},
}


@pytest.fixture(params=MODES, scope="module")
def engine(request: pytest.FixtureRequest) -> Any:
    flags = {"model": MODEL, "threads": 1, "num_blocks": 40, "block_size": 8, "max_num_seqs": 4}
    return engine_of(12, **flags | MODES[request.param])


@given(data=st.data())
@settings(max_examples=6)
def test_requests_have_the_same_tokens_whenever_the_engine_sleeps(
    engine: Any, data: st.DataObject
) -> None:
    expected = known(engine)
    drive = Drive(engine)
    asked: list[int] = []
    aborted: set[int] = set()
    kinds = st.sampled_from(["add", "add", "step", "step", "step", "sleep", "wake", "abort"])
    release, sleep_module.release_unused = sleep_module.release_unused, lambda: None
    try:
        for kind in data.draw(st.lists(kinds, min_size=4, max_size=40)):
            if kind == "add":
                asked.append(data.draw(st.integers(0, len(PROMPTS) - 1)))
                drive.add(asked[-1])
            elif kind == "step" and engine.has_unfinished():
                drive.step()
            elif kind == "sleep":
                was, level = engine.sleep_level, data.draw(st.integers(1, 2))
                engine.sleep(level)
                assert engine.sleep_level == max(was, level)
                engine.check_integrity()
                assert not engine.scheduler.running and engine.stats()["num_used_blocks"] == 0
            elif kind == "wake":
                engine.wake_up()
                assert engine.sleep_level == 0
            elif kind == "abort" and asked:
                aborted.add(data.draw(st.integers(0, len(asked) - 1)))
                engine.abort(str(max(aborted)))
        if engine.sleep_level:
            drive.end()  # nothing runs
            assert all(len(tokens) <= 20 for tokens in drive.outputs)
            engine.wake_up()
        drive.end()
    finally:
        sleep_module.release_unused = release
    for number, (index, tokens) in enumerate(zip(asked, drive.outputs, strict=True)):
        if drive.reasons[number] == "abort":
            assert number in aborted and tokens == expected[index][: len(tokens)]
        else:
            assert tokens == expected[index], f"request {number}"


def weights_of(runner: Any) -> list[torch.Tensor]:
    return [
        tensor.detach()
        for model in runner.sources
        for tensor in find_tensors(model, module_of(12, "model").__name__)
        if tensor.nbytes >= 3 * PAGE
    ]


def whole_pages(tensor: torch.Tensor) -> torch.Tensor:
    start = -tensor.data_ptr() % PAGE
    count = (tensor.nbytes - start) // PAGE
    return tensor.view(torch.uint8).reshape(-1)[start : start + count * PAGE]


@pytest.mark.parametrize("level", [1, 2])
def test_weights_and_cache_are_gone_and_come_back_bit_for_bit(quick: None, level: int) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, max_num_seqs=4)
    known(engine)
    before = [tensor.clone() for tensor in weights_of(engine.runner)]
    assert len(before) > 5 and bool(engine.kv.data.any())
    told = engine.sleep(level)
    assert told["bytes_before"] > 0 and told["bytes_after"] > 0 and told["seconds"] > 0
    assert not any(whole_pages(tensor).any() for tensor in weights_of(engine.runner))
    assert not whole_pages(engine.kv.data).any()
    assert (engine.runner.rank_sleep.weights.file is None) == (level == 2)
    engine.wake_up()
    after = weights_of(engine.runner)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_caches_are_forgotten(quick: None) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, offload="both")
    prompt = [PROMPTS[5]]
    engine.generate(prompt, GREEDY, progress=False)
    hits = engine.stats()["num_prefix_cache_hits"] + engine.stats()["num_host_hits"]
    engine.generate(prompt, GREEDY, progress=False)
    more = engine.stats()["num_prefix_cache_hits"] + engine.stats()["num_host_hits"]
    assert more > hits
    engine.sleep()
    assert engine.stats()["num_used_host_blocks"] == 0
    assert not any(whole_pages(host).any() for _, host in engine.runner.connector.pairs)
    engine.wake_up()
    engine.generate(prompt, GREEDY, progress=False)
    stats = engine.stats()
    assert stats["num_prefix_cache_hits"] + stats["num_host_hits"] == more


def test_levels_and_repetitions(quick: None) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, max_num_seqs=4)
    expected = known(engine)
    assert engine.wake_up() == {}  # it is awake
    for wrong in (0, 3, -1, "1", None, 1.5):
        with pytest.raises(ValueError, match="level must be 1 or 2"):
            engine.sleep(wrong)
    before = open_files()
    engine.sleep(1)
    assert engine.sleep(1) == {} and engine.sleep_level == 1
    assert len(open_files() - before) == 1  # the weights
    with pytest.raises(ValueError, match="the engine sleeps"):
        engine.generate(PROMPTS, GREEDY, progress=False)
    engine.sleep(2)
    assert engine.sleep_level == 2 and open_files() <= before
    assert engine.sleep(1) == {} and engine.sleep_level == 2  # what is gone is not saved any more
    engine.wake_up()
    assert engine.sleep_level == 0 and known(engine) == expected


def test_an_abort_is_answered_asleep(quick: None) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, max_num_seqs=4)
    drive = Drive(engine)
    for index in (0, 1, 2):
        drive.add(index)
    for _ in range(4):
        drive.step()
    engine.sleep()
    drive.add(3)  # comes meanwhile
    engine.abort("1")
    engine.abort("3")
    assert engine.has_unfinished()
    drive.end()
    assert drive.reasons == {1: "abort", 3: "abort"}
    engine.drop_requests()
    assert not engine.sequences and not engine.has_unfinished()
    engine.wake_up()


def test_who_cannot_sleep_stays_awake(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, max_num_seqs=4)
    expected, drive = known(engine), Drive(engine)
    for index in range(6):
        drive.add(index)
    for _ in range(5):
        drive.step()
    with monkeypatch.context() as patch:
        patch.setattr(files, "file_system", lambda folder: "tmpfs")
        with pytest.raises(SleepError, match="lies in memory"):
            engine.sleep(1)
    assert engine.sleep_level == 0 and weights_of(engine.runner)[0].any()
    drive.end()
    assert drive.outputs == expected


def test_engines_that_share_experts_do_not_sleep(quick: None) -> None:
    engine = engine_of(12, MODEL, threads=1, num_blocks=40, block_size=8, max_num_seqs=4)
    config, engine.config = engine.config, None
    try:
        shared = {"data_parallel_size": 2, "data_parallel_address": "/tmp/x"}
        engine.config = type(config)(model=MODEL, enable_expert_parallel=True, **shared)
        with pytest.raises(SleepError, match="data_parallel_size is 2"):
            engine.sleep()
    finally:
        engine.config = config


def test_it_sleeps_on_until_its_checkpoint_is_there(
    quick: None, tmp_path: Path, tokenizer_json: str
) -> None:
    import transformers

    values = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model("llama", **values, dtype="float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    assert not is_random(tmp_path)
    flags = {"threads": 1, "num_blocks": 40, "block_size": 8, "max_num_seqs": 4}
    engine = make_engine(12, str(tmp_path), **flags)
    expected, drive = known(engine), Drive(engine)
    drive.add(4)
    drive.step()
    engine.sleep(2)
    drive.end()  # what was under way is told
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(SleepError, match="safetensors"):
            engine.wake_up()
        assert engine.sleep_level == 2 and not engine.has_unfinished()
    (tmp_path / "elsewhere").rename(weights)
    engine.wake_up()
    drive.end()
    assert drive.outputs == [expected[4]] and known(engine) == expected
    engine.shutdown()


# Ranks.


@pytest.fixture(scope="module", params=[{}, {"offload": "both", "num_blocks": 14, "block_size": 4}])
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    flags = {"num_blocks": 40, "block_size": 8, "max_num_seqs": 4} | request.param
    engine, others = engine_in_threads(12, DRAFT, 2, **flags)
    yield engine, others
    engine.shutdown()
    assert not others.errors


@pytest.mark.parametrize("level", [1, 2])
def test_all_ranks_sleep(quick: None, ranks: tuple[Any, Any], level: int) -> None:
    engine, others = ranks
    expected, drive = known(engine), Drive(engine)
    before = [[t.clone() for t in weights_of(r)] for r in (engine.runner, others.runners[1])]
    for index in range(6):
        drive.add(index)
    for _ in range(5):
        drive.step()
    told = engine.sleep(level)
    assert len(engine.runner.rank_sleep.held) == 2 and told["bytes_before"] > 0
    for runner in (engine.runner, others.runners[1]):
        assert not any(whole_pages(tensor).any() for tensor in weights_of(runner))
        assert not whole_pages(runner.kv.data).any()
    drive.step()
    engine.wake_up()
    for runner, known_weights in zip((engine.runner, others.runners[1]), before, strict=True):
        after = weights_of(runner)
        assert all(torch.equal(a, b) for a, b in zip(known_weights, after, strict=True))
    drive.end()
    assert drive.outputs == expected and not others.errors


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["save", "restore"])
def test_what_fails_on_one_rank_is_done_on_none(
    quick: None, ranks: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, rank: int, what: str
) -> None:
    engine, others = ranks
    expected, drive = known(engine), Drive(engine)
    drive.add(5)
    drive.step()
    runner = [engine.runner, others.runners[1]][rank]
    own = {tensor.data_ptr() for tensor in weights_of(runner)}
    method = getattr(HostMemory, what)

    def fail(memory: HostMemory) -> None:
        if own & {tensor.data_ptr() for tensor in memory.tensors}:
            raise OSError(f"cannot {what}")
        method(memory)

    words = f"cannot {what}" if rank == 0 else "it failed on another rank"
    before = open_files()
    if what == "restore":
        engine.sleep()
    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, what, fail)
        with pytest.raises(SleepError, match=words):
            engine.sleep() if what == "save" else engine.wake_up()
    assert engine.sleep_level == int(what == "restore")
    if what == "save":
        until(lambda: open_files() <= before)  # rank 1 hears of it at its own time
        assert all(tensor.any() for tensor in weights_of(runner))
        engine.sleep()
    engine.wake_up()
    drive.end()
    assert drive.outputs == [expected[5]] and known(engine) == expected
    until(lambda: open_files() <= before)
    assert not others.errors


# A server.

BODY = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 12, "temperature": 0, "logprobs": 0}
KEY = {"Authorization": "Bearer key"}


@contextlib.contextmanager
def serving(**flags: Any) -> Iterator[tuple[httpx.Client, Any]]:
    settings = {"threads": 1, "num_blocks": 64, "block_size": 8, "max_num_seqs": 4}
    engine = make_engine(12, MODEL, **settings | flags)
    app = module_of(12, "server").create_app(engine, ServerConfig(port=0, api_key="key"))
    with (
        serving_thread(app) as url,
        httpx.Client(base_url=url, headers=KEY, timeout=60) as client,
    ):
        yield client, engine


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[httpx.Client, Any]]:
    """A server that is awake between tests."""
    with serving() as server:
        yield server


def text_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["tokens"]


def metrics_of(client: httpx.Client) -> str:
    """All samples, without their labels."""
    return re.sub(r"\{.*?\}", "", client.get("/metrics").text)


def sleep_state(client: httpx.Client) -> dict[str, float]:
    """The metric's samples by their state."""
    lines = client.get("/metrics").text.splitlines()
    return {
        line.split('sleep_state="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:engine_sleep_state{")
    }


def test_requests_wait_while_the_server_sleeps(served: tuple[httpx.Client, Any]) -> None:
    client, engine = served
    expected = text_of(client.post("/v1/completions", json=BODY))
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    told = client.post("/sleep").json()
    assert told["is_sleeping"] and told["level"] == 1 and told["bytes_before"] > 0
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    assert sleep_state(client) == {"awake": 0, "weights_offloaded": 1, "discard_all": 0}
    answers: list[list[str]] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(text_of(client.post("/v1/completions", json=BODY)))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    until(lambda: engine.stats()["num_waiting"] == 3)
    for path in ("/", "/health", "/v1/models", "/metrics", "/trace.jsonl", "/version"):
        assert client.get(path).status_code == 200, path
    tokens = client.post("/tokenize", json={"prompt": "x", "model": MODEL})
    assert tokens.status_code in (200, 400)  # it has no tokenizer
    assert client.post("/sleep", params={"level": "2"}).json()["level"] == 2
    assert sleep_state(client) == {"awake": 0, "weights_offloaded": 0, "discard_all": 1}
    assert not answers
    awake = client.post("/wake_up").json()
    assert not awake["is_sleeping"] and awake["level"] == 0
    for thread in threads:
        thread.join(30)
    assert answers == [expected] * 3
    assert sleep_state(client) == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    assert client.post("/wake_up").json() == {"is_sleeping": False, "level": 0}


def test_streams_go_on_after_the_sleep_and_clients_may_leave(
    served: tuple[httpx.Client, Any],
) -> None:
    client, engine = served
    body = BODY | {"max_tokens": 150, "ignore_eos": True}
    expected = text_of(client.post("/v1/completions", json=body))
    with (
        client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stays,
        client.stream("POST", "/v1/completions", json=body | {"stream": True}) as leaves,
    ):
        lines, others = stays.iter_lines(), leaves.iter_lines()
        first = [next(lines) for _ in range(5)]
        next(others)
        assert client.post("/sleep").status_code == 200
        num_left = engine.stats()["num_waiting"]
        assert num_left >= 1
        leaves.close()
        if num_left == 2:
            until(lambda: engine.stats()["num_waiting"] == 1)
        assert client.post("/wake_up").status_code == 200
        chunks = [json.loads(line[6:]) for line in [*first, *lines] if line.startswith("data: {")]
    tokens = [token for c in chunks for token in c["choices"][0]["logprobs"]["tokens"]]
    assert tokens == expected


def test_requests_are_refused_where_that_is_asked_for() -> None:
    with serving(sleep_requests="refuse") as (client, _):
        expected = text_of(client.post("/v1/completions", json=BODY))
        client.post("/sleep")
        for body in (BODY, BODY | {"stream": True}):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "sleeping"
        client.post("/wake_up")
        assert text_of(client.post("/v1/completions", json=BODY)) == expected


@pytest.mark.parametrize("level", ["0", "3", "", "one", "1.0", "-1", "1 ", "9" * 50])
def test_levels_that_are_none(served: tuple[httpx.Client, Any], level: str) -> None:
    client, _ = served
    answer = client.post("/sleep", params={"level": level})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "level"
    assert len(answer.json()["error"]["message"]) < 100
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


def test_the_key_is_asked_for_and_the_method_is_post(served: tuple[httpx.Client, Any]) -> None:
    client, _ = served
    for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
        answer = httpx.request(method, f"{client.base_url}{path}")
        assert answer.status_code == 401
        evil = {"Origin": "http://evil.example"}
        assert client.request(method, path, headers=evil).status_code == 403
    for path in ("/sleep", "/wake_up"):
        assert client.get(path).status_code == 405
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_sleep_that_fails_says_why(
    served: tuple[httpx.Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    with monkeypatch.context() as patch:
        patch.setattr(files, "file_system", lambda folder: "tmpfs")
        answer = client.post("/sleep")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "sleep_failed"
    assert "lies in memory" in answer.json()["error"]["message"]
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    text_of(client.post("/v1/completions", json=BODY))


def resident(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


def test_two_processes_sleep_and_sigterm_ends_them() -> None:
    """Both ranks give their memory back; with a request that waits, SIGTERM is not waited out."""
    flags = ["--model", MODEL, "--tp", "2", "--num-blocks", "40000", "--block-size", "16"]
    server = RunningServer(12, *flags, "--shutdown-timeout", "1")
    try:
        server.wait_until_ready()
        client = httpx.Client(base_url=server.base_url, timeout=60)
        expected = text_of(client.post("/v1/completions", json=BODY))
        [child] = psutil.Process(server.process.pid).children()
        pids = server.process.pid, child.pid
        awake = [resident(pid) for pid in pids]
        told = client.post("/sleep?level=1").json()
        asleep = [resident(pid) for pid in pids]
        cache = told["bytes_before"] - told["bytes_after"]
        assert cache > 200 << 20, told
        assert all(b < a - (100 << 20) for a, b in zip(awake, asleep, strict=True))
        client.post("/wake_up")
        assert text_of(client.post("/v1/completions", json=BODY)) == expected
        client.post("/sleep?level=2")

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                client.post("/v1/completions", json=BODY)

        waiting = threading.Thread(target=ask)
        waiting.start()
        until(lambda: "vllm:num_requests_waiting 1.0" in metrics_of(client))
        begin = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - begin < 20
        waiting.join(30)
        assert not psutil.pid_exists(child.pid)
    finally:
        if server.process.poll() is None:
            server.kill()


@pytest.mark.long
def test_smollm2_gives_most_of_its_memory_back() -> None:
    """With its default cache: about 90% of what is resident. How long it takes is printed."""
    with server_process(12, "--model", "smollm2-135m") as server:
        start = float(server.output.split("Ready after ")[1].split()[0])
        with httpx.Client(base_url=server.base_url, timeout=120) as client:
            body = BODY | {"model": "smollm2-135m", "prompt": "The capital of France is"}
            expected = text_of(client.post("/v1/completions", json=body))
            for level in (1, 2):
                awake = resident(server.process.pid)
                client.post(f"/sleep?level={level}")
                asleep = resident(server.process.pid)
                woken = client.post("/wake_up").json()
                assert text_of(client.post("/v1/completions", json=body)) == expected
                print(f"level {level}: {awake >> 20} -> {asleep >> 20} MiB, {start} s, {woken}")
                if level == 1:
                    assert asleep <= 0.12 * awake, f"{asleep} of {awake} bytes remain"


ON_A_GPU = f"""
from common.testing import cuda_on_cpu
cuda_on_cpu.install()
from common.sampling import SamplingParams
from part12.config import EngineConfig
from part12.engine import LLMEngine

flags = dict(device="cuda", dtype="float32", kernels="reference", num_blocks=8, block_size=16)
flags |= dict(max_num_seqs=2, max_num_batched_tokens=32)
params = SamplingParams(seed=3, temperature=0.9, max_tokens=6, ignore_eos=True)
with cuda_on_cpu.OnCpu():
    engine = LLMEngine(EngineConfig(model={MODEL!r}, **flags))
    run = lambda: [c.token_ids for c in engine.generate({PROMPTS[:3]!r}, params, progress=False)]
    expected = run()
    for level in (1, 2, 1):
        engine.sleep(level)
        assert engine.kv.data.untyped_storage().nbytes() == 0
        assert engine.runner.model.norm.untyped_storage().nbytes() == 0
        engine.wake_up()
        assert run() == expected
    engine.shutdown()
print("the same tokens")
"""


def test_on_a_gpu_storages_are_emptied() -> None:
    """On one that is not there (see `cuda_on_cpu`)."""
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True)
    assert done.stdout.endswith("the same tokens\n"), done.stderr
