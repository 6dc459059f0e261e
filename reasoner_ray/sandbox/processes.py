"""The processes of a sandbox, seen from its supervisor: who they are, what memory they hold, how they are all killed."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import stat
import time
from collections.abc import Iterator

MAX_DEPTH = 100
_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants() -> list[int]:
    """Ids of all processes below this one. Orphans count, where this process adopts them."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # it may end meanwhile
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found: list[int] = []
    last = {os.getpid()}
    while last:
        last = {pid for pid, parent in parents.items() if parent in last}
        found += last
    return found


def count_threads(pids: list[int]) -> int:
    """Threads of these processes, each process counting at least once."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def threads_of_user(user: int) -> int:
    """Threads that count against this user's limit of processes."""
    pids = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                pids.append(int(name))
    return count_threads(pids)


def memory(pids: list[int], limit: int) -> int:
    """Bytes that these processes hold, without mapped files.

    Pages that a fork shares are counted for each process in a first, cheap sum; past ``limit`` they are counted once.
    """
    total = sum(_resident(pid) for pid in pids)
    return total if total <= limit else sum(_proportional(pid) for pid in pids)


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
        fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith((b"Pss_Anon:", b"Pss_Shmem:")))
    return _resident(pid)  # it ended, or closed its memory to this process: then the larger number stands


def files_below(folder: str) -> Iterator[float]:
    """Bytes on disk of every entry below a folder that is being written to; links are not followed.

    A tree deeper than ``MAX_DEPTH`` counts as infinitely large: nobody needs one, and looking through it takes long.
    """
    pending = [(folder, 0)]
    while pending:
        path, depth = pending.pop()
        if depth > MAX_DEPTH:
            yield math.inf
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                size = 0
                with contextlib.suppress(OSError):  # removed meanwhile
                    size = entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
                yield size


def deleted_files(pids: list[int]) -> int:
    """Bytes on disk of files that have no name any more, but that these processes hold open."""
    held = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(f"/proc/{pid}/fd/{name}")
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        held[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(held.values())


def kill_all(group: int, *, own_world: bool, seconds: float = 10.0) -> bool:
    """Kill every descendant and wait for its end; False where some are still there after ``seconds``.

    ``own_world``: this is the first process of a PID namespace, and everything in it is to end.
    """
    deadline = time.monotonic() + seconds
    while True:
        if own_world:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # at once: none can fork away
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)  # at once too, and seccomp lets none leave the group
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
