"""`servers`: a part's server beside vLLM's, both under the same load.

Fresh servers take turns, in an order that is reversed every round. Each is warmed up, then given a closed
loop of each number of streams: random prompts on /v1/completions, greedy, streamed, ended by no token.
Both run in the same number format with their own defaults, but for the largest batch and the context.

    --client vllm   `vllm bench serve`, by the peer's Python (the default)
    --client serve  this project's `serve`

Ratios are the part's over the peer's, of servers measured one after the other, medians of the rounds. With
--variant the part is served once more with other fields of its EngineConfig:

    --peer vllm --peer-python /venvs/vllm/bin/python --variant "int4:quantization=int4,activations=int8"
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.compare import (
    Peer,
    add_peer_arguments,
    add_variant_argument,
    in_words,
    is_installed,
    peer_environment,
)
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.latencies import percentile
from common.bench.core.machine import usable_cores
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.pairs import paired_ratio
from common.bench.core.processes import PartServer, Server, last_line, run_worker
from common.bench.core.report import plural
from common.bench.core.results import column, make_result
from common.bench.core.workload import Lengths, random_work
from common.bench.serving.client import Target
from common.bench.serving.load import run_load, served_model
from common.bench.serving.serve import latency_samples

MEASURES = ("rate", "ttft_p50", "itl_p50", "itl_p99")
MEASURED = [
    column("streams", "streams", digits=0),
    column("rate", "output", "tok/s", 1),
    column("ttft_p50", "TTFT p50", "ms", 1),
    column("itl_p50", "ITL p50", "ms", 2),
    column("itl_p99", "ITL p99", "ms", 2),
]
COLUMNS = [
    column("server", "server"),
    *MEASURED,
    column("over_rate", "output / vLLM's", digits=2),
    column("over_ttft_p50", "TTFT p50 / vLLM's", digits=2),
    column("over_itl_p99", "ITL p99 / vLLM's", digits=2),
]
Samples = dict[tuple[str, int], dict[int, dict[str, float]]]  # by server and streams, then by round


def add_load_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The closed loops that are run on servers in turns."""
    parser.add_argument(
        "--streams", type=positive, nargs="+", default=[1, 16, 64], help="default: 1 16 64"
    )
    parser.add_argument("--prompt-len", type=positive, default=128, help="default: 128")
    parser.add_argument("--output-len", type=positive, default=64, help="default: 64")
    parser.add_argument(
        "--requests", type=positive, default=2, help="of each stream, at least 4 in all (2)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"servers of each (default: {rounds})"
    )
    parser.add_argument("--vocab-size", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=15, help="default: 15")
    add_peer_arguments(parser, ["vllm"])
    parser.add_argument("--client", choices=("vllm", "serve"), default="vllm", help="default: vllm")
    add_engine_arguments(parser)
    add_variant_argument(parser)
    add_load_arguments(parser, rounds=3)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if len(args.peers) > 1:
        raise ValueError("--peer may be given once here")
    [peer] = args.peers
    if not is_installed(peer):
        raise BenchError(f"{peer.name} is not installed for {peer.python}")
    ours = f"part {args.part:02d}"
    variants = {ours: {}, **{f"{ours}, {name}": chosen for name, chosen in args.variants}}
    names = [*variants, f"vLLM {peer.version}"]
    samples: Samples = {(name, count): {} for name in names for count in args.streams}
    turns = [(n, name) for n in range(args.rounds) for name in names[:: -1 if n % 2 else 1]]
    others = OtherWork()
    for number, name in progress(turns, "servers"):
        start = (
            partial(part_server, variants[name]) if name in variants else partial(peer_server, peer)
        )
        with start(args) as server:
            for count in args.streams:
                found = asyncio.run(measure(server.url, count, number, args, peer))
                samples[name, count][number] = found
    rows = [row(name, names[-1], count, samples) for count in args.streams for name in names]
    client = "`vllm bench serve`" if args.client == "vllm" else "`serve`"
    notes = [
        f"Model {args.model}, {args.prompt_len} tokens in, {args.output_len} out, greedy, streamed,"
        f" sent by {client}; {plural(args.rounds, 'fresh server')} of each, in turns.",
        *(f"{ours}, {name}: {in_words(chosen)}." for name, chosen in args.variants),
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = f"{ours.capitalize()}'s server beside vLLM's"
    result = make_result(title, COLUMNS, rows, limits=limits, parts=[args.part], notes=notes)
    finish(args, result)
    return 0


def part_server(variant: dict[str, Any], args: argparse.Namespace) -> Server:
    settings = {"max_num_seqs": max(args.streams)} | settings_of(args) | variant
    model = settings.pop("model", args.model)
    return PartServer(args.part, model, settings, verbose=args.verbose)


def peer_server(peer: Peer, args: argparse.Namespace) -> Server:
    from common.device import resolve_device
    from common.models.checkpoint import resolve

    settings = settings_of(args)
    _, dtype = resolve_device(settings.get("device", "auto"), settings.get("dtype", "auto"))
    flags = {
        "model": str(resolve(args.model)),
        "served-model-name": "model",
        "dtype": str(dtype).removeprefix("torch."),
        "max-num-seqs": str(max(args.streams)),
        "max-model-len": str(settings.get("max_model_len", 2048)),
        "host": "127.0.0.1",
        "port": str(free_port()),
    }
    command = [*peer.command, "serve", str(settings.get("threads", usable_cores()))]
    command += [text for name, value in flags.items() for text in (f"--{name}", value)]
    return Server("vLLM's server", command, peer_environment(), verbose=args.verbose)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def measure(
    url: str, count: int, number: int, args: argparse.Namespace, peer: Peer | None = None
) -> dict[str, float]:
    """A warm-up and a load on one server; the work depends on the round and the streams alone."""
    target = Target(url, model="", stream=True, body={"temperature": 0, "ignore_eos": True})
    target = Target(**{**vars(target), "model": await served_model(target)})
    total = max(4, args.requests * count)
    short = Lengths([args.prompt_len] * count, [4] * count)
    warmup = random_work(short, args.vocab_size, f"{args.seed} {number} {count} warm-up")
    await run_load(target, warmup, concurrency=count)
    if peer is not None and args.client == "vllm":
        return vllm_load(target, count, total, number, args, peer)
    lengths = Lengths([args.prompt_len] * total, [args.output_len] * total)
    work = random_work(lengths, args.vocab_size, f"{args.seed} {number} {count}")
    report = await run_load(target, work, concurrency=count)
    for record in report.requests:
        if record.error:
            raise BenchError(f"{count} streams: {record.error}: {record.detail}")
    latencies = latency_samples(report)
    return {
        "rate": report.token_rate("completion") or 0.0,
        "ttft_p50": percentile(latencies["TTFT"], 50),
        "itl_p50": percentile(latencies["ITL"], 50),
        "itl_p99": percentile(latencies["ITL"], 99),
    }


def vllm_load(
    target: Target, count: int, total: int, number: int, args: argparse.Namespace, peer: Peer
) -> dict[str, float]:
    """The same load from `vllm bench serve`. Raises BenchError where it fails or loses a request."""
    from common.models.checkpoint import resolve

    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "backend": "openai",
            "base-url": target.url,
            "endpoint": "/v1/completions",
            "model": target.model,
            "tokenizer": str(resolve(args.model)),
            "dataset-name": "random",
            "random-input-len": args.prompt_len,
            "random-output-len": args.output_len,
            "num-prompts": total,
            "max-concurrency": count,
            "seed": 1000 * args.seed + number,
            "temperature": 0,
            "percentile-metrics": "ttft,itl",
            "metric-percentiles": "50,99",
            "result-dir": folder,
            "result-filename": "result.json",
        }
        command = [*peer.command, "bench"]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        command += ["--ignore-eos", "--save-result", "--disable-tqdm"]
        environment = peer_environment() | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise BenchError(f"vllm bench serve failed: {last_line(done.stderr)}")
        found = json.loads((Path(folder) / "result.json").read_text())
    if found["completed"] != total:
        raise BenchError(f"{count} streams: {found['completed']} of {total} requests succeeded")
    return {
        "rate": found["output_throughput"],
        "ttft_p50": found["median_ttft_ms"],
        "itl_p50": found["median_itl_ms"],
        "itl_p99": found["p99_itl_ms"],
    }


def row(name: str, peer: str, count: int, samples: Samples) -> dict[str, Any]:
    rounds, beside = samples[name, count], samples[peer, count]
    values: dict[str, Any] = {
        n: statistics.median(found[n] for found in rounds.values()) for n in MEASURES
    }
    for measured in ("rate", "ttft_p50", "itl_p99"):
        ours, theirs = (
            {number: found[measured] for number, found in one.items()} for one in (rounds, beside)
        )
        ratio = paired_ratio(ours, theirs).median if name != peer else None
        values[f"over_{measured}"] = ratio
    return {"server": name, "streams": count, **values, "rounds": rounds}
