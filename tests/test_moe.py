"""Mixtures of experts: shapes, names, the operation on a CPU, the router, part 11 against transformers.

The operation's cases for all implementations are in test_triton_kernels; upcycling is in test_upcycle.
"""

import gc
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.distributed.group import OneRank
from common.kernels import Ops
from common.kernels.cpu.ops import CpuOps
from common.kernels.reference import ReferenceOps
from common.models.architecture import ModelConfig
from common.models.checkpoint import iter_weights, load_config, load_transformers_model, resolve
from common.models.errors import ModelError
from common.models.expert_names import plain_name, split_shapes
from common.models.weight_slices import WeightSource, open_weights
from common.sampling import SamplingParams
from common.testing.kernels.case import wide
from common.testing.kernels.expert_cases import expected_of
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import PARTS, distinct_files, make_engine, module_of, tiny_engine

FIRST = 11  # the part from which on models may have experts
MODELS = ("random:tiny-qwen3-moe", "random:tiny-mixtral")
PROMPTS = [[5], [7, 8, 9], list(range(2, 60)), [40] * 25]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
REFERENCE = ReferenceOps()

TINY = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
QWEN3 = {**TINY, "intermediate_size": 96, "moe_intermediate_size": 20, "head_dim": 16}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(
        **TINY, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2
    ),
    "mixtral, window": lambda: transformers.MixtralConfig(
        **TINY, intermediate_size=24, num_local_experts=4, num_experts_per_tok=1, sliding_window=8
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **QWEN3, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "qwen3_moe, not normed": lambda: transformers.Qwen3MoeConfig(
        **QWEN3, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, attention_bias=True
    ),
}


