"""A seccomp filter: system calls that generated code has no use for answer with an error. x86_64 and aarch64.

Written as a BPF program because nothing kept up to date on PyPI does it without a system library (libseccomp) that a
machine may lack. The filter lets everything pass but what is listed: which calls an interpreter and its numeric
libraries make changes with every release, which calls reach out of a process does not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from reasoner_ray.sandbox import linux

# Numbers of the calls on x86_64 and aarch64 (None: the architecture lacks the call), from Linux's own tables.
_Numbers = dict[str, tuple[int | None, int | None]]
_NETWORK: _Numbers = {"socket": (41, 198)}
_ESCAPES: _Numbers = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433), "fsconfig": (431, 431), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "personality": (135, 92),
    # A session or process group of its own would outlive the killing of its group.
    "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
_MACHINE: _Numbers = {
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58),
}  # fmt: skip
_OTHER_PROCESSES: _Numbers = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "kcmp": (312, 272), "process_madvise": (440, 440), "setpriority": (141, 140),
    "sched_setattr": (314, 274), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
_UNCOUNTED_MEMORY: _Numbers = {  # memory that no limit of a process covers, and that may outlive it
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
}  # fmt: skip
_ATTRIBUTES_OF_FILES: _Numbers = {  # what Landlock leaves alone
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
}  # fmt: skip
_NEWEST = 462
"""Calls with higher numbers came after this list was made; they answer as on a kernel that lacks them."""

_AUDIT = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_X32 = 0x4000_0000  # x86_64 lends its numbers to a second interface, by this bit
_NEW_NAMESPACES = 0x7E02_0000  # clone's flags for new namespaces
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_FIOSETOWN, _SIOCSPGRP, _TIOCLINUX, _FS_IOC_SETFLAGS = 0x8901, 0x8902, 0x541C, 0x4008_6602
_ALL = 0xFFFF_FFFF

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENTS = 0, 4, 16  # offsets in what the filter sees
_ALLOW, _ERROR, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


@dataclass(frozen=True, slots=True)
class Rule:
    """One call that fails: always, or where an argument, after ``mask``, is among ``values`` (``unless``: is not)."""

    numbers: tuple[int | None, int | None]
    argument: int | None = None
    values: tuple[int, ...] = ()
    mask: int = _ALL
    unless: bool = False
    error: int = errno.EPERM


def rules(*, guard_files: bool, guard_signals: int | None) -> list[Rule]:
    """What is refused. ``guard_files``: changes of files that Landlock does not see; ``guard_signals``: the one process,
    beside the own group, that may be signalled."""
    groups = [_NETWORK, _ESCAPES, _MACHINE, _OTHER_PROCESSES, _UNCOUNTED_MEMORY, *([_ATTRIBUTES_OF_FILES] if guard_files else [])]
    found = [Rule(numbers) for group in groups for numbers in group.values()]
    found += [
        Rule((53, 199), 0, (socket.AF_UNIX,), unless=True),  # socketpair: a pair of UNIX sockets reaches nobody else
        Rule((56, 220), 0, (0,), _NEW_NAMESPACES, unless=True),  # clone
        Rule((435, 435), error=errno.ENOSYS),  # clone3 hides its flags in memory; libraries then fall back on clone
        Rule((302, 261), 0, (0,), unless=True),  # prlimit64 of another process
        Rule((72, 25), 1, (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)),  # fcntl: signals to others by way of a descriptor
        Rule((16, 29), 1, (_FIOSETOWN, _SIOCSPGRP, termios.TIOCSTI, _TIOCLINUX, _FS_IOC_SETFLAGS)),  # ioctl
    ]
    if guard_files:
        truncating = os.O_TRUNC | os.O_ACCMODE
        found += [
            Rule((2, None), 1, (os.O_TRUNC | os.O_RDONLY,), truncating),  # open
            Rule((257, 56), 2, (os.O_TRUNC | os.O_RDONLY,), truncating),  # openat
            Rule((437, 437), error=errno.ENOSYS),  # openat2 hides its flags in memory
        ]
    if guard_signals is not None:
        found += [
            Rule((62, 129), 0, (0, guard_signals), unless=True),  # kill
            Rule((234, 131), 0, (guard_signals,), unless=True),  # tgkill
            Rule((200, 130)),  # tkill
            Rule((203, 122), 0, (0,), unless=True),  # sched_setaffinity
        ]
    return found


def is_supported(machine: str | None = None) -> bool:
    """Whether the numbers of this architecture's calls are known here."""
    return (machine or platform.machine()) in _AUDIT


def build(refused: Sequence[Rule], machine: str) -> bytes:
    """The BPF program (8 bytes an instruction) for ``x86_64`` or ``aarch64``."""
    architecture = list(_AUDIT).index(machine)
    code = [_op(_LOAD, _AT_ARCHITECTURE), _op(_EQUAL, _AUDIT[machine], 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _AT_NUMBER)]
    if machine == "x86_64":
        code += [_op(_ANY_BIT, _X32, 0, 1), _op(_RETURN, _KILL)]
    code += [_op(_AT_LEAST, _NEWEST + 1, 0, 1), _op(_RETURN, _ERROR | errno.ENOSYS)]
    numbered = sorted((number, index) for index, rule in enumerate(refused) if (number := rule.numbers[architecture]) is not None)
    for number, same in groupby(numbered, key=lambda pair: pair[0]):
        body = [op for _, index in same for op in _verdict(refused[index])]
        code += [_op(_EQUAL, number, 0, len(body) + 1), *body, _op(_RETURN, _ALLOW)]
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _verdict(rule: Rule) -> Iterator[bytes]:
    """Return the rule's error where it applies, else fall through; only the low half of an argument counts in these calls."""
    if rule.argument is not None:
        yield _op(_LOAD, _AT_ARGUMENTS + 8 * rule.argument)
        yield _op(_AND, rule.mask)
        for index, value in enumerate(rule.values):
            left = len(rule.values) - index - 1
            # Listed values jump to the error, or past it with ``unless``; the last comparison decides for the rest.
            match, miss = (left + 1, 0) if rule.unless else (left, int(left == 0))
            yield _op(_EQUAL, value, match, miss)
    yield _op(_RETURN, _ERROR | rule.error)


def install(refused: Sequence[Rule]) -> None:
    """Put the filter on this process and its children, for good. The process must have given up new privileges."""
    program = build(refused, platform.machine())

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    request = Program(len(program) // 8, program)
    linux.call("prctl", _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(request), 0, 0)


def _op(code: int, value: int, match: int = 0, miss: int = 0) -> bytes:
    return struct.pack("=HBBI", code, match, miss, value & _ALL)
