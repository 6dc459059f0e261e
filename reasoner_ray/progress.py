"""Progress of work on many items: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reasoner_ray.trainer.terminal import clock

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Counter(Protocol):
    """What the work reports to."""

    def advance(self, note: str = "") -> None:
        """One more item is done; ``note`` says how things stand."""
        ...


@contextmanager
def show_progress(title: str, total: int, done: int = 0) -> Iterator[Counter]:
    """Progress from ``done`` of ``total`` items, shown while the context is open."""
    if not sys.stdout.isatty():
        plain = _Plain(title, total, done)
        yield plain
        plain.finish()
        return
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), expand=True) as bar:
        yield _Bar(bar, title, total, done)


class _Bar:
    def __init__(self, bar: Progress, title: str, total: int, done: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        self._bar.update(self._task, advance=1, note=note)


class _Plain:
    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._began = self._told = time.monotonic()
        self._note = ""
        self._said = -1
        self.tell()

    def advance(self, note: str = "") -> None:
        self._done, self._note = self._done + 1, note
        if time.monotonic() - self._told >= PLAIN_SECONDS:
            self.tell()

    def finish(self) -> None:
        """Say how it ended, unless the last line did."""
        if self._said != self._done:
            self.tell()

    def tell(self) -> None:
        """One line: how much is done, how long it took, how long the rest will take at that pace."""
        self._told, self._said = time.monotonic(), self._done
        elapsed, new = self._told - self._began, self._done - self._first
        eta = f"ETA {clock(elapsed / new * (self._total - self._done))}" if new and self._done < self._total else ""
        parts = (f"{self._title} {self._done}/{self._total}", clock(elapsed), eta, self._note)
        print(" | ".join(part for part in parts if part), flush=True)
