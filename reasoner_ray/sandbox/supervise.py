"""The supervisor: watches a program from outside its reach, stops it at its limits, and collects what it left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import stat
import time
from typing import Any

from reasoner_ray.sandbox import folders, processes
from reasoner_ray.sandbox.confine import Program
from reasoner_ray.sandbox.job import Job, Report
from reasoner_ray.sandbox.limits import Level

TAIL_BYTES = 8192
"""How much of the end of stdout, of stderr and of the program's account of its error is kept."""
DETAIL_CHARACTERS = 2000

_TICK = 0.02
_LOOK_EVERY, _LOOK_AT_LEAST, _LOOK_SHARE = 0.05, 0.5, 0.1
"""Seconds between two looks at the processes: the first, unless looking takes a larger share of the time; never above the second."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")
_BY_SIGNAL = {
    signal.SIGXCPU: ("timeout", "CpuLimit", "used up its CPU time"),
    signal.SIGXFSZ: ("output", "FileSizeLimit", "wrote a file past its limit"),
    signal.SIGSYS: ("forbidden", "ForbiddenCall", "made a system call that is not allowed"),
}
_BY_ERRNO = {
    **dict.fromkeys((errno.EPERM, errno.EACCES, errno.EROFS), "forbidden"),
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, errno.EDQUOT), "output"),
    errno.ENOMEM: "memory",
    errno.EAGAIN: "processes",
}


class Supervisor:
    """Watches one program to its end."""

    def __init__(self, job: Job, program: Program, parent: int, report_end: int) -> None:
        self._job, self._limits, self._program, self._parent = job, job.limits, program, parent
        self._own_world = job.level is Level.NAMESPACES
        self._tails = {descriptor: bytearray() for descriptor in (program.stdout, program.stderr, program.error)}
        self._poll = select.poll()
        for descriptor in self._tails:
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLIN)
        self._text = 0
        self._wait_status: int | None = None
        self._peak = 0
        self._next_look = 0.0
        self._report_end = report_end
        self._poll.register(report_end, 0)  # nothing but its other end's closing
        self._nobody_reads = False

    def run(self) -> Report:
        """Wait for the program's end or stop it; either way nothing of it runs afterwards."""
        start = time.monotonic()
        stopped = None
        while stopped is None and self._wait_status is None:
            self._read()
            self._reap()
            stopped = self._past_a_limit(start)
        seconds = time.monotonic() - start
        ended = processes.kill_all(self._program.pid, own_world=self._own_world)
        self._read()
        report = Report(seconds=seconds, peak_bytes=self._peak)
        report.stdout, report.stderr, error = (_text(bytes(tail)) for tail in self._tails.values())
        if not ended:
            report.status, report.error_type = "killed", "Unkillable"
            report.detail = "some of the program's processes did not end when killed"
        elif stopped is not None:
            report.status, report.error_type, report.detail = stopped
        else:
            self._judge(report, error)
        if report.status == "ok":
            self._collect(report)
        return report

    def _read(self) -> None:
        for descriptor, _ in self._poll.poll(_TICK * 1000):
            if descriptor == self._report_end:
                self._poll.unregister(descriptor)
                self._nobody_reads = True
                continue
            try:
                data = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                self._poll.unregister(descriptor)
            self._text += len(data)
            tail = self._tails[descriptor]
            tail += data
            del tail[:-TAIL_BYTES]

    def _reap(self) -> None:
        """Note the program's end; in a world of its own, also bury the orphans."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._program.pid:
                    self._wait_status = status
                    self._peak = max(self._peak, usage.ru_maxrss << 10)

    def _past_a_limit(self, start: float) -> tuple[str, str, str] | None:
        now, limits = time.monotonic(), self._limits
        if self._text > limits.text_bytes:
            return "output", "OutputLimit", f"wrote more than {limits.text_bytes} bytes to stdout and stderr"
        if now - start > limits.seconds:
            return "timeout", "Timeout", f"ran longer than {limits.seconds:g} s"
        if self._nobody_reads or (not self._own_world and os.getppid() != self._parent):
            return "killed", "Stopped", "the process that started it ended, or had it stopped"
        if now < self._next_look:
            return None
        found = self._look()
        taken = time.monotonic() - now
        self._next_look = now + min(max(_LOOK_EVERY, taken / _LOOK_SHARE), _LOOK_AT_LEAST)
        return found

    def _look(self) -> tuple[str, str, str] | None:
        limits, pids = self._limits, processes.descendants()
        held = processes.memory(pids, limits.memory_bytes)
        self._peak = max(self._peak, held)
        if held > limits.memory_bytes:
            return "memory", "MemoryLimit", f"its processes together took more than {limits.memory_bytes >> 20} MiB"
        # Where the user shares the limit that Linux keeps with other programs, it cannot be exact.
        if processes.count_threads(pids) > limits.processes:
            return "processes", "ProcessLimit", f"ran more than {limits.processes} processes and threads"
        if not self._own_world and self._is_scratch_full(pids):
            return "output", "ScratchLimit", "filled its scratch folder"
        return None

    def _is_scratch_full(self, pids: list[int]) -> bool:
        size: float = folders.deleted_files(pids)
        files = 0
        for found in folders.files_below(self._job.folder):
            size, files = size + found, files + 1
            if size > self._limits.scratch_bytes or files > self._limits.scratch_files:
                return True
        return size > self._limits.scratch_bytes

    def _judge(self, report: Report, error: str) -> None:
        """Say how a program ended that nobody stopped. ``error``: what it said itself, believed in nothing that matters."""
        code = os.waitstatus_to_exitcode(self._wait_status or 0)
        if code < 0:
            name = signal.Signals(-code).name
            killed = ("killed", name, f"ended by {name}")
            report.status, report.error_type, report.detail = _BY_SIGNAL.get(signal.Signals(-code), killed)
        elif code > 0:
            last = report.stderr.strip().rpartition("\n")[2]
            report.status, report.error_type, report.detail = "error", "SystemExit", f"exit status {code}: {last}"[:DETAIL_CHARACTERS]
            _add_error(report, error)

    def _collect(self, report: Report) -> None:
        for name in self._job.wanted:
            data = _read_file(self._program.scratch, name, self._limits.output_bytes)
            if data is None:
                continue
            if len(data) > self._limits.output_bytes:
                report.status, report.error_type = "output", "OutputLimit"
                report.detail = f"{name} is larger than {self._limits.output_bytes} bytes"
                return
            report.outputs[name] = data


def _add_error(report: Report, text: str) -> None:
    """The exception as the program's own process told it."""
    try:
        error = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(error, dict):
        return
    name, line, number = error.get("type"), error.get("line"), error.get("errno")
    report.error_type = name if isinstance(name, str) and _NAME.fullmatch(name) else "Unnamed"
    report.detail = _printable(str(error.get("message", "")))[:DETAIL_CHARACTERS]
    report.line = line if isinstance(line, int) and 0 < line < 1 << 31 else None
    report.status = _status(report.error_type, number)


def _status(error_type: str, number: Any) -> str:
    if error_type == "MemoryError":
        return "memory"
    return _BY_ERRNO.get(number, "error") if isinstance(number, int) else "error"


def _read_file(folder: int, name: str, limit: int) -> bytes | None:
    """At most ``limit`` + 1 bytes of a regular file; None where it is missing or something else (a link, a pipe, ...)."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        return file.read(limit + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _text(data: bytes) -> str:
    return _printable(data.decode("utf-8", "replace"))


def _printable(text: str) -> str:
    """Text from a program may end up on a terminal: no control sequences."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
