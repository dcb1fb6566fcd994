"""`python -m common.testing.kernels.triton_interpreted`: Triton's kernels in its interpreter, on the CPU.

A process of its own, since the variable must be set before Triton is imported. Prints the results of
`check_all` as one line of JSON. bfloat16 is left out: the interpreter's products of it are wrong.
The interpreter takes milliseconds for each program, so without `--all`, which runs every case as a GPU
does, some are left out and the sampler's have fewer rows.
"""

import dataclasses
import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from common.kernels.triton.ops import TritonOps
from common.testing.kernels.all_cases import check_all
from common.testing.kernels.case import Case

# Attention in float16: what the number format changes. Sizes and lengths are shown in float32.
HALF = ("decode", "prefill", "mixed", "drafts", "large scores", "decode, int8 cache")
# Two of a kind: another case with the same branch of a kernel is run.
TWINS = (
    "mixed, head size 80", "window beyond all", "window of 1", "loose bounds", "drafts and prompts",
    "drafts, block size 512", "1000 tokens, spread 100.0", "odd logits, 3e+38", "all choose one",
)  # fmt: skip


def is_left_out(case: Case, dtype: torch.dtype) -> bool:
    is_half = dtype == torch.float16 and case.op == "attention" and case.name not in HALF
    return is_half or case.name in TWINS


def main() -> None:
    torch.set_num_threads(1)  # small tensors, and others may be at work
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, on exp(-inf) and the like
    short = None if "--all" in sys.argv else is_left_out
    formats = [torch.float32, torch.float16]
    results = check_all(TritonOps(), "cpu", formats, is_left_out=short)
    print(json.dumps([dataclasses.asdict(result) for result in results]))


if __name__ == "__main__":
    main()
