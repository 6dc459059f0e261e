"""The processes of a sandbox, seen from its supervisor: who they are, what memory they hold, how they are all killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time

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
