"""What the GPU's operations would compile and launch, recorded without a GPU.

Triton is imported by tests and not by this file: what is there when tests have been collected is
frozen (conftest.py), and Triton's library would complain at the end that it was leaked.
"""

from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from common.kernels import Ops
from common.testing.kernels.launches import (
    MODELS,
    MOE_MODELS,
    Lengths,
    Model,
    layer_variants,
    metadata_of,
    prepare_experts,
    recorded,
    run_layer,
)

FALCON = Model("Falcon-7B", 4544, 18176, 71, 1, 64, 65024)
FORMATS = (torch.bfloat16, torch.float32)
DECODE_QUERIES = (None, 1, 3, 5, 9)  # of a sequence: not known, one, one and so many drafts
MAX_LENGTHS = (40, 256, 257, 8192)


@pytest.fixture(scope="module")
def ops() -> Ops:
    from common.kernels.triton.ops import TritonOps

    return TritonOps()


def warm_up(
    ops: Ops, model: Model, dtype: torch.dtype, max_len: int, decode_queries: int | None
) -> list[set[tuple]]:
    """The variants of each batch."""
    batches = ops.warm_up_lengths(model.group, max_len, max_len, decode_queries)
    assert all(queries <= tokens <= max_len for batch in batches for queries, tokens in batch)
    return [
        layer_variants(ops, model, dtype, metadata_of(batch, decode_queries=decode_queries))
        for batch in batches
    ]


@st.composite
def traffic(draw: st.DrawFn, max_len: int, decode_queries: int | None) -> tuple[Lengths, int]:
    """A batch: decodes, drafts, chunks of prompts, alone or mixed; and a bound, tight or not."""
    few = st.integers(0, decode_queries or 9)
    queries = draw(st.sampled_from([st.just(1), few, st.integers(1, max_len), few | st.just(70)]))
    counts = draw(st.lists(queries, min_size=1, max_size=6)) * draw(st.sampled_from([1, 1, 50]))
    lengths = [
        (n, n + draw(st.integers(n == 0, max_len))) for n in (min(c, max_len) for c in counts)
    ]
    lengths = [(n, min(length, max_len)) for n, length in lengths]
    return lengths, draw(st.sampled_from([max_len, max(length for _, length in lengths)]))


@pytest.mark.parametrize("decode_queries", DECODE_QUERIES)
@settings(max_examples=60)
@given(data=st.data())
def test_nothing_is_compiled_after_the_warm_up(
    ops: Ops, decode_queries: int | None, data: st.DataObject
) -> None:
    model = data.draw(st.sampled_from([*MODELS, FALCON]))
    dtype, max_len = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(MAX_LENGTHS))
    known = set().union(*warm_up(ops, model, dtype, max_len, decode_queries))
    lengths, bound = data.draw(traffic(max_len, decode_queries))
    metadata = metadata_of(lengths, bound, decode_queries)
    if metadata.max_query_len:
        assert layer_variants(ops, model, dtype, metadata) <= known


@pytest.mark.parametrize("model", [*MODELS, FALCON], ids=lambda model: model.name)
@pytest.mark.parametrize("decode_queries", DECODE_QUERIES)
def test_no_batch_of_the_warm_up_is_idle(
    ops: Ops, model: Model, decode_queries: int | None
) -> None:
    sets = warm_up(ops, model, torch.bfloat16, 8192, decode_queries)
    for i, own in enumerate(sets):
        assert own - set().union(*sets[:i])


def test_other_operations_need_no_warm_up() -> None:
    from common.kernels.reference import ReferenceOps

    assert ReferenceOps().warm_up_lengths(2, 100, 1000, 1) == []


@pytest.mark.parametrize("model", MOE_MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=40)
@given(num_tokens=st.integers(0, 10_000), k=st.integers(1, 8))
def test_experts_are_compiled_when_they_are_loaded(
    ops: Ops, model: Model, dtype: torch.dtype, num_tokens: int, k: int
) -> None:
    """All that any number of tokens launches; and the grid is for the worst that they can choose."""
    with recorded() as known:
        prepared = prepare_experts(ops, model, dtype)
    x = torch.empty(num_tokens, model.hidden, dtype=dtype, device="meta")
    ids = torch.empty(num_tokens, k, dtype=torch.int64, device="meta")
    with recorded() as launches:
        ops.experts(x, ids, ids.float(), prepared)
    assert {launch.variant for launch in launches} <= {launch.variant for launch in known}
    names = [launch.kernel for launch in launches]
    one = ["sort_by_expert_kernel", "experts_kernel", "experts_kernel", "sum_of_experts_kernel"]
    assert names == (one if num_tokens else [])
    for launch in launches:
        if launch.kernel == "experts_kernel":
            rows, count = launch.constants[5], num_tokens * k
            worst = min(model.num_experts, count)  # one full tile less a row, and others of one row
            assert launch.grid[0] >= worst + (count - worst) // rows


README = Path(__file__).parent.parent / "common/kernels/triton/README.md"
SAMPLER = {"extremes", "gather", "marks", "noisy", "threshold", "winner"}


def listed() -> dict[tuple[str, str], list[list[str]]]:
    """By model and format, the rows of the README's tables, sampler left out."""
    tables: dict[tuple[str, str], list[list[str]]] = {}
    for line in README.read_text().splitlines():
        if line.startswith("**"):
            name, format_name = line.strip("*").split(", ")
            rows = tables[name, format_name] = []
        elif tables and line.startswith("| ") and not line.startswith("| kernel"):
            row = [cell.strip() for cell in line.strip("|").split("|")]
            rows += [row] * (row[0] not in SAMPLER)
    return tables


