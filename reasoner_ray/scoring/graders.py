"""A pool of grader processes with hard time-outs. Whatever an answer does, its future resolves to a ``Score``."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING

from reasoner_ray.errors import ReasonerError
from reasoner_ray.scoring.base import Answer, Score, Term, check_terms
from reasoner_ray.scoring.calls import CallPool
from reasoner_ray.scoring.process import GraderDied, GraderProcess

if TYPE_CHECKING:
    from reasoner_ray.data.tasks import Item

log = logging.getLogger(__name__)


class GraderPool:
    """``processes`` graders, each killed at the time-out and replaced. Thread-safe; see ``CallPool``."""

    def __init__(self, terms: Sequence[Term], *, processes: int = 1, timeout_s: float = 10.0) -> None:
        """Start every process. Raises ``ReasonerError`` where the scorers cannot be built."""
        check_terms(terms)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._pool = CallPool(lambda: GraderProcess(terms), processes=processes, timeout_s=timeout_s, eager=True)

    @property
    def counts(self) -> dict[str, int]:
        """Answers so far by outcome: ``ok``, ``error``, ``timeout``, and ``restarts`` of processes."""
        with self._lock:
            return {name: self._counts[name] for name in ("ok", "error", "timeout")} | {"restarts": self._pool.restarts}

    def submit(self, answer: Answer, item: Item) -> Future[Score]:
        """Judge an answer; the future never raises a grader's exception, it holds a ``Score`` that tells of it."""
        judged: Future[Score] = Future()

        def resolve(call: Future[Score]) -> None:
            if call.cancelled():
                judged.cancel()
            elif judged.set_running_or_notify_cancel():
                score = _score_of(call)
                with self._lock:
                    self._counts[score.status] += 1
                if call.exception() is not None:  # its process is gone
                    log.warning("item %s: %s", item.id, score.detail)
                judged.set_result(score)

        self._pool.submit((answer, item)).add_done_callback(resolve)
        return judged

    def score(self, answers: Iterable[tuple[Answer, Item]]) -> list[Score]:
        """Judge many answers at once, results in their order."""
        futures = [self.submit(answer, item) for answer, item in answers]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Drop what waits, let each process finish the answer it is at (or time out), and end them all."""
        self._pool.close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _score_of(call: Future[Score]) -> Score:
    try:
        return call.result()
    except TimeoutError as error:
        return Score.failed("timeout", "Timeout", str(error))
    except GraderDied as error:
        return Score.failed("error", "GraderDied", f"the grader process {error}")
    except ReasonerError as error:
        return Score.failed("error", "GraderNotStarted", str(error))
    except Exception as error:  # noqa: BLE001 (an item that cannot be pickled, say)
        return Score.failed("error", type(error).__name__, str(error)[:500])