def saved(kind: str, folder: Path, is_fused: bool = False) -> Any:
    """A model of transformers', written by transformers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate.weight" in name or "bias" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, save_original_format=not is_fused)
    return model


def engine_without_text(part: int, model: str, patch: pytest.MonkeyPatch, **flags: Any) -> Any:
    """An engine of a folder without a tokenizer."""
    tokenizer = module_of(part, "engine").Tokenizer
    patch.setattr(tokenizer, "load", classmethod(lambda cls, folder: None))
    engine = make_engine(part, model, **flags)
    patch.undo()
    return engine


def pairs_of(engine: Any, params: Any = GREEDY) -> list[tuple[list[int], list[int]]]:
    outputs = engine.generate(PROMPTS, params, progress=False)
    return [(prompt, done.token_ids) for prompt, done in zip(PROMPTS, outputs, strict=True)]


class TestShapes:
    def test_of_mixtral(self) -> None:
        shape = ModelConfig.from_transformers(CONFIGS["mixtral"](), 100, moe=True)
        assert (shape.num_experts, shape.num_experts_per_tok) == (5, 2)
        assert (shape.moe_intermediate_size, shape.norm_topk_prob) == (24, True)
        assert shape.sparse_layers == {0, 1, 2} and not shape.has_head_norms

    @pytest.mark.parametrize("normed", [True, False])
    @pytest.mark.parametrize(
        "step, dense, sparse",
        [
            (1, [], {0, 1, 2, 3}),
            (2, [], {1, 3}),
            (1, [0, 2], {1, 3}),
            (2, [1], {3}),
            (5, [], set()),
        ],
    )
    def test_of_qwen3_moe(
        self, step: int, dense: list[int], sparse: set[int], normed: bool
    ) -> None:
        config = transformers.Qwen3MoeConfig(
            **{**QWEN3, "num_hidden_layers": 4}, num_experts=6, num_experts_per_tok=3,
            norm_topk_prob=normed, decoder_sparse_step=step, mlp_only_layers=dense,
        )  # fmt: skip
        shape = ModelConfig.from_transformers(config, 100, moe=True)
        with torch.device("meta"):
            layers = transformers.AutoModelForCausalLM.from_config(config).model.layers
        theirs = {i for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
        assert shape.sparse_layers == sparse == theirs
        assert (shape.norm_topk_prob, shape.moe_intermediate_size) == (normed, 20)
        assert (shape.num_experts, shape.num_experts_per_tok, shape.has_head_norms) == (6, 3, True)

    def test_a_dense_model_has_none(self) -> None:
        for moe in (False, True):
            config = load_config(resolve("random:tiny-llama"))
            shape = ModelConfig.from_transformers(config, 100, moe=moe)
            assert not shape.sparse_layers and not shape.num_experts

    @pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "glm4_moe"])
    def test_shared_experts_are_refused(self, kind: str) -> None:
        config = transformers.AutoConfig.for_model(kind)
        with pytest.raises(ModelError, match=f"model_type is '{kind}', a model with shared exp"):
            ModelConfig.from_transformers(config, 100, moe=True)
        with pytest.raises(ModelError, match=f"model_type is '{kind}'; supported: llama, qwen2"):
            ModelConfig.from_transformers(config, 100)

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize(
        "part", [part for part in distinct_files("model_runner.py") if part < FIRST]
    )
    def test_earlier_parts_refuse_them(self, part: int, model: str) -> None:
        kind = load_config(resolve(model)).model_type
        with pytest.raises(ValueError, match=f"model_type is '{kind}'.*from part 11 on"):
            make_engine(part, model)

    @pytest.mark.parametrize(
        "kind, field, value, message",
        [
            ("mixtral", "num_experts_per_tok", 6, "num_experts_per_tok 6; expected a number up to"),
            ("mixtral", "num_experts_per_tok", 0, "num_experts_per_tok 0; expected"),
            ("mixtral", "num_local_experts", 0, "num_local_experts 0; expected"),
            ("mixtral", "num_local_experts", 10**9, "num_local_experts 1000000000; expected"),
            ("qwen3_moe", "num_experts_per_tok", 7, "num_experts_per_tok 7; expected a number up"),
            ("qwen3_moe", "decoder_sparse_step", 0, "decoder_sparse_step 0; expected"),
            ("qwen3_moe", "moe_intermediate_size", -1, "moe_intermediate_size -1; expected"),
            ("qwen3_moe", "mlp_only_layers", "all", "mlp_only_layers"),
        ],
    )
    def test_wrong_numbers(
        self, tmp_path: Path, kind: str, field: str, value: Any, message: str
    ) -> None:
        values = CONFIGS[kind]().to_dict()
        if field == "num_local_experts":
            values.pop("num_experts", None)
        (tmp_path / "config.json").write_text(json.dumps(values | {field: value}))
        with pytest.raises(ModelError, match=message):
            load_config(tmp_path)


class TestNames:
    def test_mixtral_s(self) -> None:
        prefix = "model.layers.3."
        for name, plain in (
            ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
            ("block_sparse_moe.experts.11.w1.weight", "mlp.experts.11.gate_proj.weight"),
            ("block_sparse_moe.experts.0.w2.weight", "mlp.experts.0.down_proj.weight"),
            ("block_sparse_moe.experts.7.w3.weight", "mlp.experts.7.up_proj.weight"),
            ("mlp.experts.7.up_proj.weight", "mlp.experts.7.up_proj.weight"),
            ("block_sparse_moe.experts.7.w4.weight", "block_sparse_moe.experts.7.w4.weight"),
            ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
        ):
            assert plain_name(prefix + name) == prefix + plain
            assert plain_name(name.replace("block", "layers.0.block")).count("layers.0") < 2

    @pytest.mark.parametrize("is_fused", [False, True])
    @pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
    def test_files_of_both_kinds_hold_the_same(
        self, tmp_path: Path, kind: str, is_fused: bool
    ) -> None:
        model = saved(kind, tmp_path, is_fused)
        state = model.state_dict()
        found = dict(iter_weights(tmp_path))
        expected = split_shapes(state)
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
        gate_up = state["model.layers.2.mlp.experts.gate_up_proj"]  # [experts, 2 * size, hidden]
        size = gate_up.shape[1] // 2
        for expert in range(len(gate_up)):
            prefix = f"model.layers.2.mlp.experts.{expert}."
            assert torch.equal(found[f"{prefix}gate_proj.weight"], gate_up[expert, :size])
            assert torch.equal(found[f"{prefix}up_proj.weight"], gate_up[expert, size:])
            down = state["model.layers.2.mlp.experts.down_proj"][expert]
            assert torch.equal(found[f"{prefix}down_proj.weight"], down)
        gate = state["model.layers.2.mlp.gate.weight"]
        assert torch.equal(found["model.layers.2.mlp.gate.weight"], gate)

    @pytest.mark.parametrize("model", MODELS)
    def test_transformers_gets_the_same_random_tensors(self, model: str) -> None:
        folder = resolve(model)
        state = load_transformers_model(folder, torch.float32).state_dict()
        for name, tensor in iter_weights(folder):
            if ".mlp.experts." not in name:
                assert torch.equal(state[name], tensor), name
                continue
            prefix, _, rest = name.rpartition("experts.")
            expert, projection, _ = rest.split(".")
            is_down, is_up = projection == "down_proj", projection == "up_proj"
            fused = state[f"{prefix}experts.{'down_proj' if is_down else 'gate_up_proj'}"]
            own = fused[int(expert)]
            assert torch.equal(own if is_down else own.chunk(2)[is_up], tensor), name

    @pytest.mark.parametrize("is_fused", [False, True])
    @pytest.mark.parametrize("fault", ["missing", "shape"])
    def test_a_wrong_checkpoint(
        self, tmp_path: Path, fault: str, is_fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safetensors.torch import load_file, save_file

        saved("qwen3_moe", tmp_path, is_fused)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.2.mlp.experts.down_proj"
        name = name if is_fused else name.replace("experts", "experts.4") + ".weight"
        if fault == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][..., :-1].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
        place = r"model\.layers\.2\.mlp\.experts"
        with pytest.raises(ModelError, match=place):
            engine_without_text(PARTS[-1], str(tmp_path), monkeypatch)
        with pytest.raises(ModelError, match=place):
            load_transformers_model(tmp_path, torch.float32)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, and a seed for the rest."""
    sizes = {
        "num_tokens": (0, 40),
        "k": (1, 5),
        "num_experts": (1, 9),
        "hidden": (1, 70),
        "size": (1, 50),
    }
    return {name: draw(st.integers(*bounds)) for name, bounds in sizes.items()} | {
        "seed": draw(st.integers(0, 1000)),
        "favourite": draw(st.booleans()),  # whether one expert has nearly all
    }


