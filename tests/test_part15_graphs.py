"""Captured decode steps: a CPU's recordings of launches, and CUDA graphs on a GPU that is not there."""

import ast
import gc
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.kernels.cpu import launches
from common.kernels.cpu.jit import LISTENERS
from common.kernels.cpu.launches import Launches
from common.kernels.cpu.ops import CpuOps
from common.kernels.recording import Arena, CannotRecordError, record
from common.sampling import SamplingParams
from common.testing.parts import ROOT, make_engine

TINY = "random:tiny-llama"
OPS = CpuOps(2)
PROMPTS = [[5 + i, 7, 9 + 2 * i, 11] * (i + 1) for i in range(6)]
PARAMS = [
    SamplingParams(
        temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=12 + 3 * i, ignore_eos=True
    )
    for i in range(6)
]


def outputs(engine: object, **options: object) -> list[list[int]]:
    completions = engine.generate(PROMPTS, PARAMS, progress=False, **options)
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return outputs(make_engine(15, TINY, enforce_eager=True))


def test_a_recording_computes_again_from_what_is_in_its_inputs_now() -> None:
    x, weight = torch.randn(4, 64), OPS.prepare_weight(torch.randn(96, 64))
    norm, residual = torch.randn(64), torch.zeros(4, 64)

    def forward() -> torch.Tensor:
        hidden = OPS.add_rms_norm(x, residual, norm, 1e-5)
        return OPS.silu_and_mul(OPS.linear(hidden, weight)) * 2

    recording, result = record(Arena(), forward)
    assert recording.num_launches == 3 and len(recording.steps) == 2
    for _ in range(3):
        x.copy_(torch.randn(4, 64))
        residual.copy_(torch.randn(4, 64))
        before = residual.clone()
        recording()
        got, kept = result.clone(), residual.clone()
        residual.copy_(before)
        assert torch.equal(got, forward()) and torch.equal(kept, residual)


def test_floats_and_integers_reach_a_kernel_as_they_were() -> None:
    """eps is a float among integers; a wrong order of registers would give another norm."""
    x, weight = torch.randn(3, 32), torch.randn(32)
    for eps in (1e-6, 0.5, 1e9):
        recording, result = record(Arena(), lambda eps=eps: OPS.rms_norm(x, weight, eps))
        result.zero_()
        recording()
        assert torch.allclose(result, OPS.reference.rms_norm(x, weight, eps), atol=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.any() else -x,
        lambda x: x[x > 0],
        lambda x: x[x.nonzero()[:, 0]],
        lambda x: x.unique(),
    ],
    ids=["item", "bool", "mask", "nonzero", "unique"],
)
def test_what_depends_on_numbers_in_a_tensor_cannot_be_recorded(mode, reads) -> None:
    with mode(), pytest.raises(CannotRecordError, match="depends on numbers"):
        record(Arena(), lambda: reads(torch.ones(3)))
    assert not LISTENERS


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "copies",
    [
        lambda x: x.to(torch.bfloat16).float() + 1,
        lambda x: x.t().contiguous() + 1,
        lambda x: x.t().reshape(-1),
        lambda x: torch.cat([x, x])[:3].float(),
        lambda x: x.add_(1).to(torch.float8_e4m3fn).float(),
        lambda x: x.softmax(-1).topk(2).values,
        lambda x: x[torch.tensor([1, 0])].flatten(),
    ],
    ids=["to", "contiguous", "reshape", "slice", "in place", "topk", "index"],
)
def test_operations_of_pytorch_are_repeated_though_they_look_like_views(mode, copies) -> None:
    """In inference mode `to`, `contiguous` and `reshape` say that they give views."""
    with mode():
        x, arena = torch.randn(3, 4), Arena()
        recording, result = record(arena, lambda: copies(x))
        gc.collect()
        assert not arena.taken, "a step holds memory of the arena"
        for _ in range(3):
            start = torch.randn(3, 4)
            wanted = copies(start.clone())
            x.copy_(start)
            recording()
            assert torch.equal(result, wanted)


