"""Memory given back to the system while its tensors live on, and had again when they are needed."""

from common.memory.device import DeviceMemory
from common.memory.errors import SleepError
from common.memory.host import HostMemory
from common.memory.process import held_bytes, release_unused
from common.memory.sleeping import SLEEPS, RankSleep, fall_asleep, wake_up
from common.memory.tensors import Memory, find_tensors, memory_of

__all__ = [
    "SLEEPS",
    "DeviceMemory",
    "HostMemory",
    "Memory",
    "RankSleep",
    "SleepError",
    "fall_asleep",
    "find_tensors",
    "held_bytes",
    "memory_of",
    "release_unused",
    "wake_up",
]
