"""A rank other than the first: `python -m part09.worker`, which rank 0 starts.

Its settings come as JSON on standard input. Under torchrun every rank is started as the server, and
those that are not the first end up here as well.
"""

import contextlib
import os
from typing import Any, NoReturn

from common.distributed import Ranks, run_worker
from common.models.checkpoint import resolve

from .config import EngineConfig
from .model_runner import ModelRunner
from .ranks import fingerprint, follow, together


def serve(config: dict[str, Any], ranks: Ranks) -> None:
    """Load this rank's part of the model, and follow rank 0 to its end."""
    settings = EngineConfig(**config)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        runner = ModelRunner(settings, resolve(settings.model), ranks)  # rank 0 tells what there is
    with together(ranks, runner.everyone):
        follow(runner)


def main() -> NoReturn:
    run_worker(serve, fingerprint)


if __name__ == "__main__":
    main()