def test_only_the_recording_thread_is_listened_to() -> None:
    x, weight = torch.randn(2, 32), torch.randn(32)

    def run() -> torch.Tensor:
        other = threading.Thread(target=lambda: OPS.rms_norm(x, weight, 1e-5))
        other.start()
        other.join()
        return x

    recording, _ = record(Arena(), run)
    assert recording.steps == []


def test_a_launch_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Launches()
    listed.words, listed.names = [0, 0, launches.HEAD], ["norm"]
    monkeypatch.setattr(launches, "replay", lambda words, count: 0)
    with pytest.raises(RuntimeError, match="launch 0 of 1 failed: norm"):
        listed()


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=60))
def test_no_two_tensors_of_an_arena_share_memory(requests: list[tuple[int, bool]]) -> None:
    arena, held = Arena(), []
    for size, drops in requests:
        held.append(arena.take((size,), torch.float32))
        if drops:
            del held[len(held) // 2]
        places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in held)
        for (_, end), (begin, _) in itertools.pairwise(places):
            assert end <= begin, f"{end} > {begin}"
    views = [x[:1] for x in held]
    held.clear()
    assert len(arena.taken) == len(views), "a view holds its memory"
    views.clear()
    assert not arena.taken and len(arena.chunks) <= 1


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"speculative": "ngram"},
        {"speculative": "self", "kv_cache_dtype": "int8"},
        {"num_blocks": 12, "prefix_cache": "radix"},  # which preempts
        {"quantization": "int4", "activations": "int8"},
        {"quantization": "int8", "activations": "fp8", "prefix_cache": "off"},
    ],
    ids=lambda flags: " ".join(flags) or "plain",
)
def test_replayed_steps_give_the_tokens_of_launched_ones(
    flags: dict, expected: list[list[int]]
) -> None:
    engine = make_engine(15, TINY, **flags)
    exact = "quantization" not in flags and "kv_cache_dtype" not in flags
    wanted = expected if exact else outputs(make_engine(15, TINY, enforce_eager=True, **flags))
    assert outputs(engine) == wanted
    before = engine.stats()
    assert before["num_graphs"] > 0 and before["num_graph_replays"] > 0
    assert outputs(engine) == wanted  # most of its sizes are known by now
    after = engine.stats()
    assert after["num_graph_replays"] - before["num_graph_replays"] >= before["num_graph_replays"]
    engine.check_integrity()


def test_a_mixture_of_experts_is_replayed_with_its_routing() -> None:
    model = "random:tiny-qwen3-moe"
    engine = make_engine(15, model)
    assert outputs(engine) == outputs(make_engine(15, model, enforce_eager=True))
    assert engine.stats()["num_graph_replays"] > 0


def test_a_replay_that_computes_nothing_changes_tokens(expected: list[list[int]]) -> None:
    """The negative control: what is compared above comes from replays."""
    engine = make_engine(15, TINY)
    assert outputs(engine) == expected
    for graph in engine.runner.graphs.captured.values():
        graph.recording.steps.clear()
    assert outputs(engine) != expected


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (TINY, {"dtype": "bfloat16"}),
        ("random:tiny-qwen3-moe", {"quantization": "int4", "activations": "int8"}),
    ],
    ids=["bfloat16", "experts in turns"],
)
def test_what_cannot_be_recorded_is_launched_from_python(model: str, flags: dict) -> None:
    """Also the step in which that is found."""
    engine = make_engine(15, model, **flags)
    assert outputs(engine) == outputs(make_engine(15, model, enforce_eager=True, **flags))
    assert engine.runner.graphs.reason.startswith("a step cannot be recorded: ")
    assert engine.stats()["num_graph_replays"] == 0


def test_eager_engines_capture_nothing() -> None:
    for flags, why in (
        ({"enforce_eager": True}, "enforce_eager is on"),
        ({"kernels": "reference"}, "kernels is reference"),
        ({"role": "prefill", "kv_secret": "s" * 32}, "role is prefill"),
    ):
        graphs = make_engine(15, TINY, **flags).runner.graphs
        assert graphs.reason.startswith(why)
        assert graphs.bucket([1, 1]) is None and not graphs.captured


