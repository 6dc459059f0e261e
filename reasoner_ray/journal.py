"""A journal with a line an item: work on many items that was killed goes on where it was.

A line is written whole and synced to the disk before its item counts as done: at most the last line is torn, and that one is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from reasoner_ray.errors import CheckpointError, DataError

_BLOCK = 1 << 20


class Journal:
    """Append-only; one process at a time. The first line says what the others were made with."""

    def __init__(self, path: Path, header: dict[str, Any], resume: str = "go on with its own settings") -> None:
        """Open or create; ``resume`` says what to do where the header is another.

        Raises ``CheckpointError`` where it was begun with other settings or is in use, ``DataError`` where broken.
        """
        self.path, self._resume = path, resume
        self._file = open_locked(path)
        try:
            self._drop_torn_line()
            self.done = {str(record["id"]) for record in self._begin(header)}
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """One finished item, on the disk when this returns."""
        self._write(record)
        self.done.add(str(record["id"]))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _begin(self, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
        lines = read_lines(self.path)
        found = next(lines, None)
        if found is None:
            self._write(header)
        elif found != header:
            differ = sorted(key for key in {*found, *header} if found.get(key) != header.get(key))
            raise CheckpointError(f"{self.path} was begun with another {', '.join(differ)}; {self._resume}")
        return lines

    def _write(self, record: dict[str, Any]) -> None:
        write_line(self._file, record)

    def _drop_torn_line(self) -> None:
        """Cut off what follows the last line end."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK)
            self._file.seek(begin)
            place = self._file.read(end - begin).rfind(b"\n")
            if place >= 0:
                self._file.truncate(begin + place + 1)
                return
            end = begin
        self._file.truncate(0)


def open_locked(path: Path) -> BinaryIO:
    """The journal, for this process alone until it is closed. Raises ``CheckpointError``."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(f"{path} is in use: another process is writing it") from error
    except OSError as error:
        file.close()
        raise CheckpointError(
            f"{path} cannot be locked ({error.strerror}); take a folder on a file system that has locks (flock)"
        ) from error
    return file


def remove_folder(folder: Path, journal: Path) -> None:
    """Remove a folder with its ``journal``. Raises ``CheckpointError`` where another process still writes that.

    It is renamed while the lock is held, so that nobody begins to write, and removed when no file of it is open: network file systems
    keep open files in their folder.
    """
    aside = folder.with_name(f".{folder.name}-removed-{os.getpid()}")
    with open_locked(journal) if journal.is_file() else nullcontext():
        folder.rename(aside)
    shutil.rmtree(aside)


def as_line(record: Any) -> bytes:
    """A line of JSON in UTF-8. Half a surrogate pair, which a tokenizer may write, is no UTF-8: it becomes JSON's escape of it."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_line(file: BinaryIO, record: dict[str, Any]) -> None:
    """Append a record; it is on the disk when this returns."""
    file.write(as_line(record))
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a journal, its header first. Raises ``DataError`` naming the line that is broken."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(f"{path}, line {number}: not valid JSON ({error}); remove the line, and its item is done again") from error
            if not isinstance(record, dict) or (number > 1 and "id" not in record):
                raise DataError(f"{path}, line {number}: not an item of this journal; remove the line, and its item is done again")
            yield record


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's items, in the order in which they were finished. Raises ``DataError``."""
    lines = read_lines(path)
    next(lines, None)
    return lines
