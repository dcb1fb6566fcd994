"""What memory a process and its children use, from /proc; elsewhere the answer is None.

The peak is VmHWM and not getrusage's ru_maxrss: Linux carries the latter over from the process
that forked, so a child of a big harness would look big itself.
"""

from pathlib import Path

MEMORY_KEYS = {
    "VmHWM": "peak_mib",
    "VmRSS": "rss_mib",
    "RssAnon": "anon_mib",
    "RssFile": "file_mib",
}


def tree_memory(pid: int) -> dict[str, float | None]:
    """MiB of a process and its descendants, summed; None where /proc does not tell.

    `peak_mib` is the most each has had resident. `anon_mib` is private (heap, KV cache),
    `file_mib` mapped from files (weights, libraries), which other processes may share. `pss_mib`
    divides shared pages by their users, so that a sum counts each page once.
    """
    keys = [*MEMORY_KEYS.values(), "pss_mib"]
    total: dict[str, float | None] = dict.fromkeys(keys)
    for member in [pid, *descendants(pid)]:
        for key, value in process_memory(member).items():
            total[key] = (total[key] or 0) + value
    return {key: None if value is None else round(value, 1) for key, value in total.items()}


def process_memory(pid: int | str = "self") -> dict[str, float]:
    """MiB of one process, from /proc; keys that cannot be read are left out."""
    found = {}
    for name, keys in (("status", MEMORY_KEYS), ("smaps_rollup", {"Pss": "pss_mib"})):
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key in keys:
                found[keys[key]] = int(value.split()[0]) / 1024
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found
