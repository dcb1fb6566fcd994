"""`parallel`: several ranks as one engine: what they cost, measured here, and a model of it.

collectives  alpha and beta of each collective between ranks of this machine
engines      one engine with all threads, beside two ranks and two replicas with one thread each
layouts      the model's answer for 8 H200 and for 64 such hosts: which layout wins when
clients      the model's answer for many clients at once: what replicas, ranks and stages make of them
"""

import argparse

from common.bench.parallel import choices, clients, collectives, engines

ACTIONS = {
    "collectives": collectives,
    "engines": engines,
    "layouts": choices,
    "clients": clients,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, module in ACTIONS.items():
        action = actions.add_parser(
            name,
            help=(module.__doc__ or "").partition(": ")[2].partition(".")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(action)
        action.set_defaults(action=module.run)


def run(args: argparse.Namespace) -> int:
    return args.action(args)
