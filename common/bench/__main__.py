"""The command line: `python -m common.bench SUBCOMMAND --help`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.bench import BenchError

SUBCOMMANDS = {  # name: (module in common.bench, what it measures)
    "limits": ("core.limits", "measure what this machine can do"),
    "kernels": ("kernels.run", "each operation's kernels, against the limits"),
    "offline": ("offline", "a part's generate: prefill, decode, memory, start-up, MBU, MFU"),
    "ladder": ("ladder", "all parts on the same work, side by side"),
    "compare": ("compare", "a part beside transformers, vLLM or llama.cpp"),
    "serve": ("serving.serve", "load on an OpenAI-compatible server: TTFT, ITL, TPOT, E2E"),
    "servers": ("serving.servers", "a part's server beside vLLM's, under vLLM's load generator"),
    "engine-core": (
        "serving.engine_core",
        "a server's engine in a thread and in a process of its own",
    ),
    "arrival": ("serving.arrival", "what streams notice of a long prompt that comes in"),
    "prefix": ("prefix.run", "what a prefix cache finds and saves, on four workloads"),
    "attribution": ("attribution.run", "part 15 with each technique off in turn, on six workloads"),
    "life": ("life", "one request's life from socket to token, from a server's own trace"),
    "speculative": (
        "speculative.run",
        "decoding with and without speculation, on copies and on prose",
    ),
    "parallel": ("parallel.run", "ranks that work together: collectives, engines, a cost model"),
    "transfer": ("transfer", "KV between processes: each transport beside a plain copy"),
    "router": ("router.run", "several engines behind a router: what policies find; what it costs"),
    "offload": ("offload.run", "a host tier: bursts, conversations that return, restarts"),
    "quality": ("quality.run", "what number formats cost: KL, perplexity, questions"),
    "disagg": ("disagg.run", "long prompts among streams: prefill apart from decode, and not"),
    "formats": ("quantized.run", "number formats: bits, memory, start-up, speed, quality"),
    "kv": ("kv.run", "how many sequences a piece of KV memory holds, in strips and in blocks"),
    "host": ("host", "what a decode step costs the host"),
    "captured": ("captured", "decode steps replayed, and launched from Python, in turns"),
    "startup": ("startup", "how long parts take to start, and their memory"),
    "streaming": ("serving.streaming", "one part's whole responses against another's streams"),
    "report": ("core.report", "results as Markdown tables, in the READMEs too"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with one line and exit status 2 for wrong flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m common.bench",
        description="Measure the engines and the machine they run on.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for name, (place, text) in SUBCOMMANDS.items():
        module = importlib.import_module(f"common.bench.{place}")
        subparser = subparsers.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, prog=subparser.prog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2
    except BenchError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
