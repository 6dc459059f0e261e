"""Landlock: a process gives up the right to open files outside a few folders, without any privilege (Linux 5.13).

Rights only ever grow smaller, and children inherit them. A process so confined can also no longer read the memory or
the environment of one that is not. What Landlock does not cover (modes, owners, times and attributes of files; before
version 3 truncation) is left to seccomp.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence

from reasoner_ray.sandbox import linux

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # numbers of the calls, on every architecture
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE | 1 << 15  # what a rule about a single file may name
_MAKE = 1 << 6 | 1 << 11  # character and block devices: never granted
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # file rights by version that brought them
_ALL_TCP = 0b11  # bind, connect; version 4
_SCOPES = 0b11  # abstract UNIX sockets, signals; version 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """Landlock's version on this machine. Raises ``OSError`` where Linux has none or it is switched off."""
    try:
        return linux.call("syscall", _CREATE, None, 0, _VERSION)
    except OSError as error:
        raise OSError(error.errno, "this kernel has no Landlock, or it is switched off") from error


def restrict(readable: Sequence[str], hidden: Sequence[str], writable: Sequence[str]) -> None:
    """Confine this process: ``readable`` may be read and run but for what is ``hidden``, ``writable`` may be changed.

    Paths that do not exist are passed over. The process must have given up new privileges.
    """
    known = version()
    rights = next(_RIGHTS[since] for since in sorted(_RIGHTS, reverse=True) if since <= known)
    ruleset = _Ruleset(rights, _ALL_TCP if known >= 4 else 0, _SCOPES if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8  # an older kernel takes a shorter structure
    descriptor = linux.call("syscall", _CREATE, ctypes.byref(ruleset), size, 0)
    try:
        for path, granted in visible(readable, hidden):
            _allow(descriptor, path, granted & rights)
        for path in writable:
            _allow(descriptor, path, rights & ~_MAKE)
        linux.call("syscall", _RESTRICT, descriptor, 0)
    finally:
        os.close(descriptor)


def visible(readable: Sequence[str], hidden: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Rules for the readable paths: a folder with something hidden below it may be listed, and its other entries read.

    Landlock knows no exceptions from a rule, so every neighbour of a hidden path gets a rule of its own.
    """
    secrets = [os.path.realpath(path) for path in hidden]
    pending = list(readable)
    while pending:
        path = pending.pop()
        real = os.path.realpath(path)
        if any(os.path.commonpath((secret, real)) == secret for secret in secrets):
            continue
        below = any(os.path.commonpath((secret, real)) == real for secret in secrets)
        if not below:
            yield path, _EXECUTE | _READ | _LIST
            continue
        yield path, _LIST
        with os.scandir(path) as entries:
            pending += [entry.path for entry in entries if not entry.is_symlink()]  # what a link leads to has its own rule or none


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            return  # what this process cannot reach, it need not be granted
        raise
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        rule = _PathBeneath(rights, descriptor)
        linux.call("syscall", _ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)
