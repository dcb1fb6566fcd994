"""Which formats a chip has no arithmetic for, so that an engine can say so when it starts."""

import torch

FP8_SINCE, FP4_SINCE = (8, 9), (10, 0)  # compute capability of a GPU


def capability(device: torch.device | str) -> tuple[int, int] | None:
    """None: a CPU."""
    device = torch.device(device)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_fp8(device: torch.device | str) -> bool:
    """Whether there are products of FP8 numbers."""
    found = capability(device)
    return found is not None and found >= FP8_SINCE


def emulation(kind: str, activations: str | None, device: torch.device | str) -> str | None:
    """How products are computed where the chip has none of the format; None: it has, or the format
    has none anywhere.

    kind, activations: of `QuantizedWeight`. Products of integers are never emulated; NF4 is a table
    and no chip's format. FP4 weights are multiplied by inputs of 16 bits on every GPU.
    """
    found = capability(device)
    if found is None:
        if kind in ("fp8_e4m3", "fp4_e2m1", "nf4") or activations == "fp8":
            return "computed in float32 after unpacking"
        return None
    number = f"{found[0]}.{found[1]}"
    if kind == "fp4_e2m1":
        units = "has" if found >= FP4_SINCE else "has no"
        return f"unpacked to 16 bits in the product; compute capability {number} {units} FP4 units"
    if kind == "nf4":
        return "unpacked to 16 bits in the product, by a table"
    if activations == "fp8" and found < FP8_SINCE:
        return f"FP8 inputs are rounded, products are of 16 bits: compute capability {number} has no FP8 units"
    if activations is not None and kind == "fp8_e4m3" and activations == "int8":
        return "INT8 inputs are rounded, products are of 16 bits"
    return None
