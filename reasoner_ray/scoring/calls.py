"""Calls of code that may do anything, in child processes with hard time-outs: a call that hangs or dies takes its process along."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from reasoner_ray.child_process import ChildDied, ChildProcess
from reasoner_ray.errors import ReasonerError


class CallRaised(Exception):
    """The function that was called raised; ``error_type`` names what."""

    def __init__(self, error_type: str, detail: str) -> None:
        super().__init__(f"{error_type}: {detail}")
        self.error_type = error_type


@dataclass(frozen=True, slots=True)
class _Raised:
    """``CallRaised`` on its way through the pipe."""

    error_type: str
    detail: str


def guarded(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The child's side: ``function`` of a message, whose exceptions become ``CallRaised`` where the call was made."""

    def call(message: Any) -> Any:
        try:
            return function(message)
        except Exception as error:  # noqa: BLE001 - someone else's code may raise anything
            return _Raised(type(error).__name__, str(error)[:500])

    return call


def failure_name(error: BaseException) -> str:
    """A short name of why a call failed: Timeout, Died, or the name of what was raised."""
    if isinstance(error, CallRaised):
        return error.error_type
    if isinstance(error, ChildDied):
        return "Died"
    return "Timeout" if isinstance(error, TimeoutError) else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Job:
    message: Any
    future: Future[Any] = field(default_factory=Future)


class CallPool:
    """``processes`` children, each owned by a thread that starts it, kills it at the time-out and replaces it.

    Thread-safe. A time-out counts from the moment a process takes the message up, not from its submission.
    """

    def __init__(self, start: Callable[[], ChildProcess], *, processes: int = 1, timeout_s: float = 10.0, eager: bool = False) -> None:
        """``start`` gives a child that is ready. It is first called for the first message, with ``eager`` at once.

        Raises, where eager, the ``ReasonerError`` that ``start`` does.
        """
        self._start, self._timeout_s = start, timeout_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._closing = False
        self.restarts = 0
        ready: list[Future[None]] = [Future() for _ in range(processes)]
        self._threads = [threading.Thread(target=self._run, args=(r, eager), name="calls", daemon=True) for r in ready]
        for thread in self._threads:
            thread.start()
        try:
            for started in ready:
                started.result()
        except ReasonerError:
            self.close()
            raise

    def submit(self, message: Any) -> Future[Any]:
        """The answer to a message. The future raises ``TimeoutError``, ``ChildDied``, ``CallRaised``, the ``ReasonerError`` that kept a
        process from starting, or what the message does to the pipe."""
        job = _Job(message)
        with self._lock:
            if self._closing:
                raise RuntimeError("the pool is closed")
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Drop what waits, let each process finish the message it is at (or time out), and end them all."""
        with self._lock:
            self._closing = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, ready: Future[None], eager: bool) -> None:
        """One thread's life: keep a process at work until the pool closes."""
        try:
            child = self._start() if eager else None
        except ReasonerError as error:
            ready.set_exception(error)
            return
        began = eager
        ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            if self._closing:
                job.future.cancel()
            elif job.future.set_running_or_notify_cancel():  # nobody can cancel it from here on
                if child is not None and not child.is_alive:  # it was killed between two calls, so this one is not to blame
                    child.kill()
                    child = None
                if child is None and began:
                    with self._lock:
                        self.restarts += 1
                began = True
                child = self._answer(child, job)
        if child is not None:
            child.kill()

    def _answer(self, child: ChildProcess | None, job: _Job) -> ChildProcess | None:
        """Resolve the job's future; the process for the next one, None where this one is gone."""
        try:
            child = child or self._start()
        except Exception as error:  # noqa: BLE001 - the future must resolve, whatever it is
            job.future.set_exception(error)
            return None
        try:
            answer = child.request(job.message, self._timeout_s)
        except Exception as error:  # noqa: BLE001 - a message that cannot be pickled, say; its process may be in the middle of it
            child.kill()
            job.future.set_exception(error)
            return None
        if isinstance(answer, _Raised):
            job.future.set_exception(CallRaised(answer.error_type, answer.detail))
        else:
            job.future.set_result(answer)
        return child