def made(problem: dict[str, Any]) -> tuple[Any, ...]:
    """x, ids, weights, and gate_up and down of each expert."""
    generator = torch.Generator().manual_seed(problem["seed"])
    hidden, size, count = problem["hidden"], problem["size"], problem["num_experts"]
    shape = (problem["num_tokens"], problem["k"])

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(-1, count, shape, generator=generator)
    if problem["favourite"]:
        ids[torch.rand(shape, generator=generator) < 0.9] = count - 1
    x, weights = randn(shape[0], hidden), torch.rand(shape, generator=generator)
    gate_up = [randn(2 * size, hidden) * hidden**-0.5 for _ in range(count)]
    return x, ids, weights, gate_up, [randn(hidden, size) * size**-0.5 for _ in range(count)]


@pytest.fixture(scope="module", params=["reference", 1, 2])
def ops(request: pytest.FixtureRequest) -> Ops:
    return REFERENCE if request.param == "reference" else CpuOps(request.param)


class TestOperation:
    @settings(max_examples=60)
    @given(problem=problems())
    def test_any_sizes(self, ops: Ops, problem: dict[str, Any]) -> None:
        x, ids, weights, gate_up, down = made(problem)
        prepared = ops.prepare_experts(gate_up, down)
        out = ops.experts(x, ids, weights, prepared)
        expected = expected_of(x, (ids, weights), gate_up, down)
        assert out.shape == x.shape and out.dtype is x.dtype
        torch.testing.assert_close(wide(out), expected, atol=2e-5, rtol=1e-5)

    @settings(max_examples=20)
    @given(problem=problems(), data=st.data())
    def test_an_expert_is_replaced(self, ops: Ops, problem: dict[str, Any], data: Any) -> None:
        x, ids, weights, gate_up, down = made(problem)
        prepared = ops.prepare_experts(gate_up, down)
        index = data.draw(st.integers(0, problem["num_experts"] - 1))
        _, _, _, others, other_downs = made({**problem, "seed": 5000})
        ops.replace_expert(prepared, index, others[index], other_downs[index])
        gate_up[index], down[index] = others[index], other_downs[index]
        expected = expected_of(x, (ids, weights), gate_up, down)
        out = ops.experts(x, ids, weights, prepared)
        torch.testing.assert_close(wide(out), expected, atol=2e-5, rtol=1e-5)

    def test_many_rows_of_one_expert(self) -> None:
        """More than fit the cache together: blocks of rows."""
        problem = {"num_tokens": 700, "k": 1, "num_experts": 2, "hidden": 400, "size": 60}
        x, ids, weights, gate_up, down = made({**problem, "seed": 1, "favourite": True})
        ops = CpuOps(2)
        out = ops.experts(x, ids, weights, ops.prepare_experts(gate_up, down))
        expected = REFERENCE.experts(x, ids, weights, REFERENCE.prepare_experts(gate_up, down))
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)

    def test_a_row_does_not_depend_on_the_others_choices(self) -> None:
        problem = {"num_tokens": 30, "k": 2, "num_experts": 4, "hidden": 64, "size": 40}
        x, ids, weights, gate_up, down = made({**problem, "seed": 1, "favourite": False})
        ops = CpuOps(2)
        prepared = ops.prepare_experts(gate_up, down)
        alone = torch.cat(
            [
                ops.experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], prepared)
                for i in range(30)
            ]
        )
        torch.testing.assert_close(ops.experts(x, ids, weights, prepared), alone)

    def test_the_panels_are_the_only_copy(self) -> None:
        ops, sizes, alive = CpuOps(1), (64, 96), []

        def read(*shape: int) -> Any:
            for _ in range(5):
                weight = torch.randn(shape)
                alive.append(weakref.ref(weight))
                yield weight
                del weight
                gc.collect()
                assert sum(ref() is not None for ref in alive) <= 4  # a pair, and the next

        hidden, size = sizes
        prepared = ops.prepare_experts(read(2 * size, hidden), read(hidden, size))
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        held = sum(x.numel() for x in (*prepared.gate_ups, *prepared.downs))
        assert held == 5 * 3 * hidden * size  # both are multiples of a panel

    def test_what_does_not_fit_is_refused(self) -> None:
        ops = CpuOps(1)
        prepared = ops.prepare_experts([torch.ones(8, 6)] * 3, [torch.ones(6, 4)] * 3)
        x, ids, weights = torch.ones(2, 6), torch.tensor([[0], [3]]), torch.ones(2, 1)
        with pytest.raises(ValueError, match="experts: 3 of them, ids up to 3"):
            ops.experts(x, ids, weights, prepared)
        for wrong in ((x[:, :5], ids, weights), (x[:1], ids, weights), (x, ids, weights[:1])):
            with pytest.raises(ValueError, match="experts: x"):
                ops.experts(*wrong, prepared)
        with pytest.raises(ValueError, match="expert: gate_up"):
            ops.replace_expert(prepared, 0, torch.ones(6, 6), torch.ones(6, 4))
        with pytest.raises(ValueError, match="of one"):
            ops.prepare_experts(
                [torch.ones(8, 6), torch.ones(6, 6)], [torch.ones(6, 4), torch.ones(6, 3)]
            )

    def test_other_formats_go_to_the_reference(self) -> None:
        problem = {"num_tokens": 5, "k": 2, "num_experts": 3, "hidden": 16, "size": 8}
        x, ids, weights, gate_up, down = made({**problem, "seed": 1, "favourite": False})
        gate_up, down = ([weight.bfloat16() for weight in own] for own in (gate_up, down))
        ops, x = CpuOps(1), x.bfloat16()
        prepared = ops.prepare_experts(iter(gate_up), iter(down))
        out = ops.experts(x, ids, weights, prepared)
        assert torch.equal(
            out, REFERENCE.experts(x, ids, weights, REFERENCE.prepare_experts(gate_up, down))
        )
        ops.replace_expert(prepared, 1, gate_up[0], down[0])
        assert torch.equal(prepared[0][1], gate_up[0])


