"""What the machine is: cores that may be used, instructions that matter, memory, GPU, versions.

Counts are what this process may use, not what the hardware has: a container with two of 64 cores
is a machine with two cores. What cannot be read is None.
"""

import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ISA_FLAGS = {  # what lscpu prints -> what people call it
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
PACKAGES = ("torch", "transformers", "numpy", "numba", "triton")


def machine() -> dict[str, Any]:
    """Facts about this machine; memory in GiB. `gpus` is a list, empty where there is none."""
    facts = cpu_facts()
    return {
        "cpu": facts["model"],
        "cores": usable_cores(),
        "isa": facts["isa"],
        "cache_mib": last_level_cache_mib(),
        "memory_gib": memory_gib(),
        "gpus": gpus(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide speed; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut to the control group's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota() -> float | None:
    """The control groups' limit in cores (version 1 or 2), or None where there is none."""
    quotas = []
    for text in cgroup_files("cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota != "max":
            quotas.append(int(quota) / int(period))
    periods = cgroup_files("cpu", "cpu.cfs_period_us")
    for quota, period in zip(cgroup_files("cpu", "cpu.cfs_quota_us"), periods, strict=False):
        if int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_gib() -> float | None:
    """Memory this process may use: the machine's, cut to the control group's limit. GiB."""
    limits = []
    for line in read_text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    for name in ("memory.max", "memory.limit_in_bytes"):
        limits += [int(text) for text in cgroup_files("memory", name) if text != "max"]
    return round(min(limits) / 2**30, 1) if limits else None


def cgroup_files(controller: str, name: str) -> list[str]:
    """Contents of the file `name` in this process's control group and all groups above it."""
    texts = []
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / controller if controllers else Path("/sys/fs/cgroup")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            text = read_text(folder / name)
            if text:
                texts.append(text)
            if folder == root:
                break
    return texts


def cpu_facts() -> dict[str, Any]:
    """Model name and the instruction sets of `ISA_FLAGS` it has."""
    model, flags = None, set()
    for line in read_text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and model is None:
            model = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = set(value.split())
    return {
        "model": model or platform.processor() or platform.machine(),
        "isa": [label for flag, label in ISA_FLAGS.items() if flag in flags],
    }


def last_level_cache_mib() -> float | None:
    """Size of the largest cache of core 0 in MiB; in a virtual machine it may be the host's."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = read_text(path)
        if text[-1:] in ("K", "M") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) / (1024 if text[-1] == "K" else 1))
    return max(sizes, default=None)


def gpus() -> list[dict[str, Any]]:
    """Name, driver and memory (GiB) of each NVIDIA GPU, as nvidia-smi tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in output.stdout.splitlines():
        name, driver, memory = (field.strip() for field in line.split(","))
        size = round(int(memory) / 1024, 1) if memory.isdigit() else None
        found.append({"name": name, "driver": driver, "memory_gib": size})
    return found


def read_text(path: str | Path) -> str:
    """The stripped text of a file, empty where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