def test_recordings_share_memory_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(15, TINY, max_num_seqs=8)
    graphs = engine.runner.graphs
    monkeypatch.setattr(sys.modules[type(graphs).__module__], "MOST_RECORDINGS", 3)
    outputs(engine)
    size = graphs.pool.num_bytes
    for _ in range(3):
        outputs(engine)
        gc.collect()
        assert len(graphs.captured) <= 3 and graphs.pool.num_bytes == size
        assert not graphs.pool.taken, "no recording holds memory"


def test_they_are_made_anew_after_sleep(expected: list[list[int]]) -> None:
    engine = make_engine(15, TINY)
    for level in (1, 2):
        assert outputs(engine) == expected
        engine.sleep(level)
        assert engine.stats()["num_graphs"] == 0 and engine.runner.graphs.pool is None
        engine.wake_up()
    assert outputs(engine) == expected


def test_ranks_replay_side_by_side(expected: list[list[int]]) -> None:
    engine = make_engine(15, TINY, tensor_parallel_size=2)
    try:
        assert outputs(engine) == expected
        assert outputs(engine) == expected
        assert engine.stats()["num_graph_replays"] > 0
        gc.collect()
        assert not engine.runner.graphs.pool.taken, "sums of ranks hold memory"
    finally:
        engine.shutdown()


GPU = '''
from common.testing import cuda_on_cpu
cuda_on_cpu.install()
import itertools
import sys
import torch
sys.path.insert(0, "tests")
from test_part15_graphs import PARAMS, PROMPTS, TINY, make_engine, outputs
from common.memory.device import DeviceMemory, as_bytes
from common.requests import Request

def discard(memory):
    """On a GPU storages become empty; those of arrays cannot."""
    memory.is_there = False
    for storage in memory.storages:
        as_bytes(storage).zero_()

DeviceMemory.discard = discard
for speculative in ("off", "ngram", "self"):
    flags = dict(device="cuda:1", dtype="float32", max_num_seqs=6, speculative=speculative)
    engine = make_engine(15, TINY, **flags)
    graphs = engine.runner.graphs
    print([(key[0].num_seqs, key[0].num_tokens_each, key[3]) for key in graphs.captured])
    number = len(graphs.captured)
    print(outputs(engine), graphs.num_replays > 0, len(graphs.captured) == number)
    # Asleep and awake with requests on their way, which have tokens on the device.
    requests = [Request(str(i), p, params) for i, (p, params) in enumerate(zip(PROMPTS, PARAMS))]
    for request in requests:
        engine.add_request(request)
    tokens = {request.request_id: [] for request in requests}
    for step in itertools.count():
        if step == 6:
            engine.sleep(1)
            slept = len(graphs.captured)
            engine.wake_up()
            print(slept, len(graphs.captured) == number)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        if step > 6 and not engine.has_unfinished():
            break
    print([tokens[request.request_id] for request in requests])

def no_room(*_):
    raise torch.OutOfMemoryError

graphs.capture = no_room
engine.sleep(1)
engine.wake_up()
print(outputs(engine), graphs.reason, len(graphs.captured))
'''


def test_on_a_gpu_all_sizes_are_captured_at_the_start(expected: list[list[int]]) -> None:
    done = subprocess.run([sys.executable, "-c", GPU], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    sizes = [6, 4, 2, 1]  # the largest first
    assert ast.literal_eval(lines[0]) == [(size, 1, True) for size in sizes]
    assert ast.literal_eval(lines[4]) == [(size, each, True) for size in sizes for each in (1, 13)]
    each = [(1, True), (5, True), (1, False)]  # verifies, and drafts with some of its layers
    assert ast.literal_eval(lines[8]) == [(size, *kind) for size in sizes for kind in each]
    assert lines[1:12:4] == [f"{expected} True True"] * 3
    assert lines[2:12:4] == ["0 True"] * 3
    assert lines[3:12:4] == [str(expected)] * 3
    assert lines[12] == f"{expected} there was no room for CUDA graphs when the engine woke up 0"