def read_part(tensor: torch.Tensor, part: tuple[slice, ...]) -> torch.Tensor:
    return tensor[part] if part else tensor


class TestRouter:
    @pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_moe, not normed"])
    def test_it_chooses_as_transformers_does(self, tmp_path: Path, kind: str) -> None:
        model = saved(kind, tmp_path)
        config = load_config(tmp_path)
        module = module_of(PARTS[-1], "model")
        shape = ModelConfig.from_transformers(config, 100, moe=True)
        layer = max(shape.sparse_layers)
        source, shard = open_weights(tmp_path), module.Shard.of(shape)
        weights = module.Weights(
            source, torch.float32, shard, OneRank(), None, module.Stage.of(shape)
        )
        own = module.MoE(shape, CpuOps(1), layer, weights)
        x = torch.randn(50, shape.hidden_size)
        with torch.inference_mode():
            _, scores, chosen = model.model.layers[layer].mlp.gate(x)
            ids, own_scores = own.route(x)
        assert torch.equal(ids, chosen) and ids.dtype is torch.int64
        torch.testing.assert_close(own_scores, scores)
        assert own_scores.dtype is torch.float32
        if shape.norm_topk_prob:
            torch.testing.assert_close(own_scores.sum(1), torch.ones(50))

    def test_it_computes_in_float32_whatever_the_model_is_in(self) -> None:
        """Two experts whose scores differ by less than bfloat16 can tell."""
        shape = ModelConfig.from_transformers(CONFIGS["mixtral"](), 100, moe=True)
        module, hidden = module_of(PARTS[-1], "model"), shape.hidden_size
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
        shapes = split_shapes(model.state_dict())
        tensors = {name: torch.zeros(size) for name, size in shapes.items()}
        gate = torch.zeros(5, hidden)
        gate[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
        gate[3, 1] = 2.0**-7  # beside a score of 256: lost in 8 bits
        tensors["model.layers.0.mlp.gate.weight"] = gate
        readers = {name: partial(read_part, tensor) for name, tensor in tensors.items()}
        source = WeightSource(readers, {name: tuple(size) for name, size in shapes.items()})
        weights = module.Weights(
            source, torch.bfloat16, module.Shard.of(shape), OneRank(), None, module.Stage.of(shape)
        )
        own = module.MoE(shape, ReferenceOps(), 0, weights)
        x = torch.zeros(1, hidden, dtype=torch.bfloat16)
        x[0, 0], x[0, 1] = 256.0, 4.0
        ids, scores = own.route(x)
        assert ids[0, 0] == 3 and scores.dtype is torch.float32
        assert scores[0, 0] > scores[0, 1]


# Part 11 against transformers.

FLAGS = {
    "plain": {},
    "reference": {"kernels": "reference"},
    "slices": {"max_num_batched_tokens": 16, "max_num_seqs": 3, "block_size": 4},
    "radix": {"prefix_cache": "radix", "block_size": 4},
    "ngram": {"speculative": "ngram"},
    "self": {"speculative": "self", "draft_layers": 2},
}


ENGINES = [part for part in PARTS if part >= FIRST]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("part", "flags"),
    [
        pytest.param(part, flags, marks=[] if is_short else pytest.mark.long)
        for part in ENGINES
        for number, flags in enumerate(FLAGS)
        # In the short form, between the first part with experts and the latest, one set of flags.
        for is_short in [part in (FIRST, ENGINES[-1]) or number == part % len(FLAGS)]
    ],
)
def test_greedy_tokens_are_transformers(part: int, model: str, flags: str) -> None:
    engine = tiny_engine(part, model, **FLAGS[flags])
    for _ in range(2 if flags in ("radix", "slices") else 1):  # the second finds prompts cached
        pairs = pairs_of(engine)
        verdict = check_greedy(model, pairs)
        assert verdict.num_tokens == 120 and verdict.is_right, verdict
    engine.check_integrity()
    for damage in ("cut", "shift"):
        assert not check_greedy(model, pairs[1:], damage).is_right


