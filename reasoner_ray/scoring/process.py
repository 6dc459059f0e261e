"""A grader process: judges answers one at a time, in a process of its own that may be killed at any moment.

sympy can loop for ever, C code can crash, a user's function can call ``os._exit``: none of it may reach the scorer
actor. The child is started as a fresh interpreter (not by ``multiprocessing``, which would import the parent's main
module again: inside a Ray actor that is Ray's own worker script) and talks over one pipe.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from reasoner_ray.errors import ConfigError, EnvironmentProblem, ReasonerError
from reasoner_ray.scoring.base import Answer, CompositeScorer, Score, Term

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item

START_SECONDS = 120.0
"""Importing sympy and a user's module takes seconds on a busy machine; a process that needs longer is broken."""

MEMORY_BYTES = 4 << 30
"""Data memory of a grader process: an expression that asks for more raises ``MemoryError`` and harms nobody else."""

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from reasoner_ray.scoring.process import serve; serve(*sys.argv[2:])"
_PR_SET_PDEATHSIG = 1


class GraderDied(Exception):
    """The process ended by itself; says how."""


class GraderProcess:
    """The parent's side. Not thread-safe: one thread owns it, and must live as long as it does (see ``serve``)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        """Start the process and wait until it is ready. Raises ``ReasonerError`` where its scorers cannot be built."""
        self._pipe, child = multiprocessing.Pipe()
        arguments = [json.dumps(sys.path), str(child.fileno()), json.dumps([asdict(term) for term in terms])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments], pass_fds=[child.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            self._pipe.close()
            raise EnvironmentProblem(f"a grader process cannot be started: {error}") from error
        finally:
            child.close()
        try:
            problem = self._receive(START_SECONDS)
        except (TimeoutError, GraderDied) as error:
            self.kill()
            raise EnvironmentProblem(f"a grader process did not start: {error}") from error
        if problem is not None:
            self.kill()
            raise ConfigError(problem)

    @property
    def is_alive(self) -> bool:
        """False once the process has ended."""
        return self._process.poll() is None

    def grade(self, answer: Answer, item: Item, timeout_s: float) -> Score:
        """The answer's score. Raises ``TimeoutError`` or ``GraderDied``; the process is of no use after either."""
        try:
            self._pipe.send((answer, item))
        except OSError as error:
            raise GraderDied(self._how_it_ended()) from error
        score: Score = self._receive(timeout_s)
        return score

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        self._pipe.close()
        if self.is_alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise TimeoutError(f"no answer within {timeout_s:g} s")
            return self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise GraderDied(self._how_it_ended()) from error

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def serve(pipe_fd: str, terms: str) -> None:
    """The child's side: build the scorers, then judge answers until the pipe closes."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected; a core file of each would fill the disk
    pipe = Connection(int(pipe_fd))
    try:
        composite = CompositeScorer([Term(**term) for term in json.loads(terms)])
    except ReasonerError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            answer, item = pipe.recv()
        except EOFError:  # the parent closed the pool
            return
        pipe.send(composite.score(answer, item))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends: a killed actor leaves no busy grader behind.

    Elsewhere a grader ends when its pipe closes, after the answer at hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
