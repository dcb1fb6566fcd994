"""Compile the quantised products for a GPU that is not there: `triton_compile.py` with weights of formats.

`python -m common.testing.kernels.quantized_compile ARCHITECTURE DTYPE TOKENS [FORMAT ...]` prints a line of
JSON for each product that so many tokens launch (0: any number of them), with the format in front.
"""

import json
import sys
from dataclasses import asdict, replace

import torch

from common.kernels.triton import quantized_linear
from common.kernels.triton.quantized_weight import pack
from common.testing.kernels.fake_gpu import ARCHITECTURES, fake_gpu
from common.testing.kernels.quantized_cases import FORMATS, make_weight
from common.testing.kernels.triton_compile import compiled_kernels

SHAPE = (128, 1024)  # of which nothing that is compiled depends


def main() -> None:
    architecture, dtype, num_tokens, *formats = sys.argv[1:]
    assert architecture in ARCHITECTURES, architecture
    known: set[str] = set()
    with fake_gpu(architecture) as fake:
        for name in formats or FORMATS:
            spec = replace(FORMATS[name], out_features=SHAPE[0], in_features=SHAPE[1])
            spec = replace(spec, group=spec.group or SHAPE[1])
            weight, like = pack(make_weight(spec)), getattr(torch, dtype)
            if int(num_tokens):
                x = torch.zeros(int(num_tokens), SHAPE[1], dtype=like)
                quantized_linear.linear(x, weight, None)
            else:
                quantized_linear.compile_all(like, weight, None)
            for found in compiled_kernels(fake):
                line = json.dumps(asdict(found), default=str)
                if found.kernel == "product_kernel" and line not in known:
                    print(json.dumps({"format": name, **asdict(found)}, default=str), flush=True)
                known.add(line)


if __name__ == "__main__":
    main()