@pytest.mark.parametrize("model", MODELS)
def test_seeded_tokens_are_transformers(model: str) -> None:
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=i, max_tokens=20, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    pairs = pairs_of(tiny_engine(PARTS[-1], model), params)
    triples = [(*pair, own) for pair, own in zip(pairs, params, strict=True)]
    verdict = check_seeded(model, triples)
    assert verdict.num_tokens == 80 and verdict.is_right, verdict
    assert not check_seeded(model, triples[1:], "shift").is_right


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_of_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(kind, tmp_path, is_fused=kind == "mixtral")
    pairs = pairs_of(engine_without_text(PARTS[-1], str(tmp_path), monkeypatch, num_blocks=64))
    verdict = check_greedy(str(tmp_path), pairs)
    assert verdict.num_tokens == 120 and verdict.is_right, verdict
    assert not check_greedy(str(tmp_path), pairs[1:], "shift").is_right


@pytest.mark.parametrize("fault", ["weights", "second expert", "order"])
@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_finds_wrong_routing(
    model: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(PARTS[-1], "model")
    route = module.MoE.route

    def wrong(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = route(self, x)
        if fault == "weights":
            return ids, weights * 0.9
        if fault == "second expert":
            return ids, weights.where(torch.arange(weights.shape[1]) != 1, 0)
        return ids.flip(1), weights

    monkeypatch.setattr(module.MoE, "route", wrong)
    pairs = pairs_of(make_engine(PARTS[-1], model))
    assert not check_greedy(model, pairs).is_right
