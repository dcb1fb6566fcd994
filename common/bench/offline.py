"""`offline`: a part's `generate` in a fresh process: prefill, decode, start-up, memory, MBU, MFU.

`generate` returns when all is done, so prefill and decode are told apart by two runs over prompts
of the same lengths: one stops after the first token (t1), one goes on to the end (tn).

    prefill tokens/s = prompt tokens / t1
    decode tokens/s  = (tokens of the second run - one each) / (tn - t1)

t1 holds the first token's sampling too. Where a part mixes prefill and decode in one step the
split is a model, and the whole time is the number to trust. Decode MBU and MFU use the steps that
the batch size allows: 1 sequence in parts 01 and 02, else the engine's `max_num_seqs`.
"""

import argparse
import statistics
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    length_range,
    positive,
    setting,
    settings_of,
)
from common.bench.core.latencies import spread_percent
from common.bench.core.noise import disturbance
from common.bench.core.processes import part_package, run_worker
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.core.workload import Lengths, draw_lengths
from common.bench.costs import DTYPE_BYTES, ModelShape, decode_cost, prefill_flops

COLUMNS = [
    column("part", "part", digits=0),
    column("num_prompts", "prompts", digits=0),
    column("prompt_len", "tokens in", digits=0),
    column("output_len", "tokens out", digits=0),
    column("prefill_tps", "prefill", "tok/s"),
    column("decode_tps", "decode", "tok/s"),
    column("total_s", "whole time", "s", 2),
    column("total_spread", "spread", "%"),
    column("prefill_mfu", "prefill MFU", "%"),
    column("decode_mbu", "decode MBU", "%"),
    column("decode_mfu", "decode MFU", "%"),
    column("import_s", "import", "s", 2),
    column("construct_s", "build", "s", 2),
    column("peak_mib", "peak memory", "MiB", 0),
    column("anon_mib", "private", "MiB", 0),
    column("file_mib", "mapped files", "MiB", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, nargs="+", required=True, help="part numbers")
    add_engine_arguments(parser)
    parser.add_argument(
        "--variant",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="measure each part once more with this field of its EngineConfig, as a row of its own",
    )
    parser.add_argument("--num-prompts", type=positive, default=1, help="default: 1")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-len", type=positive, help="tokens of each prompt (default: 128)")
    prompt.add_argument("--input-range", type=positive, nargs=2, metavar=("MIN", "MAX"))
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--output-len", type=positive, help="tokens generated (default: 64)")
    output.add_argument("--output-range", type=positive, nargs=2, metavar=("MIN", "MAX"))
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--vocab-size", type=positive, help="draw token ids below this")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for part in args.part:
        part_package(part)  # an unknown part is told before minutes are spent on the others
    lengths = draw_lengths(
        args.num_prompts,
        length_range(args.input_range, args.prompt_len, 128),
        length_range(args.output_range, args.output_len, 64),
        args.seed,
    )
    job = {
        "job": "offline",
        "model": args.model,
        "lengths": {"prompt": lengths.prompt, "output": lengths.output},
        "repeats": args.repeats,
        "seed": args.seed,
        "vocab_size": args.vocab_size,
    }
    measured = [
        run_worker(
            {**job, "part": part, "settings": settings_of(args) | settings}, verbose=args.verbose
        )
        for part, settings in variants(args)
    ]
    device = measured[0]["device"].partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    finish(args, offline_result(args, lengths, measured, limits))
    return 0


def variants(args: argparse.Namespace) -> list[tuple[int, dict[str, Any]]]:
    """(part, settings beside --set) of each row."""
    return [
        (part, settings)
        for part in args.part
        for settings in [{}, *({k: v} for k, v in args.variant)]
    ]


def offline_result(
    args: argparse.Namespace,
    lengths: Lengths,
    measured: list[dict[str, Any]],
    limits: dict[str, Any],
) -> Result:
    notes = [
        f"Model {args.model}, {measured[0]['dtype']}, {measured[0]['device']}; medians of"
        f" {args.repeats} runs after a warm-up, greedy, one fresh process a part."
    ]
    rows = []
    for (part, settings), answer in zip(variants(args), measured, strict=True):
        row, reasons = offline_row(lengths, answer, limits)
        text = ", ".join(f"{key}={value}" for key, value in settings.items())
        rows.append({"part": part, "variant": text or "as it comes", **row})
        notes += [f"Part {part:02d}: {reason}." for reason in reasons]
    title = f"Offline generation, {plural(args.num_prompts, 'prompt')}"
    columns = [COLUMNS[0], column("variant", "settings"), *COLUMNS[1:]] if args.variant else COLUMNS
    return make_result(title, columns, rows, limits=limits, parts=args.part, notes=notes)


def offline_row(
    lengths: Lengths, answer: dict[str, Any], limits: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """One row, and remarks: why something is null in it, and what disturbed it."""
    runs, memory = answer["runs"], answer["memory"]
    first = [run["first"]["seconds"] for run in runs]
    total = [run["whole"]["seconds"] for run in runs]
    output = runs[0]["whole"]["output"]
    reasons = []
    if len(output) != len(lengths.prompt):
        raise BenchError(f"{len(lengths.prompt)} prompts gave {len(output)} completions")
    if output != lengths.output:
        reasons.append(f"generated {sum(output)} tokens of {sum(lengths.output)} asked for")
    decode_s = statistics.median(whole - start for whole, start in zip(total, first, strict=True))
    decoded = sum(output) - len(output)
    if decoded == 0:
        reasons.append("no decode speed, since one token each was asked for")
    elif decode_s <= 0:
        reasons.append("no decode speed, since its time is within the noise of the prefill's")
    if not memory:
        reasons.append("no memory, since this system has no /proc")
    if remark := disturbance(answer["other_cores"]):
        reasons.append(remark)
    prefill_s = statistics.median(first)
    measurable = decoded > 0 and decode_s > 0
    row = {
        "num_prompts": len(lengths.prompt),
        "prompt_len": sum(lengths.prompt) / len(lengths.prompt),
        "output_len": sum(output) / len(output),
        "prefill_s": prefill_s,
        "decode_s": decode_s if measurable else None,
        "prefill_tps": sum(lengths.prompt) / prefill_s,
        "decode_tps": decoded / decode_s if measurable else None,
        "total_s": statistics.median(total),
        "total_spread": spread_percent(total),
        "import_s": answer["import_s"],
        "construct_s": answer["construct_s"],
        "peak_mib": memory.get("peak_mib"),
        "anon_mib": memory.get("anon_mib"),
        "file_mib": memory.get("file_mib"),
        "other_cores": answer["other_cores"],
        "first_runs_s": first,
        "whole_runs_s": total,
    }
    shares, more = utilization(lengths.prompt, output, row, answer, limits)
    return row | shares, reasons + more


def utilization(
    prompt: list[int],
    output: list[int],
    row: dict[str, Any],
    answer: dict[str, Any],
    limits: dict[str, Any],
) -> tuple[dict[str, float | None], list[str]]:
    """MFU and MBU in percent against the measured limits; None with a reason where unknown."""
    nothing = dict.fromkeys(("prefill_mfu", "decode_mbu", "decode_mfu"))
    if answer["shape"] is None:
        return nothing, ["no MBU and MFU, since the model's config is not known"]
    try:
        shape = ModelShape.from_config(answer["shape"])
    except ValueError as error:
        return nothing, [f"no MBU and MFU, since {error}"]
    rate = matmul_rate(answer["dtype"], limits)
    reasons = []
    if rate is None:
        reasons.append(f"no MFU, since the {answer['dtype']} matrix rate was not measured")
    dtype_bytes = DTYPE_BYTES[answer["dtype"]]
    cost = decode_cost(shape, prompt, output, answer["max_num_seqs"], dtype_bytes)
    weights_mib = shape.params_read(1) * dtype_bytes / 2**20
    if weights_mib < (answer.get("cache_mib") or 0):
        reasons.append("the weights fit into the last-level cache, so MBU is no share of a limit")

    def share(work: float, seconds: float | None, limit: float | None) -> float | None:
        return 100 * work / seconds / limit if seconds and limit else None

    decode_s = row["decode_s"]
    return {
        "prefill_mfu": share(prefill_flops(shape, prompt), row["prefill_s"], rate),
        "decode_mbu": share(cost.num_bytes, decode_s, limits["read_gbps"] * 1e9),
        "decode_mfu": share(cost.flops, decode_s, rate),
    }, reasons


def matmul_rate(dtype: str, limits: dict[str, Any]) -> float | None:
    """The measured FLOP/s for a dtype, or None. fp16 runs at bf16's rate on a GPU's matrix units."""
    if dtype == "float32":
        return limits["fp32_gflops"] * 1e9
    return limits["bf16_tflops"] * 1e12 if limits["bf16_tflops"] else None
