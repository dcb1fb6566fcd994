"""One of several HTTP processes in front of one engine core: `python -m part15.api_server`.

`python -m part15.server --api-server-count 2` starts two of them. Each gets its settings as JSON on
standard input.
"""

from common.http.workers import run_worker

from .config import EngineConfig
from .server import create_app

if __name__ == "__main__":
    run_worker(EngineConfig, create_app)
