"""A replica's process: told what to run by one line of JSON, and ended with its standard input."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from common.http.run import ServerConfig, serve


def serve_job(build: Callable[[dict[str, Any], ServerConfig], FastAPI]) -> None:
    """Serve what the job on standard input asks for: {"engine": …, "server": …, "grace": seconds}.

    Ends with one line on standard error where the job has no key: nobody but the router may use
    a replica.
    """
    line = sys.stdin.readline()
    if not line:
        sys.exit("error: a job in JSON is needed on standard input")
    job = json.loads(line)
    try:
        config = ServerConfig(**job["server"])
        if config.api_key is None:
            raise ValueError("api_key is needed: only the router may use a replica")
    except ValueError as error:
        sys.exit(f"error: {error}")
    threading.Thread(target=end_with_input, args=(job["grace"],), daemon=True).start()
    serve(lambda: build(job["engine"], config), config)


def end_with_input(grace: float) -> None:
    """grace: seconds to finish what runs, after which the process ends whatever it does."""
    while sys.stdin.read(1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(1)
