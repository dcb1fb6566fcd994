"""`python -m common.testing.kernels.triton_interpreted`: Triton's kernels in its interpreter, on the CPU.

A process of its own, since the variable must be set before Triton is imported. Prints the results of
`check_all` as one line of JSON. bfloat16 is left out: the interpreter's products of it are wrong.
"""

import dataclasses
import json
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from common.kernels.triton.ops import TritonOps
from common.testing.kernels.all_cases import check_all


def main() -> None:
    torch.set_num_threads(1)  # small tensors, and others may be at work
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, on exp(-inf) and the like
    results = check_all(TritonOps(), "cpu", [torch.float32, torch.float16])
    print(json.dumps([dataclasses.asdict(result) for result in results]))


if __name__ == "__main__":
    main()
