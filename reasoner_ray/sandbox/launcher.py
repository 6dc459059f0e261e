"""The starter's side of the launcher: one small process beside each worker, which forks itself for every program."""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.sandbox.job import Job, Report, pack_job, read_report

PATIENCE_SECONDS = 60.0
"""What starting and ending may take beyond the program's own time, on a busy machine; longer means that it is broken."""

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from reasoner_ray.sandbox.launch import serve; serve(*sys.argv[2:])"


class Launcher:
    """A fresh interpreter without this process's environment, descriptors and memory. Safe to share by threads.

    It has imported ``preload`` once, so that programs need not; it never sees their data, only its forks do.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        """Start it. Raises ``EnvironmentProblem`` where no process can be started."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(Path(__file__).parents[2]), str(theirs.fileno()), json.dumps(preload)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            raise EnvironmentProblem(f"a sandbox's launcher cannot be started: {error}") from error
        finally:
            theirs.close()

    @property
    def is_alive(self) -> bool:
        """False once the process has ended."""
        return self._process.poll() is None

    def run(self, job: Job) -> Report:
        """Run one program and wait for its end. An exception here (an interrupt, say) ends the program too."""
        job_end, mine = os.pipe()
        report, report_end = os.pipe()
        try:
            try:
                socket.send_fds(self._control, [b"1"], [job_end, report_end])
            finally:
                os.close(job_end)
                os.close(report_end)
            with open(mine, "wb") as stream:
                mine = -1
                stream.write(pack_job(job))
            data = _read_all(report, job.limits.seconds + PATIENCE_SECONDS)
        except BrokenPipeError:
            data = b""
        finally:
            os.close(report)  # a supervisor that is still at work sees it, and ends its program
            if mine >= 0:
                os.close(mine)
        if data is None:
            return Report(status="killed", error_type="LauncherHung", detail=f"no report {PATIENCE_SECONDS:g} s after the time was up")
        try:
            return read_report(BytesIO(data))
        except ValueError:
            return Report(status="killed", error_type="LauncherDied", detail=self._last_words())

    def close(self) -> None:
        """End the launcher; with it end all programs it started."""
        self._control.close()
        self._process.communicate()

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # where it breaks at its start, its socket closes first
        if self.is_alive:
            return "the program's supervisor ended without a report"
        text = self._process.stderr.read().decode("utf-8", "replace") if self._process.stderr else ""
        return text.strip().rpartition("\n")[2][:500] or f"exit status {self._process.returncode}"


def _read_all(descriptor: int, seconds: float) -> bytes | None:
    """Everything up to the pipe's end; None where that does not come in time."""
    deadline = time.monotonic() + seconds
    parts: list[bytes] = []
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        part = os.read(descriptor, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


_starting = threading.Lock()
_running: dict[tuple[int, tuple[str, ...]], Launcher] = {}


def launcher(preload: tuple[str, ...]) -> Launcher:
    """This process's launcher with these modules; a new one where there is none, or it has ended."""
    key = (os.getpid(), preload)  # a fork of this process starts its own
    with _starting:
        if key in _running and not _running[key].is_alive:
            _running.pop(key).close()
        if key not in _running:
            _running[key] = Launcher(preload)
        return _running[key]


@atexit.register
def close_launchers() -> None:
    """End this process's launchers, and with them all programs that still run."""
    with _starting:
        for key in [key for key in _running if key[0] == os.getpid()]:
            _running.pop(key).close()
