"""A rank other than the first: `python -m part09.worker`, which rank 0 starts.

Its settings come as JSON on standard input. Under torchrun every rank is started as the server, and
those that are not the first end up here as well.
"""

import contextlib
import os
import sys

from common.distributed.group import RankError
from common.distributed.launch import Ranks, join
from common.models.checkpoint import resolve

from .config import EngineConfig
from .model_runner import ModelRunner
from .ranks import follow, start_ranks


def run(config: EngineConfig, ranks: Ranks) -> None:
    """Load this rank's part of the model, and follow rank 0 to its end."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        runner = ModelRunner(config, resolve(config.model), ranks)  # rank 0 says what is to be said
    follow(runner)


def main(config: EngineConfig | None = None) -> None:
    """config: under torchrun, where each rank has the command line. Ends the process."""
    try:
        if config is not None:
            ranks = start_ranks(config, resolve(config.model))
        else:
            settings, ranks = join()
            config = EngineConfig(**settings)
        run(config, ranks)
    except (ValueError, RankError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
