"""The command line of models.

`python -m common.models [MODEL]` has a model there, and prints its folder.
`python -m common.models upcycle MODEL OUT --experts 8 --top-k 2` makes a mixture of experts of a dense
model, in the new folder OUT (see `upcycle`).
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from common.device import DTYPES
from common.models.checkpoint import BUILT_IN, resolve
from common.models.errors import ModelError


def main(arguments: list[str]) -> None:
    """Raises ModelError."""
    if arguments[:1] != ["upcycle"]:
        print(resolve(arguments[0] if arguments else BUILT_IN))
        return
    from common.models.upcycle import Mixture, upcycle

    parser = argparse.ArgumentParser("python -m common.models upcycle", description="")
    parser.add_argument("model", help="a dense model, named as --model is")
    parser.add_argument("out", type=Path, help="the folder to be made")
    parser.add_argument("--experts", type=int, default=8, help="in each layer (%(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (%(default)s)")
    text = "what pairs of experts differ by, of a weight's standard deviation (%(default)s)"
    parser.add_argument("--noise", type=float, default=0.0, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of routers and noise (%(default)s)")
    formats = [name for name in DTYPES if name != "auto"]
    parser.add_argument("--dtype", choices=formats, default="float32", help="(%(default)s)")
    flags = parser.parse_args(arguments[1:])
    import torch

    dtype = getattr(torch, flags.dtype)
    mixture = Mixture(flags.experts, flags.top_k, flags.noise, flags.seed, dtype)
    with tqdm(desc="Tensors", unit="") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        upcycle(flags.model, flags.out, mixture, progress=progress)
    print(flags.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ModelError as failure:
        sys.exit(f"error: {failure}")
