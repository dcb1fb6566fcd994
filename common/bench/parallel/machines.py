"""Machines and models that the cost model is asked about, and where their numbers are from.

What a data sheet promises is not what a kernel gets. `REACHED_BANDWIDTH` and `REACHED_FLOPS` are
the shares that good kernels are taken to reach; they are assumptions, and the largest that the
model makes. Results that change with them are no results: the notebook varies them.
"""

from dataclasses import dataclass

from common.bench.costs import ModelShape
from common.bench.parallel.links import Fabric, Link
from common.models.presets import PRESETS

REACHED_BANDWIDTH = 0.8
REACHED_FLOPS = 0.7


@dataclass(frozen=True)
class Device:
    """What one rank computes with. Rates are what it reaches while all other ranks are busy too.

    kernel_s: what a kernel takes however little it does. step_s: of a step, beside its kernels.
    """

    memory_bytes: float
    read_bytes_per_s: float
    flops_per_s: float
    kernel_s: float
    step_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Ranks that are alike, and what is between them."""

    name: str
    num_ranks: int
    device: Device
    fabric: Fabric


H200 = Device(
    memory_bytes=141e9,
    read_bytes_per_s=REACHED_BANDWIDTH * 4.8e12,
    flops_per_s=REACHED_FLOPS * 989e12,
    kernel_s=2e-6,
)
"""NVIDIA's data sheet of the H200 SXM: 141 GB, 4.8 TB/s, 989 TFLOP/s in bf16 without sparsity.
kernel_s: with CUDA graphs, a round assumption."""

NVLINK = Link(call_s=6.6e-6, hop_s=0.6e-6, bytes_per_s=0.8 * 450e9)
"""NVLink 4 of the data sheet: 900 GB/s, half of it in each direction. The latencies are those by which
NCCL chooses its algorithms (src/graph/tuning.cc: 6.6 us for a ring in the LL protocol, 0.6 us a hop)."""

INFINIBAND = Link(call_s=6.6e-6, hop_s=2.7e-6, bytes_per_s=0.8 * 50e9)
"""A 400 Gb/s adapter for each GPU; 2.7 us a hop (NCCL, as above). 0.8 is fitted: with it the model is
near to what DeepEP publishes of its all-to-all on such adapters (tests/test_bench_parallel.py)."""

HOST = Machine("8 H200 in one host", 8, H200, Fabric(8, NVLINK, INFINIBAND))
CLUSTER = Machine("64 hosts of 8 H200", 512, H200, Fabric(8, NVLINK, INFINIBAND))

MODELS = {
    "Qwen3-8B": ModelShape.from_config(PRESETS["qwen3-8b"]),
    "Qwen3-30B-A3B": ModelShape.from_config(PRESETS["qwen3-30b-a3b"]),
    "Llama-3.1-70B": ModelShape(
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=28672,
        vocab_size=128256,
    ),
    "Qwen3-235B-A22B": ModelShape(
        num_layers=94,
        hidden_size=4096,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=1536,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_token=8,
    ),
}
"""The shapes that the models' config.json files say. All have an output matrix of their own."""
