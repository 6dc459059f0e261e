"""Where labels are kept: a journal with a line a question, and the data set made of it, a record a solution."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from reasoner_ray.journal import as_line, entries, remove_folder

JOURNAL = "questions.jsonl"
ROWS = 1000
"""Solutions of a row group of Parquet."""
COSTS = ("generated", "prompt", "prompt_computed")
"""Of a question's costs in tokens, those that its records hold."""


def remove_labels(folder: Path) -> None:
    """Remove a run's labels with all that lies beside their journal. Raises ``CheckpointError`` where another process still writes them."""
    remove_folder(folder, folder / JOURNAL)


def solutions(path: Path) -> Iterator[dict[str, Any]]:
    """A record for each solution with a label that is known: what ``kind: prm`` and ``kind: value`` train on.

    ``cost`` is what all labels of its question cost, in tokens; ``exact`` the task's own word on the steps, None where it has none.
    """
    for question in entries(path):
        cost = {name: question["cost"][name] for name in COSTS} if "cost" in question else None
        for number, solution in enumerate(question.get("solutions", ())):
            if any(label is not None for label in solution["labels"]):
                about = {"id": f"{question['id']}/{number}", "question": question["id"], "prompt": question["prompt"], "cost": cost}
                yield {**about, "exact": None, **solution}


def export(journal: Path, kind: Literal["jsonl", "parquet"]) -> Path:
    """Write ``labels.jsonl`` or ``labels.parquet`` beside the journal, aside first and then renamed. Returns the file."""
    target = journal.with_name(f"labels.{kind}")
    aside = target.with_suffix(f".{kind}.tmp")
    if kind == "parquet":
        _write_parquet(aside, solutions(journal))
    else:
        with aside.open("wb") as out:
            out.writelines(map(as_line, solutions(journal)))
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
    columns |= {"exact": pa.list_(pa.bool_()), "cost": pa.struct(dict.fromkeys(COSTS, pa.int64()))}
    schema = pa.schema(columns)
    with pq.ParquetWriter(path, schema) as writer:
        while rows := list(islice(records, ROWS)):
            writer.write_table(pa.Table.from_pylist([_in_utf8(row) for row in rows], schema=schema))


def _in_utf8(value: Any) -> Any:
    """Plain data with half surrogate pairs written out, as JSON has them: Parquet takes UTF-8 alone."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _in_utf8(each) for key, each in value.items()}
    return [_in_utf8(each) for each in value] if isinstance(value, list) and value and isinstance(value[0], str) else value
