"""`quality`: what number formats cost, each beside the same model as it is.

Every variant reads the same text and gives the probabilities of all tokens after each: how far these
are from the reference's (KL, in nats a token), how well the text was foreseen (perplexity), how often
both have the same first choice. It continues prompts greedily until it says something else than the
reference, and it answers questions. The reference is the model without quantisation in its own dtype.

    python -m common.bench quality --part 14 --quick
    python -m common.bench quality --part 14 --add "awq:model=FOLDER"

Of texts and questions see `common/texts`. Nothing here is timed.
"""

import argparse
import contextlib
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress_bar,
    settings_of,
)
from common.bench.core.processes import part_package
from common.bench.core.results import column, make_result
from common.bench.quality.probe import Probe
from common.bench.quality.questions import Question, answers, load_questions
from common.bench.quality.score import Scores, first_difference
from common.bench.quality.variants import (
    REFERENCE,
    Settings,
    check_settings,
    chosen_variants,
    own_variant,
)
from common.models.checkpoint import resolve
from common.models.errors import ModelError
from common.models.tokenizer import Tokenizer
from common.texts import EVALUATION, sections

ENGINE = {"prefix_cache": "off", "num_blocks": 512, "max_num_seqs": 16}
COLUMNS = [
    column("variant", "variant"),
    column("bits", "bits a weight", digits=2),
    column("weight_mb", "weights", "MB", 1),
    column("kv_bytes", "KV", "bytes a token", 0),
    column("perplexity", "perplexity", digits=2),
    column("kl", "KL", "nats", 4),
    column("same", "same first choice", "%", 1),
    column("divergence", "greedy tokens until they differ", digits=1),
    column("choices", "questions right", "%", 1),
    column("sums", "sums right", "%", 1),
]


@dataclass
class Work:
    """What all variants are given. reference: of each window, log probabilities [n, vocab]."""

    windows: list[list[int]]
    prompts: list[list[int]]
    questions: list[Question]
    num_greedy: int
    reference: list[torch.Tensor] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    num_params: float = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=14, help="default: 14")
    parser.add_argument("--variants", nargs="*", metavar="NAME", help="default: all that are known")
    text = "one more: NAME:KEY=VALUE,…, settings of the engine; model=FOLDER for another checkpoint"
    parser.add_argument("--add", type=own_variant, action="append", default=[], help=text)
    parser.add_argument("--text", type=Path, default=EVALUATION, help="UTF-8 (the shipped one)")
    parser.add_argument("--tokens", type=positive, default=1536, help="of it (default: 1536)")
    parser.add_argument("--window", type=positive, default=256, help="tokens (default: 256)")
    parser.add_argument("--greedy", type=positive, default=48, help="tokens (default: 48)")
    parser.add_argument("--quick", action="store_true", help="a third of all, few variants")
    add_engine_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    variants = chosen_variants(args)
    own = {"model": args.model, **ENGINE, **settings_of(args)}
    for name, settings in variants.items():
        try:
            check_settings(args.part, own | settings)
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from None
    work = prepare(args)
    rows, notes = [], []
    with progress_bar(len(variants) + 1, "variants") as advance:
        for name, settings in {REFERENCE: {}, **variants}.items():
            try:
                rows.append({"variant": name, **measure(args.part, own | settings, work)})
            except (ValueError, NotImplementedError) as error:
                if name == REFERENCE:
                    raise BenchError(f"{name}: {error}") from None
                rows.append({**dict.fromkeys([c["key"] for c in COLUMNS]), "variant": name})
                notes.append(f"{name} failed: {error}")
            advance(name)
    result = make_result(
        "Quality by number format",
        COLUMNS,
        rows,
        limits={"unmeasured": "nothing is timed"},
        parts=[args.part],
        notes=[remark(args, work), *notes],
    )
    finish(args, result)
    return 1 if notes else 0


