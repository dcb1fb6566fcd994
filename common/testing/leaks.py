"""What a process holds, to be compared before and after: it may become less, never more.

Less, since a test's process may close what earlier tests have left to the garbage collector; and names in
/dev/shm come and go with other processes.
"""

import os


def open_files() -> set[str]:
    """Descriptors of this process by number."""
    return set(os.listdir("/proc/self/fd"))


def shared_names() -> set[str]:
    """Names in /dev/shm, but for those of Python's multiprocessing: no part uses it, other programs of
    the machine do."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}
