"""Rank 0 for the tests of `common.distributed`, in a process that they may kill.

`python -m common.testing.ranks.server SIZE TIMEOUT SUMS`, or the same started by torchrun. It prints
a line of JSON with the processes' ids when all ranks have met, sums SUMS times (-1: without end),
prints the last sum, and ends; an error is one line, and status 1.
"""

import json
import sys

import psutil
import torch

from common.distributed import RankError, connect, launched_rank, run_worker
from common.testing.ranks.worker import SUM, fingerprint, obey, serve


def main() -> int:
    size, timeout, num_sums = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    if launched_rank() > 0:
        run_worker(serve, fingerprint)
    try:
        ranks = connect(
            "common.testing.ranks",
            {},
            torch.device("cpu"),
            size=size,
            timeout=timeout,
            fingerprint={},
        )
        ranks.loaded()
        children = psutil.Process().children(recursive=True)
        print(json.dumps({"children": [child.pid for child in children]}), flush=True)
        last = None
        while num_sums != 0:
            ranks.control.send([SUM])
            last = obey([SUM], ranks.group)
            num_sums -= 1
        ranks.close()
        print(json.dumps({"sum": last.tolist()}), flush=True)
    except (ValueError, RankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
