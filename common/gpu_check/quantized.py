"""Quantised products of a layer: right for every format, and how much faster than in the model's own.

Weights are those of Qwen3-8B's layer (qkv, o, gate_up, down), at batches of 1 to 256; the model's own
format beside them, in the same process. And attention over a cache of codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from common.gpu_check.cases import BLOCK_SIZE, Case, Shape
from common.gpu_check.items import Check
from common.gpu_check.rooflines import QUICK_SHAPES, SHAPES, target, timed

if TYPE_CHECKING:
    import torch

    from common.kernels import Ops
    from common.kernels.quantized import QuantizedWeight
    from common.testing.kernels.quantized_cases import Spec

# The first are the ones that part 14 sets goals for.
SWEPT = (
    "int4-g32", "fp8", "int4-g128", "int8", "nvfp4", "mxfp4", "int8, int8 inputs",
    "fp8, fp8 inputs",
)  # fmt: skip
QUICK_SWEPT = ("int4-g32", "int8, int8 inputs")
BATCHES, QUICK_BATCHES = (1, 16, 64, 256), (1, 4)
TOKENS, QUICK_TOKENS = (1, 17, 100, 600), (1, 20)  # every tile, and weights unpacked before
KV_DTYPES = ("int8", "float8_e4m3fn")
GOALS = {"fp8": 1.6, "int4-g32": 2.2}  # times the speed of bfloat16, at batch 1


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"device", "dtype", "quick", "limits"} -> formats: right, then fast; caches of codes."""
    names = QUICK_SWEPT if job["quick"] else SWEPT
    own: dict[int, float] = {}  # tokens -> us of a layer in the model's format
    for name in names:
        yield f"quantised, {name}, against the reference", lambda name=name: is_right(job, name)
    for count in QUICK_BATCHES if job["quick"] else BATCHES:
        for name in names:
            text = f"quantised, {name}, a layer's products, {count} tokens"
            yield text, lambda name=name, count=count: speed(job, name, count, own)
    yield "quantised, options and odd sizes", lambda: odd(job)
    yield "quantised, experts", lambda: experts(job)
    for kv_dtype in KV_DTYPES:
        yield f"attention, cache of {kv_dtype}", lambda kv=kv_dtype: cached(job, kv)


def compile_ahead(job: dict[str, Any]) -> Iterator[Check]:
    """{"share": (i, n)} -> every n-th format's kernels."""
    first, every = job["share"]
    for name in (QUICK_SWEPT if job["quick"] else SWEPT)[first::every]:
        yield f"compile ahead, {name}", lambda name=name: compiled(job, name)


def compiled(job: dict[str, Any], name: str) -> dict[str, Any]:
    """The first inputs of a dtype compile all that others launch."""
    import torch

    device, dtype, ops = target(job)
    weight = ops.prepare_weight(random_weight(spec_of(name, 128, 1024), device))
    ops.linear(torch.zeros(1, 1024, device=device, dtype=dtype), weight)
    return {}


def spec_of(name: str, outs: int, ins: int) -> "Spec":
    from common.testing.kernels.quantized_cases import FORMATS

    spec = replace(FORMATS[name], out_features=outs, in_features=ins)
    return replace(spec, group=spec.group or ins)


def random_weight(spec: "Spec", device: "torch.device") -> "QuantizedWeight":
    """Made on the device: codes are any but E4M3's NaN."""
    import torch

    from common.testing.kernels.quantized_cases import make_weight

    template = make_weight(replace(spec, out_features=1))
    found = {}
    for name, like in template.tensors.items():
        size = (spec.out_features, *like.shape[1:])
        if name == "codes":
            codes = torch.randint(0, 112, size, dtype=torch.uint8, device=device)
            found[name] = codes.view(like.dtype)
        else:
            found[name] = (torch.rand(size, device=device) * 0.05 + 0.002).to(like.dtype)
    return replace(template, **found)


def is_right(job: dict[str, Any], name: str) -> dict[str, Any]:
    """The largest error of each number of tokens. Raises AssertionError where it is too large."""
    from common.testing.kernels.quantized_cases import TOLERANCES, linear_error

    device, dtype, ops = target(job)
    spec = spec_of(name, 330, 1024)
    counts = QUICK_TOKENS if job["quick"] else TOKENS
    errors = {f"error of {n}": linear_error(ops, spec, n, dtype, device) for n in counts}
    assert max(errors.values()) <= TOLERANCES[dtype], (spec, errors)
    return errors


def odd(job: dict[str, Any]) -> dict[str, Any]:
    from common.testing.kernels.quantized_cases import TOLERANCES, linear_error, linear_specs

    device, dtype, ops = target(job)
    errors = {}
    for spec, num_tokens in list(linear_specs())[:: 8 if job["quick"] else 1]:
        errors[spec.name] = linear_error(ops, spec, num_tokens, dtype, device)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}
    assert not wrong, wrong
    return {"num_cases": len(errors), "relative_error": max(errors.values())}


