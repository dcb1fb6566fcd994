"""Memory given back to the system while its tensors live on, and had again when they are needed."""

from common.memory.device import DeviceMemory
from common.memory.errors import SleepError
from common.memory.host import HostMemory
from common.memory.process import held_bytes, release_unused
from common.memory.tensors import Memory, find_tensors, memory_of

__all__ = [
    "DeviceMemory",
    "HostMemory",
    "Memory",
    "SleepError",
    "find_tensors",
    "held_bytes",
    "memory_of",
    "release_unused",
]
