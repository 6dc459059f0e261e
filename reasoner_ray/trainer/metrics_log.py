"""``metrics.jsonl``: the record of a run that everything else (W&B, plots, the terminal) can be rebuilt from."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from reasoner_ray.errors import DataError

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """A JSON-lines file with exactly one line a step, steps ascending.

    Values that come later for the newest step (an evaluation after the training step) are merged into its line.
    A line that could not be written (disk full) is kept and written with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []  # the newest written one, then those not yet on disk
        self._stable = 0  # bytes of the file before the first of `_records`

    @property
    def last(self) -> dict[str, Any]:
        """The newest step's record; empty before the first."""
        return self._records[-1] if self._records else {}

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Drop every line after ``step`` and return the rest. Raises ``DataError`` on a broken line that is not the last."""
        kept = cut_jsonl(self.path, step)
        self._records = kept[-1:]
        self._stable = self.path.stat().st_size - sum(len(_line(r)) for r in self._records)
        return kept

    def put(self, step: int, values: dict[str, Any]) -> None:
        """Write ``values`` for ``step``. Raises ``ValueError`` for a step before the newest, ``OSError`` where the disk refuses."""
        newest = self.last.get("step", -1)
        if step < newest:
            raise ValueError(f"metrics of step {step} after those of step {newest}; call rewind({step - 1}) first")
        if step == newest:
            self._records[-1] = {**self._records[-1], **values}
        else:
            self._records.append({"step": step, **values})
        with self.path.open("r+b") as file:
            file.truncate(self._stable)  # before the write: a kill in between leaves no broken line in the middle
            file.seek(self._stable)
            file.write(b"".join(_line(r) for r in self._records))
        self._stable += sum(len(_line(r)) for r in self._records[:-1])
        del self._records[:-1]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file whose records carry a ``step``.

    A last line without its end is what a killed process leaves: it is skipped with a warning. Any other line that is not a
    JSON object with an integer ``step`` raises ``DataError`` with file and line.
    """
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        log.warning("%s:%d: skipped the last line, which was cut off while it was written", path, len(lines) + 1)
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def cut_jsonl(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after ``step`` from a JSON-lines file, atomically; returns what is left. A missing file becomes an empty one."""
    kept = [r for r in read_jsonl(path) if r["step"] <= step] if path.exists() else []
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.writelines(_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return kept


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records and hand them to the operating system."""
    with path.open("ab") as file:
        file.writelines(_line(record) for record in records)


def _line(record: dict[str, Any]) -> bytes:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(safe, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{where}: not a line of JSON ({error}); remove the line to go on without it") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(f'{where}: not a record with an integer "step"; remove the line to go on without it')
    return record
