"""Starts a program's process and shuts it in: descriptors, limits, user, files, system calls."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

from reasoner_ray.sandbox import landlock, linux, namespaces, processes, seccomp
from reasoner_ray.sandbox.job import Job
from reasoner_ray.sandbox.limits import Level

ERROR_DESCRIPTOR = 3
"""Where the program's process notes the exception that ended it (the number is also in ``runner.py``)."""
FIRST_SPARE_USER = 0x7000_0000
"""Ids from here on belong to nobody: one is lent to each program that root runs."""
NO_OTHER_USER = "root may not change to another user here"


class CannotConfine(Exception):
    """A program could not be started as asked; says why."""


class InsideProgram(BaseException):
    """Raised in the program's own process once it is shut in: from here on, nothing is to be done but to run it."""

    def __init__(self, runner: str, environment: dict[str, str]) -> None:
        super().__init__()
        self.runner, self.environment = runner, environment


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs."""

    pid: int  # also its process group
    stdout: int  # descriptors to read from
    stderr: int
    error: int  # what ``ERROR_DESCRIPTOR`` writes
    scratch: int  # descriptor of its scratch folder


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a program runs as."""

    user: int
    group: int
    is_lent: bool  # an id of its own: neither files nor processes of others belong to it


def choose_identity() -> Identity:
    """An id that nobody else has where this process may take one; else its own, but never that of root.

    Raises ``CannotConfine`` for a root that cannot take another: Linux limits no number of processes for it.
    """
    own = os.getuid()
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if linux.has_capabilities(linux.CAP_SETUID, linux.CAP_SETGID, linux.CAP_KILL, linux.CAP_SETPCAP):
        for first, _, count in ranges:
            if first <= FIRST_SPARE_USER and first + count > FIRST_SPARE_USER + (1 << 22):
                spare = FIRST_SPARE_USER + os.getpid()  # a process id is below 2^22: no two programs at a time share an id
                return Identity(spare, spare, is_lent=True)
            if count >= 1 << 16:  # a container with ids of its own
                spare = first + count - 1000 - os.getpid() % 4000
                return Identity(spare, spare, is_lent=True)
    if any(first <= own < first + count and outside + own - first == 0 for first, outside, count in ranges):
        raise CannotConfine(NO_OTHER_USER)
    return Identity(own, os.getgid(), is_lent=False)


def start(job: Job, identity: Identity) -> Program:
    """Write the scratch folder's files and start the program in it.

    Raises ``CannotConfine``, and in the program's own process ``InsideProgram``.
    """
    folder = namespaces.SCRATCH if job.level is Level.NAMESPACES else job.folder
    scratch = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for name, data in job.files.items():
        with open(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644, dir_fd=scratch), "wb") as file:
            file.write(data)
    if job.level is not Level.NAMESPACES and identity.is_lent:
        os.chown(scratch, identity.user, identity.group)
    pipes = [os.pipe() for _ in range(4)]  # stdout, stderr, the program's error, why it cannot be started
    (stdout, stderr, error, failed), ends = zip(*pipes, strict=True)
    threads = processes.threads_of_user(identity.user)
    pid = os.fork()
    if pid == 0:
        _shut_in(job, identity, folder, ends, threads)
        raise InsideProgram(job.runner, environment(folder))
    for descriptor in ends:
        os.close(descriptor)
    with open(failed, "rb") as pipe:
        problem = pipe.read(4096)  # ends without a word when the program is shut in
    if problem:
        raise CannotConfine(problem.decode("utf-8", "replace"))
    return Program(pid, stdout, stderr, error, scratch)


def _shut_in(job: Job, identity: Identity, folder: str, ends: tuple[int, ...], threads: int) -> None:
    """Confine this process; it ends here where that fails."""
    try:
        *texts, failed = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)  # out of the way of 0 to 4
        null = os.open("/dev/null", os.O_RDONLY)
        for descriptor, target in zip((null, *texts, failed), (0, 1, 2, ERROR_DESCRIPTOR, 4), strict=True):
            os.dup2(descriptor, target, inheritable=target < 3)
        os.closerange(5, os.sysconf("SC_OPEN_MAX"))
        os.setpgid(0, 0)
        os.chdir(folder)
        _limit_resources(job, threads)
        _drop_privileges(identity)
        if not os.access(os.__file__, os.R_OK):
            raise PermissionError(errno.EACCES, f"user {identity.user} may not read {os.__file__}")
        linux.set_memory_hidden(False)  # as after an exec; the launcher had hidden it
        linux.die_with_parent(signal.SIGKILL)
        linux.give_up_new_privileges()
        if job.level is Level.LANDLOCK:
            shown = (*namespaces.SYSTEM, *namespaces.SETTINGS, *namespaces.DEVICES, *job.readable)
            landlock.restrict(shown, job.hidden, (folder, "/dev/null"))
        if job.level is not Level.RLIMITS:
            guarded = job.level is not Level.NAMESPACES
            seccomp.install(seccomp.rules(guard_files=guarded, guard_signals=os.getpid() if guarded and not identity.is_lent else None))
        os.close(4)
    except Exception as error:  # noqa: BLE001 (whatever it is, the supervisor must hear of it)
        os.write(4, f"{type(error).__name__}: {error}".encode())
        os._exit(127)


def _limit_resources(job: Job, threads: int) -> None:
    limits = job.limits
    # Counted by user id. A lent id counts this program alone; in a user namespace the supervisor and its parent count
    # too; elsewhere all that the user runs does.
    processes_allowed = limits.processes + threads + 2
    for name, soft, hard in (
        (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),  # a signal, and a second later the end
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_NPROC, processes_allowed, processes_allowed),
        (resource.RLIMIT_FSIZE, limits.scratch_bytes, limits.scratch_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        allowed = resource.getrlimit(name)[1]
        ceiling = [value if allowed == resource.RLIM_INFINITY else min(value, allowed) for value in (soft, hard)]
        resource.setrlimit(name, (ceiling[0], ceiling[1]))


def _drop_privileges(identity: Identity) -> None:
    if linux.has_capabilities(linux.CAP_SETPCAP):
        linux.empty_bounding_set()
    if identity.is_lent:
        os.setgroups([])
        os.setresgid(identity.group, identity.group, identity.group)
        os.setresuid(identity.user, identity.user, identity.user)
    linux.drop_capabilities()


def environment(folder: str) -> dict[str, str]:
    """All that the program knows of its surroundings; numeric libraries would start a thread for every core."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "USER": "sandbox",
        **dict.fromkeys(("HOME", "TMPDIR"), folder),
        **dict.fromkeys(threads, "1"),
        "OMP_WAIT_POLICY": "passive",
        "MPLBACKEND": "agg",
    }


def problem_of_level(level: Level) -> str:
    """Why a level cannot even be tried on this machine; empty where it can."""
    if level in (Level.NAMESPACES, Level.LANDLOCK, Level.SECCOMP) and not seccomp.is_supported():
        return f"no table of system calls for {platform.machine()}"
    return ""
