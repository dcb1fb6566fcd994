"""`offload`: a host tier under the KV cache: what it saves, against computing anew.

burst      more sequences than the KV cache holds, all at once: swapped out, or computed twice
returning  conversations that come back when their blocks are long gone from the device
restart    the same conversations in a new process, with the disk tier and without
policies   LRU against ARC: what each keeps on the host, on three ways to come back
sleep      memory that a sleeping server gives back, and how soon it is awake again
"""

import argparse

from common.bench.offload import burst, policies, restart, returning, sleep

ACTIONS = {
    "burst": burst,
    "returning": returning,
    "restart": restart,
    "policies": policies,
    "sleep": sleep,
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
