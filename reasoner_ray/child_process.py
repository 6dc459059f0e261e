"""A child process: a fresh interpreter that runs one function, talks over one pipe, and may be killed at any moment.

Started not by ``multiprocessing``, which would import the parent's main module again: inside a Ray actor that is Ray's
own worker script.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pickle import UnpicklingError
from typing import Any

import psutil

from reasoner_ray.errors import EnvironmentProblem, ReasonerError

START_SECONDS = 120.0
"""Importing what a child needs (sympy, a user's module) takes seconds on a busy machine; one that needs longer is broken."""

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from reasoner_ray.child_process import run; run(*sys.argv[2:])"
_PR_SET_PDEATHSIG = 1


class ChildDied(Exception):
    """The process ended by itself; says how."""


class ChildProcess:
    """The parent's side. Not thread-safe, ``interrupt`` apart: one thread owns it.

    On Linux that thread must live as long as the process, which ends with it (see ``run``). The process leads a session
    of its own, so that a Ctrl-C at the terminal reaches the parent alone.
    """

    def __init__(self, entry: str, arguments: Sequence[str], kind: str) -> None:
        """Start ``entry`` (``module:function``), which is called with its end of the pipe and ``arguments``.

        Its first message must be None, or a ``ReasonerError`` that says why it cannot work. ``kind`` names the process in
        error texts. Raises ``EnvironmentProblem`` where the system starts no process.
        """
        self._pipe, child = multiprocessing.Pipe()
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), entry, str(child.fileno()), *arguments]
        try:
            self._process = subprocess.Popen(command, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._pipe.close()
            raise EnvironmentProblem(f"a process for the {kind} cannot be started: {error}") from error
        finally:
            child.close()

    @property
    def is_alive(self) -> bool:
        """False once the process has ended, or was killed and only some of its threads have yet to end."""
        if self._process.poll() is not None:
            return False
        try:
            return bool(psutil.Process(self._process.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:  # another thread has just reaped it
            return False

    def wait_until_ready(self) -> None:
        """Return once the process can work. Raises the ``ReasonerError`` it sent, ``TimeoutError`` or ``ChildDied``."""
        problem: ReasonerError | None = self._receive(START_SECONDS)
        if problem is not None:
            raise problem

    def wait_or_kill(self, kind: str) -> None:
        """``wait_until_ready``; a process that cannot work is ended. Raises ``EnvironmentProblem``, or the ``ReasonerError`` it sent."""
        try:
            self.wait_until_ready()
        except (TimeoutError, ChildDied) as error:
            self.kill()
            raise EnvironmentProblem(f"a {kind} process did not start: {error}") from error
        except ReasonerError:
            self.kill()
            raise

    def request(self, message: Any, timeout_s: float) -> Any:
        """The answer to a message. Raises ``TimeoutError`` or ``ChildDied``; the process is of no use after either."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise ChildDied(self._how_it_ended()) from error
        return self._receive(timeout_s)

    def interrupt(self) -> None:
        """Send the process, and whatever it started, the signal that ends it; returns at once. From any thread."""
        # A group may outlive the process that led it; on macOS a group of zombies alone is a PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self, grace_s: float = 0.0) -> None:
        """End the process and whatever it started, after ``grace_s`` seconds to end by itself now that its pipe is closed."""
        self._pipe.close()
        if grace_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self.interrupt()
        self._process.wait()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except (EOFError, OSError, UnpicklingError) as error:
            raise ChildDied(self._how_it_ended()) from error
        raise TimeoutError(f"no answer within {timeout_s:g} s")

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "broke its pipe"
        names = {s.value: s.name for s in signal.Signals}  # not all real-time signals have one
        return f"killed by {names.get(-code, f'signal {-code}')}" if code < 0 else f"exited with status {code}"


def run(entry: str, pipe_fd: str, *arguments: str) -> None:
    """The child's side: tie its life to the parent's, then call the function.

    Elsewhere than on Linux a child whose parent was killed ends when it next reads from its pipe.
    """
    if sys.platform == "linux":
        _signal_at_end_of_parent(signal.SIGKILL)
        _guard_group(int(pipe_fd))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected; a core file of each would fill the disk
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(Connection(int(pipe_fd)), *arguments)


def serve(pipe: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """The child's side of ``wait_until_ready`` and ``request``: ``make`` what answers, then answer until the pipe closes.

    A ``ReasonerError`` of ``make`` is sent in place of the word that all is ready.
    """
    try:
        answer = make()
    except ReasonerError as error:
        pipe.send(error)
        return
    pipe.send(None)
    while True:
        try:
            message = pipe.recv()
        except EOFError:  # the parent closed it
            return
        pipe.send(answer(message))


def _guard_group(pipe_fd: int) -> None:
    """Fork a guard, while this process is still small, that kills what is left of the group once this process has ended.

    Nobody else would where the parent was killed: the signal at its end reaches this process, not what it started.
    """
    child = os.getpid()
    if os.fork():
        return
    os.close(pipe_fd)  # the parent must see the pipe close when the child ends
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _signal_at_end_of_parent(signal.SIGTERM)
    if os.getppid() == child:
        signal.sigwait({signal.SIGTERM})
    os.killpg(child, signal.SIGKILL)


def _signal_at_end_of_parent(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