def experts(job: dict[str, Any]) -> dict[str, Any]:
    from common.testing.kernels.quantized_cases import TOLERANCES, expert_specs, experts_error

    device, dtype, ops = target(job)
    error = max(experts_error(ops, specs, 9, dtype, device) for specs in expert_specs())
    assert error <= 3 * TOLERANCES[dtype], error
    return {"relative_error": error}


def speed(job: dict[str, Any], name: str, count: int, own: dict[int, float]) -> dict[str, Any]:
    """Microseconds of a layer's products, GB/s of its weights, and times the model's own format."""
    import torch

    device, dtype, ops = target(job)
    shape = (QUICK_SHAPES if job["quick"] else SHAPES)[-1]
    with torch.inference_mode():
        if count not in own:
            own[count] = sum(us(job, case) for case in plain(ops, shape, count, device, dtype))
        cases = [product(ops, name, *sizes, count, device, dtype) for sizes in layer(shape)]
        total = sum(us(job, case) for case in cases)
    found = {
        "layer us": total,
        "GB/s": sum(case.num_bytes for case in cases) / total / 1e3,
        "own format us": own[count],
        "times": own[count] / total,
    }
    return found | ({"goal": GOALS[name]} if count == 1 and name in GOALS else {})


def layer(shape: Shape) -> list[tuple[int, int]]:
    return [(outs, ins) for name, outs, ins in shape.linears if name != "lm_head"]


def plain(
    ops: "Ops", shape: Shape, count: int, device: "torch.device", dtype: "torch.dtype"
) -> Iterator[Case]:
    """The products in the model's own format, made one after another."""
    from common.gpu_check.cases import Maker

    maker = Maker(shape, device, dtype)
    for outs, ins in layer(shape):
        yield maker.linear(ops, "plain", count, outs, ins)


def product(
    ops: "Ops",
    name: str,
    outs: int,
    ins: int,
    count: int,
    device: "torch.device",
    dtype: "torch.dtype",
) -> Case:
    spec = spec_of(name, outs, ins)
    weight = random_weight(spec, device)

    def make() -> Callable[[], object]:
        import torch

        x = torch.randn(count, ins, device=device, dtype=dtype)
        prepared = ops.prepare_weight(weight)
        return lambda: ops.linear(x, prepared)

    num_bytes = weight.nbytes + count * (outs + ins) * dtype.itemsize
    return Case(f"{name}, {count} x {outs} x {ins}", num_bytes, 2.0 * count * outs * ins, make)


def us(job: dict[str, Any], case: Case) -> float:
    device, dtype, _ = target(job)
    return timed(case.make(), case, dtype, device, job)["us"]


def cached(job: dict[str, Any], kv_dtype: str) -> dict[str, Any]:
    """Decode attention over a cache of codes and over one of the model's format: both against the
    reference, and their times."""
    import torch

    from common.kernels.quantized_kv import dequantize_rows, quantize_rows

    device, dtype, ops = target(job)
    num_seqs, num_tokens = (2, 40) if job["quick"] else (16, 4096)
    shape = Shape("", 0, 0, 32, 8, 128, 0)
    found, calls = {}, {}
    with torch.inference_mode():
        inputs = attention_inputs(shape, num_seqs, num_tokens, device, dtype)
        query, cache, metadata = inputs
        codes = quantize_rows(cache, getattr(torch, kv_dtype))
        rounded = dequantize_rows(codes).to(dtype)
        for name, data in (("codes", codes), ("own format", rounded)):
            calls[name] = lambda data=data: ops.attention(query, data, 0, metadata, 128**-0.5)
        a, b = calls["codes"]().float(), calls["own format"]().float()
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= 0.02, error
        for name, data in (("codes", codes), ("own format", rounded)):
            case = Case(name, data.nbytes, 0, lambda data=data: data)
            found[f"{name} us"] = timed(calls[name], case, dtype, device, job)["us"]
    times = found["own format us"] / found["codes us"]
    return {"relative_error": error, **found, "times": times}


def attention_inputs(
    shape: Shape, num_seqs: int, num_tokens: int, device: "torch.device", dtype: "torch.dtype"
) -> tuple[Any, Any, Any]:
    """(query, cache, metadata) of sequences that decode, blocks in random order."""
    import torch

    from common.kernels import AttentionMetadata

    each = -(-num_tokens // BLOCK_SIZE)
    tables = torch.randperm(num_seqs * each, device=device).int().reshape(num_seqs, each)
    sizes = (num_seqs * each, 1, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    lengths = torch.full((num_seqs,), num_tokens, dtype=torch.int32, device=device)
    slots = torch.arange(num_seqs, device=device)
    metadata = AttentionMetadata(starts, lengths, tables, slots, 1, num_tokens)
    query = torch.randn(num_seqs, shape.num_heads, shape.head_dim, device=device, dtype=dtype)
    return query, torch.randn(sizes, device=device, dtype=dtype), metadata
