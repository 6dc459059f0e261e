"""A world of its own for a program: namespaces in which nothing outside exists, and a root with little in it.

The root is a memory file system with the system's libraries, the interpreter and its packages (all read-only), a few
devices, the processes of the sandbox, and the scratch folder. Home folders, ``/tmp``, ``/dev/shm`` and ``/etc`` of the
host are not there at all.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from reasoner_ray.sandbox import linux
from reasoner_ray.sandbox.job import Job

SCRATCH = "/scratch"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
SETTINGS = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/ssl/openssl.cnf")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SPACES = linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWPID | linux.CLONE_NEWNET
_TIGHT = linux.MS_NOSUID | linux.MS_NODEV


def enter() -> None:
    """Leave the host's namespaces; the next child is the first process of a new world.

    A user without privileges gets them inside a user namespace that maps nobody but the user; root needs none.
    Raises ``OSError`` where this machine does not allow it.
    """
    if linux.has_capabilities(linux.CAP_SYS_ADMIN, linux.CAP_SETUID, linux.CAP_SETGID, linux.CAP_KILL):
        linux.unshare(_SPACES)
        return
    user, group = os.getuid(), os.getgid()
    if user == 0:  # in a user namespace it would still be root to the host, for which Linux limits no number of processes
        raise PermissionError(errno.EPERM, "root has no CAP_SYS_ADMIN here")
    linux.unshare(_SPACES | linux.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def build_root(job: Job, user: int, group: int) -> None:
    """Make and enter the root. The scratch folder belongs to ``user`` and ``group``; the rest is read-only."""
    root = job.folder
    linux.mount(None, "/", flags=linux.MS_REC | linux.MS_PRIVATE)  # no mount made here shows outside
    linux.mount("sandbox", root, "tmpfs", _TIGHT, "size=1m,mode=755")
    nothing = _make_nothing(root)
    for path in (*SYSTEM, *SETTINGS, *job.readable):
        _show(root, path)
    for path in job.hidden:
        _hide(root, path, job.readable, nothing)
    for device in DEVICES:
        if os.path.exists(device):
            _touch(root + device)
            linux.mount(device, root + device, flags=linux.MS_BIND)
    _mount_tmpfs(root + "/dev/shm", 16 << 20, 256, user, group)
    _mount_tmpfs(root + SCRATCH, job.limits.scratch_bytes, job.limits.scratch_files, user, group)
    if not os.path.exists(root + "/tmp"):  # the interpreter may lie there
        os.symlink(SCRATCH, root + "/tmp")
    os.mkdir(root + "/proc")
    flags = _TIGHT | linux.MS_NOEXEC
    linux.mount("proc", root + "/proc", "proc", flags)
    linux.enter_root(root)
    linux.add_mount_attributes("/", linux.ATTR_RDONLY, recursive=False)


def _make_nothing(root: str) -> tuple[str, str]:
    """An empty folder and an empty file that nobody can open, to lay over what is hidden."""
    folder, file = root + "/.nothing", root + "/.empty"
    os.mkdir(folder, 0)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0))
    return folder, file


def _show(root: str, path: str) -> None:
    """Have ``path`` of the host in the new root, read-only."""
    if not os.path.exists(path) or os.path.lexists(root + path):
        return  # the latter: it lies below a path that is there already
    if os.path.islink(path) and path in SYSTEM:  # /lib -> usr/lib
        os.symlink(os.readlink(path), root + path)
        return
    if os.path.isdir(path):
        os.makedirs(root + path)
    else:
        _touch(root + path)
    linux.mount(path, root + path, flags=linux.MS_BIND | linux.MS_REC)
    tight = linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV
    linux.add_mount_attributes(root + path, tight, recursive=True)


def _hide(root: str, path: str, readable: tuple[str, ...], nothing: tuple[str, str]) -> None:
    """Lay nothing over ``path``, under every name it has in the new root."""
    real = os.path.realpath(path)
    for shown in (*SYSTEM, *readable):
        base = os.path.realpath(shown)
        if os.path.exists(real) and os.path.commonpath((base, real)) == base:
            target = root + os.path.join(shown, os.path.relpath(real, base))
            linux.mount(nothing[0] if os.path.isdir(real) else nothing[1], target, flags=linux.MS_BIND)


def _mount_tmpfs(target: str, size: int, files: int, user: int, group: int) -> None:
    os.makedirs(target)
    linux.mount("scratch", target, "tmpfs", _TIGHT, f"size={size},nr_inodes={files},mode=700,uid={user},gid={group}")


def _touch(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
