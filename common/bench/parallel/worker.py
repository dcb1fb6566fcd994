"""The other ranks of `parallel collectives`: `python -m common.bench.parallel.worker`, by rank 0."""

from common.bench.parallel.measure import obey
from common.distributed.launch import run_worker

if __name__ == "__main__":
    run_worker(lambda config, ranks: obey(ranks), lambda config: {})
