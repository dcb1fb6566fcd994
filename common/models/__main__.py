"""The command line: `python -m common.models [MODEL]` has a model there, and prints its folder."""

import sys

from common.models.checkpoint import BUILT_IN, resolve
from common.models.errors import ModelError

if __name__ == "__main__":
    try:
        print(resolve(sys.argv[1] if len(sys.argv) > 1 else BUILT_IN))
    except ModelError as failure:
        sys.exit(f"error: {failure}")
