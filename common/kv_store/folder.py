"""A folder for one process: made if need be, closed to other users, locked."""

import fcntl
import os
import stat
from pathlib import Path

LOCK = "lock"


def open_folder(folder: Path, option: str) -> tuple[int, int]:
    """Descriptors of the folder and of the lock on it. Both are to be closed; a killed process
    leaves no lock behind.

    option: as the user calls it, for messages. Raises ValueError: the folder cannot be used, is
    another user's or open to others, or is in use by another process.
    """
    opened = -1
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        close_to_others(opened)
        return opened, lock_folder(opened)
    except (OSError, ValueError) as error:
        if opened >= 0:
            os.close(opened)
        if isinstance(error, BlockingIOError):
            reason = "is in use by another process"
        elif isinstance(error, OSError):
            reason = f"cannot be used: {error.strerror}"
        else:
            reason = str(error)
        raise ValueError(f"{option} {folder} {reason}") from error


def close_to_others(opened: int) -> None:
    """Make an empty folder 0700. Raises ValueError for one that has files and is open to others: it
    may be any folder, named by mistake."""
    status = os.fstat(opened)
    if status.st_uid != os.geteuid():
        raise ValueError("belongs to another user")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        if os.listdir(opened):
            raise ValueError(
                f"is open to other users (mode {mode:04o}); expected an empty folder or mode 0700"
            )
        os.fchmod(opened, 0o700)


def lock_folder(opened: int) -> int:
    """A descriptor that keeps other processes out while it is open. Raises OSError: BlockingIOError
    where another process has one."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = os.open(LOCK, flags, 0o600, dir_fd=opened)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
