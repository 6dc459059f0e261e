"""Reading data sets: JSON lines (plain or gzip), Parquet, the Hugging Face hub. Every error names the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoner_ray.errors import DataError, EnvironmentProblem


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data set and where it stands."""

    where: str  # "file, line 12": opens every error text about this record
    id: str  # unique within its data set
    values: dict[str, Any]

    def get(self, key: str) -> Any:
        """The value of ``key``; raises ``DataError`` where it is missing or null."""
        if self.values.get(key) is None:
            raise DataError(f"{self.where}: no value for {key!r}; the keys are {', '.join(self.values)}")
        return self.values[key]

    def text(self, key: str) -> str:
        """The non-empty string at ``key``; raises ``DataError``."""
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {key!r} must be a non-empty string (got {value!r:.80})")
        return value


def read_records(path: str | Path) -> list[Record]:
    """All records of a Parquet file (``*.parquet``) or a file of JSON lines (anything else; ``*.gz`` is unpacked).

    Raises ``DataError`` where the file is missing, empty, truncated or broken.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"no data file at {file}")
    records = list(_parquet(file) if file.suffix == ".parquet" else _json_lines(file))
    if not records:
        raise DataError(f"{file} holds no records")
    return records


def read_hub(repository: str, split: str, subset: str | None = None) -> list[Record]:
    """All records of one split of a data set on the Hugging Face hub, through the ``datasets`` cache.

    Raises ``DataError`` where it cannot be had, ``EnvironmentProblem`` where ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem("reading the Hugging Face hub needs `pip install datasets`") from error
    name = f"{repository}[{split}]"
    try:
        rows = datasets.load_dataset(repository, subset, split=split)
    except (OSError, ValueError) as error:  # no network, no such set or split, offline mode
        raise DataError(f"cannot load {name} from the Hugging Face hub ({error}); set task.args.path to a local copy") from error
    records = [Record(f"{name}, row {i}", f"{split}-{i}", dict(row)) for i, row in enumerate(rows)]
    if not records:
        raise DataError(f"{name} holds no records")
    return records


def _json_lines(file: Path) -> Iterator[Record]:
    number, opened = 0, gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_record(file, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}, line {number + 1}: the gzip stream is broken or truncated ({error}); fetch the file again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {number + 1} or later: not UTF-8 ({error})") from error


def _json_record(file: Path, number: int, line: str) -> Record:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(values, dict):
        raise DataError(f"{file}, line {number}: must be a JSON object, not a {type(values).__name__}")
    return Record(f"{file}, line {number}", f"{file.name.split('.')[0]}-{number}", values)


def _parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentProblem("reading Parquet needs `pip install pyarrow`") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{file}, row {number}", f"{file.stem}-{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}, row {number + 1}: not a readable Parquet file ({error})") from error