def test_readme_lists_what_is_compiled() -> None:
    from common.testing.kernels.triton_variants import DEFAULT, FORMATS, run_layers

    tables = listed()
    assert list(tables) == [(name, format_name) for name, format_name, _ in DEFAULT]
    for name, format_name, only in DEFAULT[:-1]:  # the last are tiles, which nobody launches
        [model] = [model for model in (*MODELS, *MOE_MODELS) if model.name == name]
        with recorded() as launches:
            run_layers(model, FORMATS[format_name])
        variants = {launch.variant for launch in launches if only in launch.kernel}
        expected = sorted(
            (variant[0].removesuffix("_kernel"), f"{variant[3]} x {variant[4]}")
            for variant in variants
        )
        assert sorted((row[0], row[2]) for row in tables[name, format_name]) == expected
        assert all(int(row[-1]) <= 16 for row in tables[name, format_name])  # hardly a spill


# A step that a CUDA graph could hold.


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("num_queries", [1, 4])
@settings(max_examples=20)
@given(data=st.data())
def test_launches_do_not_depend_on_lengths(
    ops: Ops, model: Model, num_queries: int, data: st.DataObject
) -> None:
    """Two batches of as many sequences and queries, under one bound."""
    from common.kernels.triton.attention import MIN_SPLIT

    bound, num_seqs = data.draw(st.sampled_from([256, 1000, 40000])), data.draw(st.integers(1, 40))
    tokens = st.lists(st.integers(num_queries, bound), min_size=num_seqs, max_size=num_seqs)
    found = []
    for _ in range(2):
        lengths = [(num_queries, length) for length in data.draw(tokens)]
        with recorded() as launches:
            run_layer(ops, model, torch.bfloat16, metadata_of(lengths, bound, num_queries))
        found.append([(x.variant, x.grid, x.numbers) for x in launches])
    assert found[0] == found[1]
    names = [variant[0] for variant, _, _ in found[0]]
    assert names.count("attention_kernel") == 1
    assert names.count("combine_kernel") == (bound > MIN_SPLIT)


def launched(ops: Ops, lengths: Lengths, **bounds: int) -> dict[str, list]:
    """By kernel and whether it decodes, the grids of attention's launches for Qwen3-0.6B."""
    with recorded() as launches:
        run_layer(ops, MODELS[0], torch.bfloat16, metadata_of(lengths, **bounds))
    grids: dict[str, list] = {"prefill": [], "decode": [], "combine": []}
    for launch in launches:
        if launch.kernel == "attention_kernel":
            grids["decode" if launch.constants[0] else "prefill"].append(launch.grid)
        if launch.kernel == "combine_kernel":
            grids["combine"].append(launch.grid)
    return grids


def test_grids(ops: Ops) -> None:
    """Qwen3-0.6B: 16 heads, 8 KV heads, 64 queries in a tile of a prompt."""
    assert launched(ops, [(1, 200)] * 3) == {"prefill": [], "decode": [(24, 1)], "combine": []}
    assert launched(ops, [(1, 1000)] * 3) == {
        "prefill": [],
        "decode": [(24, 4)],
        "combine": [(48,)],
    }
    mixed: Lengths = [(1, 1000), (1, 10), (300, 300)]
    prefill = ((302 // 64 + 3) * 8, 1)
    unknown, known = launched(ops, mixed), launched(ops, mixed, decode_queries=1)
    assert unknown == {"prefill": [prefill], "decode": [(24, 4)], "combine": [(3 * 8 * 16,)]}
    behind = ((302 // 64 + 1) * 8, 1)  # the two before it have no part in it
    assert known == {"prefill": [behind], "decode": [(24, 4)], "combine": [(3 * 1 * 16,)]}
    assert launched(ops, [(300, 300)], decode_queries=1)["decode"] == []
    assert launched(ops, [(2, 300), (0, 9)], decode_queries=1)["prefill"] == [((0 + 2) * 8, 1)]
    assert launched(ops, [(0, 9), (2, 300)], decode_queries=1)["prefill"] == [((0 + 1) * 8, 1)]


def test_another_tile_is_taken_at_once(ops: Ops) -> None:
    """As `gpu_check` sweeps them: by another entry in the table, and a cleared cache."""
    from common.kernels.triton import attention

    with mock.patch.dict(attention.PREFILL, {128: attention.Tile(64, 128, 4, 2)}):
        attention.tile_for.cache_clear()
        swept = launched(ops, [(300, 300)])["prefill"]
    attention.tile_for.cache_clear()
    assert swept == [((300 // 32 + 1) * 8, 1)]
    assert launched(ops, [(300, 300)])["prefill"] == [((300 // 64 + 1) * 8, 1)]


def test_layers_share_a_plan(ops: Ops) -> None:
    from common.kernels.triton import attention

    metadata = metadata_of([(1, 1000), (1, 3)])
    query, cache = torch.zeros(2, 4, 64), torch.zeros(4, 3, 2, 16, 2, 64)
    with recorded() as launches, mock.patch.object(attention, "plan", wraps=attention.plan) as plan:
        for layer in range(3):
            ops.attention(query, cache, layer, metadata, 0.1)
        assert plan.call_count == 1
        ops.attention(query, cache, 0, metadata, 0.1, sliding_window=5)
        assert plan.call_count == 2
        ops.attention(query, cache, 0, metadata_of([(1, 1000), (1, 3)]), 0.1)
        assert plan.call_count == 3
    decodes = [launch for launch in launches if launch.kernel == "attention_kernel"]
    assert [launch.numbers[1] for launch in decodes] == [0, 1, 2, 0, 0]  # the layer
