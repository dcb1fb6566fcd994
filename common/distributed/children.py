"""The other ranks of this host, as child processes that end with rank 0, and are watched."""

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from common.distributed.health import Health

POLL = 0.1  # seconds between two looks at the processes
PR_SET_PDEATHSIG = 1
STATES = {
    "R": "runs",
    "S": "sleeps",
    "D": "waits for a device",
    "T": "is stopped",
    "t": "is traced",
    "Z": "has ended",
}
# What torchrun tells a process about its own ranks: not for the children that it starts itself.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Children:
    """Processes `python -m module`, one for each job, of rank 1, 2, …

    One thread starts them, passes on what they print, and reports the first that ends. A child's
    standard input brings its job as a line of JSON, and ends when this process does, however it
    ends: the child's life line. A stopped child cannot read it; the system kills that one when
    the thread that has started it ends, so the thread stays as long as the children do.
    """

    def __init__(
        self,
        module: str,
        jobs: list[dict[str, Any]],
        descriptors: list[list[int]],
        threads: int,
        health: Health,
    ) -> None:
        """descriptors: files that each child inherits. Raises OSError when none can be started."""
        self.processes: list[subprocess.Popen] = []
        self._last_error = [""] * len(jobs)
        self._rest = [b""] * len(jobs)  # the begin of a line
        self._health = health
        health.state_of = self.state_of
        self._started, self._closing = threading.Event(), threading.Event()
        self._start_error: OSError | None = None
        args = (module, jobs, descriptors, threads)
        self._thread = threading.Thread(target=self._run, args=args, name="ranks", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            self.close()
            raise self._start_error

    def close(self) -> None:
        """Kill the children that are left, and wait for their end."""
        self._closing.set()
        for process in self.processes:
            process.kill()
        self._thread.join()

    def state_of(self, rank: int) -> str | None:
        """What the system says of a rank's process, in some words; None if there is nothing."""
        if not 1 <= rank <= len(self.processes):
            return None
        return process_state(self.processes[rank - 1].pid)

    def _run(self, module: str, jobs: list, descriptors: list[list[int]], threads: int) -> None:
        try:
            for job, inherited in zip(jobs, descriptors, strict=True):
                self.processes.append(_start(module, job, inherited, threads))
        except OSError as error:
            self._start_error = error
            self._closing.set()
        self._started.set()
        try:
            self._watch()
        except Exception as error:  # the children end with this thread: that must be told
            self._health.report(f"the ranks are watched no longer: {error!r}")
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()

    def _watch(self) -> None:
        """Pass on the children's lines until they are to be closed."""
        with selectors.DefaultSelector() as selector:
            for i, process in enumerate(self.processes):
                os.set_blocking(process.stdout.fileno(), False)
                selector.register(process.stdout, selectors.EVENT_READ, i)
            while not self._closing.is_set():
                for key, _ in selector.select(POLL):
                    if not self._pass_on(key.data):
                        selector.unregister(key.fileobj)
                for i, process in enumerate(self.processes):
                    if process.poll() is not None and not self._closing.is_set():
                        while self._pass_on(i):
                            pass
                        self._health.report(self._how_ended(i))

    def _pass_on(self, i: int) -> bool:
        """Print what a child has printed; keep its `error:` line for the report. False at its end."""
        received = self.processes[i].stdout.readlines()
        lines = (self._rest[i] + b"".join(received)).splitlines(keepends=True)
        # What was read may end within a line, whose rest comes later, or never.
        is_cut = bool(received) and not lines[-1].endswith(b"\n")
        self._rest[i] = lines.pop() if is_cut else b""
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith("error: "):
                self._last_error[i] = text.removeprefix("error: ").strip()
            else:
                with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                    sys.stderr.write(text)
        return bool(received)

    def _how_ended(self, i: int) -> str:
        status = self.processes[i].returncode
        if status < 0:
            return f"rank {i + 1} was killed by {signal.Signals(-status).name}"
        said = self._last_error[i]
        return f"rank {i + 1} ended: {said}" if said else f"rank {i + 1} ended with status {status}"


def process_state(pid: int) -> str | None:
    """Whether a process runs, sleeps (and in which function of the kernel) or is stopped, and the CPU
    time that it has used; None where the system does not say."""
    folder = Path("/proc", str(pid))
    try:
        # Behind the name in parentheses: state, then 10 numbers, then its time in user and system.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        place = (folder / "wchan").read_text().strip()
    except OSError:
        return None
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    where = f" in {place}" if place not in ("", "0") else ""
    return f"process {pid} {STATES.get(fields[0], fields[0])}{where}, {seconds:.1f} s of CPU time"


def _start(
    module: str, job: dict[str, Any], inherited: list[int], threads: int
) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        env=environment,
        start_new_session=True,  # a Ctrl-C in the terminal is for rank 0 alone
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # ended at once: the watcher will say so
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return process


def read_job() -> dict[str, Any]:
    """In the child: its job. From now on it ends with rank 0. Exits when there is no rank 0."""
    line = bytearray()
    while not line.endswith(b"\n"):
        received = os.read(0, 1)
        if not received:
            os._exit(1)
        line += received
    job = json.loads(line)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(job["store"]).parent
    threading.Thread(target=_hold_life_line, args=(folder,), name="life line", daemon=True).start()
    return job


def _hold_life_line(folder: Path) -> None:
    """folder: where the ranks meet; left over when rank 0 is killed while they do."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
