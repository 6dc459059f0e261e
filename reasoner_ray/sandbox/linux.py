"""The Linux calls that a sandbox needs and Python lacks. Each raises ``OSError`` that names the call."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x4_0000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 0x1, 0x2, 0x4
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN = 5, 6, 7, 8, 21

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_CAPABILITY_VERSION_3 = 0x2008_0522
_SYS_MOUNT_SETATTR = 442  # of every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_LIBC: Any = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def call(function: str, *arguments: Any) -> int:
    """Call a function of the C library; integers are passed as longs."""
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = getattr(_LIBC, function)(*converted)
    if result == -1:
        number = ctypes.get_errno()
        what = f"syscall {arguments[0]}" if function == "syscall" else function
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return int(result)


def die_with_parent(signal_number: int) -> None:
    """Have Linux send this process the signal when the thread that started it ends. Undone by a change of user."""
    call("prctl", _PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def set_memory_hidden(hidden: bool) -> None:
    """Close this process's memory and environment to other processes of the same user, or open them again."""
    call("prctl", _PR_SET_DUMPABLE, int(not hidden), 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def give_up_new_privileges() -> None:
    """No later exec gains rights (setuid programs, file capabilities). Seccomp and Landlock ask for it."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def has_capabilities(*wanted: int) -> bool:
    """Whether this process holds all these capabilities."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    return all(held >> capability & 1 for capability in wanted)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def empty_bounding_set() -> None:
    """No exec may gain a capability again. Needs ``CAP_SETPCAP``."""
    for capability in range(64):
        try:
            call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # past the last one that this kernel knows


def drop_capabilities() -> None:
    """Give up every capability for good."""
    call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each
    call("capset", ctypes.byref(header), ctypes.byref(nothing))


def unshare(flags: int) -> None:
    """Move this process (with ``CLONE_NEWPID``: its next children) into new namespaces."""
    call("unshare", flags)


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """mount(2)."""
    source_, kind_, options_ = (None if text is None else text.encode() for text in (source, kind, options))
    try:
        call("mount", source_, target.encode(), kind_, flags, options_)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or 'bind'} of {source or target} at {target})") from error


class _MountAttributes(ctypes.Structure):
    _fields_ = (("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64), ("user_ns", ctypes.c_uint64))


def add_mount_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    """Tighten a mount, and with ``recursive`` those below it too. Linux 5.12."""
    request = _MountAttributes(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(request), ctypes.sizeof(request))


def enter_root(folder: str) -> None:
    """Make a mount point the root of this mount namespace and forget the old root."""
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root: unknown on {os.uname().machine}")
    os.chdir(folder)
    call("syscall", number, b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
