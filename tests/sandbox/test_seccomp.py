"""The seccomp filter, for both architectures, by an interpreter of its BPF program."""

from __future__ import annotations

import errno
import os
import re
import struct
import termios
from pathlib import Path

import pytest

from reasoner_ray.sandbox import seccomp

ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = pytest.mark.parametrize("machine", list(ARCHITECTURES))


def run_filter(program: bytes, number: int, architecture: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter returns for a call, by the rules of classic BPF."""
    padded = [value & 0xFFFFFFFFFFFFFFFF for value in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("=IIQ6Q", number, architecture, 0, *padded)
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        operation, match, miss, value = code[position]
        position += 1
        match operation:
            case 0x20:
                accumulator = struct.unpack_from("=I", data, value)[0]
            case 0x54:
                accumulator &= value
            case 0x06:
                return value
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: accumulator & value != 0}[operation]
                position += match if holds else miss
            case _:
                raise AssertionError(f"unknown operation {operation:#x}")


def verdicts(machine: str, *, guard_files: bool = True, guard_signals: int | None = 77) -> Filter:
    rules = seccomp.rules(guard_files=guard_files, guard_signals=guard_signals)
    return Filter(seccomp.build(rules, machine), machine)


class Filter:
    """Answers what becomes of a call, by its number on x86_64 and aarch64."""

    def __init__(self, program: bytes, machine: str) -> None:
        self.program, self.machine = program, machine

    def __call__(self, numbers: tuple[int | None, int | None], *arguments: int) -> int:
        number = numbers[list(ARCHITECTURES).index(self.machine)]
        if number is None:
            pytest.skip(f"{self.machine} has no such call")
        return run_filter(self.program, number, ARCHITECTURES[self.machine], arguments)


@MACHINES
def test_what_an_interpreter_needs_is_allowed(machine: str) -> None:
    answer = verdicts(machine)
    allowed = {"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "futex": (202, 98), "execve": (59, 221), "exit_group": (231, 94)}
    assert {name: answer(numbers) for name, numbers in allowed.items()} == dict.fromkeys(allowed, ALLOW)


@MACHINES
def test_calls_that_reach_out_are_refused(machine: str) -> None:
    answer = verdicts(machine)
    groups = (seccomp._NETWORK, seccomp._ESCAPES, seccomp._OTHER_PROCESSES, seccomp._UNCOUNTED_MEMORY, seccomp._ATTRIBUTES_OF_FILES)
    architecture = list(ARCHITECTURES).index(machine)
    for group in (*groups, seccomp._MACHINE):
        for name, numbers in group.items():
            if numbers[architecture] is not None:
                assert answer(numbers, 1, 2, 3) == ERROR | errno.EPERM, name


@MACHINES
def test_calls_are_judged_by_their_arguments(machine: str) -> None:
    answer = verdicts(machine)
    refused = ERROR | errno.EPERM
    socketpair, clone, prlimit, fcntl, ioctl = (53, 199), (56, 220), (302, 261), (72, 25), (16, 29)
    assert [answer(socketpair, family) for family in (1, 2, 10, 16)] == [ALLOW, refused, refused, refused]
    assert [answer(clone, flags) for flags in (0x11, 0x3D0F00, 0x10000011, 0x40000011)] == [ALLOW, ALLOW, refused, refused]
    assert [answer(prlimit, pid) for pid in (0, 1, 77)] == [ALLOW, refused, refused]
    assert [answer(fcntl, 3, command) for command in (1, 8, 10, 15)] == [ALLOW, refused, refused, refused]
    assert [answer(ioctl, 0, command) for command in (termios.TCGETS, termios.TIOCSTI, 0x8901)] == [ALLOW, refused, refused]
    assert answer((435, 435)) == ERROR | errno.ENOSYS  # clone3
    # The kernel looks at the low half of these arguments only, and so must the filter.
    assert answer(socketpair, 2 | 1 << 32) == refused
    assert answer(clone, 0x10000011 | 1 << 40) == refused


@MACHINES
def test_signals_reach_the_own_group_alone(machine: str) -> None:
    kill, tgkill, tkill = (62, 129), (234, 131), (200, 130)
    answer, refused = verdicts(machine), ERROR | errno.EPERM
    assert [answer(kill, pid) for pid in (0, 77, 1, -1, -77)] == [ALLOW, ALLOW, refused, refused, refused]
    assert [answer(tgkill, pid, pid, 6) for pid in (77, 78)] == [ALLOW, refused]
    assert answer(tkill, 77) == refused
    free = verdicts(machine, guard_signals=None)
    assert [free(kill, 1), free(tgkill, 1), free(tkill, 1)] == [ALLOW] * 3


@MACHINES
def test_files_are_not_cut_by_opening_them_to_read(machine: str) -> None:
    openat, answer = (257, 56), verdicts(machine)
    flags = (os.O_RDONLY, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, os.O_RDWR | os.O_TRUNC)
    assert [answer(openat, 0, 0, flag) for flag in flags] == [ALLOW, ERROR | errno.EPERM, ALLOW, ALLOW]
    assert answer((437, 437)) == ERROR | errno.ENOSYS  # openat2
    assert verdicts(machine, guard_files=False)(openat, 0, 0, os.O_TRUNC) == ALLOW


@MACHINES
def test_other_interfaces_and_later_calls(machine: str) -> None:
    answer, own = verdicts(machine), ARCHITECTURES[machine]
    other = next(value for value in ARCHITECTURES.values() if value != own)
    assert run_filter(answer.program, 0, other) == KILL
    assert run_filter(answer.program, 0, 0x40000003) == KILL  # 32-bit x86
    assert run_filter(answer.program, 10_000, own) == ERROR | errno.ENOSYS
    if machine == "x86_64":
        assert run_filter(answer.program, 0x40000000 | 41, own) == KILL  # x32


def test_numbers_agree_with_the_system_headers() -> None:
    headers = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
    if not all(path.exists() for path in headers.values()):
        pytest.skip("no kernel headers of both architectures here")
    groups = (seccomp._NETWORK, seccomp._ESCAPES, seccomp._MACHINE, seccomp._OTHER_PROCESSES, seccomp._UNCOUNTED_MEMORY)
    listed = {name: numbers for group in (*groups, seccomp._ATTRIBUTES_OF_FILES) for name, numbers in group.items()}
    for index, path in headers.items():
        text = path.read_text()
        known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
        both = known.keys() & listed.keys()
        assert len(both) > 50
        assert {name: listed[name][index] for name in both} == {name: known[name] for name in both}


def test_unknown_architectures_have_no_filter() -> None:
    assert seccomp.is_supported("aarch64") and not seccomp.is_supported("riscv64")
