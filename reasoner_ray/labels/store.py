"""Where labels are kept: a journal with a line a question, and the data set made of it, a record a solution."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from reasoner_ray.journal import entries, open_locked

JOURNAL = "questions.jsonl"
ROWS = 1000
"""Solutions of a row group of Parquet."""


def remove_labels(folder: Path) -> None:
    """Remove a run's labels with all that lies beside their journal. Raises ``CheckpointError`` where another process still writes them."""
    journal = folder / JOURNAL
    with open_locked(journal) if journal.is_file() else nullcontext():  # held until it is gone, so that nobody begins to write
        shutil.rmtree(folder)


def solutions(path: Path) -> Iterator[dict[str, Any]]:
    """A record for each solution with a label that is known: what ``kind: prm`` and ``kind: value`` train on."""
    for question in entries(path):
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
