"""Where labels are kept: a journal with a line a question, and the data set made of it, a record a solution.

A line is written whole and synced to the disk before the question counts as done, so that a run that was killed goes on where it
was: at most the last line is torn, and that one is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from reasoner_ray.errors import CheckpointError, DataError

JOURNAL = "questions.jsonl"
ROWS = 1000
"""Solutions of a row group of Parquet."""
_BLOCK = 1 << 20


class Journal:
    """Append-only; one process at a time. The first line says what the labels were made with."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open or create. Raises ``CheckpointError`` where it was begun with other settings or is in use, ``DataError`` where broken."""
        self.path = path
        self._file = _open_locked(path)
        try:
            self._drop_torn_line()
            self.done = {str(record["id"]) for record in self._begin(header)}
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """One finished question, on the disk when this returns."""
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
            raise CheckpointError(
                f"{self.path} was begun with another {', '.join(differ)}; resume with the run's own settings "
                "(reasoner label RUN/labels/config.yaml --resume), or replace it with --overwrite"
            )
        return lines

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

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


def _open_locked(path: Path) -> BinaryIO:
    """The journal, for this process alone until it is closed. Raises ``CheckpointError``."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise CheckpointError(f"{path} is in use: another process is labelling into this run") from error
    return file


def remove_labels(folder: Path) -> None:
    """Remove a run's labels with all that lies beside their journal. Raises ``CheckpointError`` where another process still writes them."""
    journal = folder / JOURNAL
    with _open_locked(journal) if journal.is_file() else nullcontext():  # held until it is gone, so that nobody begins to write
        shutil.rmtree(folder)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a journal, its header first. Raises ``DataError`` naming the line that is broken."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error}); remove the line, and its question is labelled again"
                ) from error
            if not isinstance(record, dict) or (number > 1 and "id" not in record):
                raise DataError(f"{path}, line {number}: not a labelled question; remove the line, and its question is labelled again")
            yield record


def questions(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's questions, in the order in which they were finished. Raises ``DataError``."""
    lines = read_lines(path)
    next(lines, None)
    return lines


def solutions(path: Path) -> Iterator[dict[str, Any]]:
    """A record for each solution with a label that is known: what ``kind: prm`` and ``kind: value`` train on."""
    for question in questions(path):
        for number, solution in enumerate(question.get("solutions", ())):
            if any(label is not None for label in solution["labels"]):
                yield {"id": f"{question['id']}/{number}", "question": question["id"], "prompt": question["prompt"], **solution}


def export(journal: Path, kind: Literal["jsonl", "parquet"]) -> Path:
    """Write ``labels.jsonl`` or ``labels.parquet`` beside the journal, aside first and then renamed. Returns the file."""
    target = journal.with_name(f"labels.{kind}")
    aside = target.with_suffix(f".{kind}.tmp")
    if kind == "parquet":
        _write_parquet(aside, solutions(journal))
    else:
        with aside.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in solutions(journal))
            out.flush()
            os.fsync(out.fileno())
    aside.replace(target)
    return target


def _write_parquet(path: Path, records: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, ids, numbers = pa.string(), pa.list_(pa.int32()), pa.list_(pa.float32())
    columns = {"id": text, "question": text, "prompt": text, "tokens": ids, "start": pa.int32(), "ends": ids, "steps": pa.list_(text)}
    columns |= {"labels": numbers, "soft": numbers, "hard": pa.list_(pa.bool_())}
    columns |= {"first_error": pa.int32(), "right": pa.bool_(), "reward": pa.float32()}
    schema = pa.schema(columns)
    with pq.ParquetWriter(path, schema) as writer:
        while rows := list(islice(records, ROWS)):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
