"""A pool of grader processes with hard time-outs. Whatever an answer does, its future resolves to a ``Score``."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from reasoner_ray.errors import ReasonerError
from reasoner_ray.scoring.base import Answer, Score, Term, check_terms
from reasoner_ray.scoring.process import GraderDied, GraderProcess

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    answer: Answer
    item: Item
    future: Future[Score] = field(default_factory=Future)


class GraderPool:
    """``processes`` graders, each owned by a thread that starts it, kills it at the time-out and replaces it.

    Thread-safe. A time-out counts from the moment a process takes the answer up, not from its submission.
    """

    def __init__(self, terms: Sequence[Term], *, processes: int = 1, timeout_s: float = 10.0) -> None:
        """Start every process. Raises ``ReasonerError`` where the scorers cannot be built."""
        check_terms(terms)
        self._terms, self._timeout_s = tuple(terms), timeout_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._closing = False
        ready: list[Future[None]] = [Future() for _ in range(processes)]
        self._threads = [threading.Thread(target=self._run, args=(r,), name="grader", daemon=True) for r in ready]
        for thread in self._threads:
            thread.start()
        try:
            for started in ready:
                started.result()
        except ReasonerError:
            self.close()
            raise

    @property
    def counts(self) -> dict[str, int]:
        """Answers so far by outcome: ``ok``, ``error``, ``timeout``, and ``restarts`` of processes."""
        with self._lock:
            return {name: self._counts[name] for name in ("ok", "error", "timeout", "restarts")}

    def submit(self, answer: Answer, item: Item) -> Future[Score]:
        """Judge an answer; the future never raises a grader's exception, it holds a ``Score`` that tells of it."""
        job = _Job(answer, item)
        with self._lock:
            if self._closing:
                raise RuntimeError("the grader pool is closed")
            self._jobs.put(job)
        return job.future

    def score(self, answers: Iterable[tuple[Answer, Item]]) -> list[Score]:
        """Judge many answers at once, results in their order."""
        futures = [self.submit(answer, item) for answer, item in answers]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Drop what waits, let each process finish the answer it is at (or time out), and end them all."""
        with self._lock:
            self._closing = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, ready: Future[None]) -> None:
        """One thread's life: keep a process at work until the pool closes."""
        try:
            grader: GraderProcess | None = GraderProcess(self._terms)
        except ReasonerError as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            if self._closing:
                job.future.cancel()
                continue
            grader, score = self._grade(grader, job)
            with self._lock:
                self._counts[score.status] += 1
            job.future.set_result(score)
        if grader is not None:
            grader.kill()

    def _grade(self, grader: GraderProcess | None, job: _Job) -> tuple[GraderProcess | None, Score]:
        """The job's score, and the process for the next one (None where this one is gone)."""
        if grader is not None and not grader.is_alive:  # it was killed between two answers, so this one is not to blame
            grader.kill()
            grader = None
        try:
            if grader is None:
                with self._lock:
                    self._counts["restarts"] += 1
                grader = GraderProcess(self._terms)
        except ReasonerError as error:
            return None, Score.failed("error", "GraderNotStarted", str(error))
        try:
            return grader, grader.grade(job.answer, job.item, self._timeout_s)
        except TimeoutError as error:
            score = Score.failed("timeout", "Timeout", str(error))
        except GraderDied as error:
            score = Score.failed("error", "GraderDied", f"the grader process {error}")
        except Exception as error:  # noqa: BLE001 (an item that cannot be pickled, say: its future must resolve all the same)
            score = Score.failed("error", type(error).__name__, str(error)[:500])
        log.warning("item %s: %s", job.item.id, score.detail)
        grader.kill()
        return None, score
