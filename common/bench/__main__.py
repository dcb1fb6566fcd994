"""The command line: `python -m common.bench SUBCOMMAND --help`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.bench import BenchError

SUBCOMMANDS = {
    "limits": "measure what this machine can do",
    "kernels": "each operation's kernels, against the limits",
    "offline": "a part's generate: prefill, decode, memory, start-up, MBU, MFU",
    "ladder": "all parts on the same work, side by side",
    "compare": "a part beside transformers, vLLM or llama.cpp",
    "serve": "load on an OpenAI-compatible server: TTFT, ITL, TPOT, E2E",
    "arrival": "what streams notice of a long prompt that comes in",
    "prefix": "what a prefix cache finds and saves, on four workloads",
    "speculative": "decoding with and without speculation, on copies and on prose",
    "kv": "how many sequences a piece of KV memory holds, in strips and in blocks",
    "startup": "how long parts take to start, and their memory",
    "streaming": "one part's whole responses against another's streams",
    "report": "results as Markdown tables, in the READMEs too",
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
    for name, text in SUBCOMMANDS.items():
        module = importlib.import_module(f"common.bench.{name}")
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