def remark(args: argparse.Namespace, work: Work) -> str:
    """What was read and asked."""
    num_sums = sum(question.kind == "sum" for question in work.questions)
    num = sum(map(len, work.windows))
    return (
        f"Model {args.model}. {num} tokens of {args.text.name} in windows of {args.window};"
        f" {len(work.prompts)} prompts continued for {work.num_greedy} tokens;"
        f" {len(work.questions) - num_sums} questions and {num_sums} sums with four answers each, 25%"
        " by chance. KL: to the reference, the mean over tokens. Bits: bytes of all weights, scales,"
        " norms and embedding included, over their number."
    )


def prepare(args: argparse.Namespace) -> Work:
    """Windows from the text's sections in turn, prompts, questions. Raises ValueError."""
    folder = resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ModelError(f"model {args.model!r} has no tokenizer: its weights are random")
    share = 3 if args.quick else 1
    pieces = [
        [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)]
        for ids in map(tokenizer.encode, sections(args.text).values())
    ]
    turns = [piece[i] for i in range(max(map(len, pieces))) for piece in pieces if i < len(piece)]
    windows = turns[: -(-args.tokens // share // args.window)]
    if not windows or args.window < 2:
        raise ValueError(f"window is {args.window}: at least 2, and {args.text} must hold one")
    prompts = [window[: args.window // 4] for window in turns[: 8 // share]]
    questions = load_questions(lambda text: tokenizer.encode(text, False))[::share]
    return Work(windows, prompts, questions, -(-args.greedy // share))


def measure(part: int, settings: Settings, work: Work) -> dict[str, Any]:
    """A variant's row; the first one is the reference. Raises ValueError."""
    package = part_package(part)
    engine_module = importlib.import_module(f"{package}.engine")
    config = importlib.import_module(f"{package}.config").EngineConfig(**settings)
    with contextlib.redirect_stdout(sys.stderr):
        engine = engine_module.LLMEngine(config)
        try:
            return {**memory(engine, work), **measured(engine, work)}
        finally:
            engine.shutdown()


def memory(engine: Any, work: Work) -> dict[str, float]:
    num_bytes = engine.runner.num_weight_bytes
    if not work.num_params:  # the reference's weights are of its dtype
        work.num_params = num_bytes / engine.runner.dtype.itemsize
    kv = engine.kv
    return {
        "bits": 8 * num_bytes / work.num_params,
        "weight_mb": num_bytes / 1e6,
        "kv_bytes": kv.data.nbytes / (kv.num_blocks * kv.block_size),
    }


def measured(engine: Any, work: Work) -> dict[str, Any]:
    from common.sampling import SamplingParams

    probe, scores, is_reference = Probe(engine), Scores(), not work.reference
    for number, (logits, window) in enumerate(
        zip(probe.logits(work.windows), work.windows, strict=True)
    ):
        if is_reference:
            work.reference.append(logits.log_softmax(dim=-1))
        scores.add(logits, work.reference[number], torch.tensor(window))
    chosen = answers(work.questions, lambda sequences: probe.logits(sequences, last=True))
    params = SamplingParams(temperature=0, max_tokens=work.num_greedy, ignore_eos=True)
    done = engine.generate(work.prompts, params, progress=False)
    outputs = [list(completion.token_ids) for completion in done]
    if is_reference:
        work.greedy = outputs
    pairs = zip(outputs, work.greedy, strict=True)
    until = [first_difference(output, expected) for output, expected in pairs]
    return {
        "perplexity": scores.perplexity,
        "kl": scores.mean_kl,
        "same": scores.agreement,
        "divergence": sum(until) / len(until),
        "choices": percent_right(work.questions, chosen, "choice"),
        "sums": percent_right(work.questions, chosen, "sum"),
    }


def percent_right(questions: list[Question], chosen: list[int], kind: str) -> float | None:
    right = [q.answer == c for q, c in zip(questions, chosen, strict=True) if q.kind == kind]
    return 100 * sum(right) / len(right) if right else None
