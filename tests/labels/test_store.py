"""The journal: nothing lost and nothing twice, whatever kills the process; and what is made of it."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.data.records import read_records
from reasoner_ray.errors import CheckpointError, DataError
from reasoner_ray.journal import Journal, entries
from reasoner_ray.labels.report import lines_of, summarise
from reasoner_ray.labels.store import export
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.settings import SupervisedConfig
from tests.search.toy import TOKENIZER

HEADER = {"model": {"path": "m"}, "labels": {"completions": 8}}
WORKER = """
import sys, time
from pathlib import Path
from reasoner_ray.journal import Journal

with Journal(Path(sys.argv[1]), {"labels": 1}) as journal:
    for i in range(400):
        if str(i) not in journal.done:
            journal.append({"id": str(i), "status": "labelled", "text": "x" * (i % 5) * 3000})
            time.sleep(0.001)
"""


def solution(soft: list[float | None], *, right: bool | None, **more: Any) -> dict[str, Any]:
    hard = [None if value is None else value > 0 for value in soft]
    first = next((i for i, label in enumerate(hard) if label is False), None)
    texts = {"tokens": [5, *range(len(soft))], "start": 1, "ends": list(range(2, len(soft) + 2)), "steps": ["s"] * len(soft)}
    reward = None if right is None else float(right)
    return {**texts, "labels": soft, "soft": soft, "hard": hard, "first_error": first, "right": right, "reward": reward, **more}


def question(name: str, *solutions: dict[str, Any], status: str = "labelled", generated: int = 100) -> dict[str, Any]:
    numbers = {"estimates": 3, "cut": 0, "graded": 24, "grader_failures": 1}
    cost = {"generated": generated, "requests": 24, "prompt": 50, "prompt_computed": 10, "cut": 2}
    return {"id": name, "prompt": "p", "status": status, **numbers, "cost": cost, "solutions": list(solutions), "states": []}


def write(path: Path, *records: dict[str, Any]) -> Path:
    with Journal(path, HEADER) as journal:
        for record in records:
            journal.append(record)
    return path


def test_a_labelling_process_that_is_killed_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    kept = b""
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(path)])
        before = len(kept)
        while kill < 3 and (not path.exists() or path.stat().st_size < before + 100_000):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        if kill < 3:
            process.send_signal(signal.SIGKILL)
        assert process.wait(60) == (-signal.SIGKILL if kill < 3 else 0)
        found = path.read_bytes()
        assert found.startswith(kept[: kept.rfind(b"\n") + 1]), "what was finished stays as it was"
        kept = found
    ids = [record["id"] for record in entries(path)]
    assert sorted(ids, key=int) == [str(i) for i in range(400)]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_dropped_and_its_question_done_again(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "q.jsonl", question("a"), question("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [q["id"] for q in entries(path)] == ["a"]
    with Journal(path, HEADER) as journal:
        assert journal.done == {"a"}
        journal.append(question("b"))
    assert [q["id"] for q in entries(path)] == ["a", "b"]


def test_a_journal_torn_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"mod')
    with Journal(path, HEADER) as journal:
        assert journal.done == set()
    assert json.loads(path.read_text()) == HEADER


def test_a_long_torn_line_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", question("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * (3 << 20))
    with Journal(path, HEADER) as journal:
        assert journal.done == {"a"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_half_a_surrogate_pair_is_written_as_jsons_escape_of_it(tmp_path: Path, kind: Any) -> None:
    """A tokenizer that is cut inside a character may leave one, and UTF-8 has none."""
    half = question("a", solution([1.0], right=True, steps=["half \ud83d"]))
    path = write(tmp_path / "q.jsonl", half, question("b", solution([1.0], right=True)))
    (first, _) = entries(path)
    assert first["solutions"][0]["steps"] == ["half \ud83d"], "nothing is lost"
    values = read_records(export(path, kind))[0].values
    assert values["steps"] == (["half \ud83d"] if kind == "jsonl" else ["half \\ud83d"])


@pytest.mark.parametrize("line", [b'{"id": "b", "stat\n', b"[1]\n", b'{"status": "labelled"}\n', b"\xff\xfe\n"])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "q.jsonl", question("a"))
    path.write_bytes(path.read_bytes() + line + json.dumps(question("c")).encode() + b"\n")
    with pytest.raises(DataError, match=r"q\.jsonl, line 3: not .*remove the line"):
        Journal(path, HEADER)
    with pytest.raises(DataError, match="line 3"):
        export(path, "jsonl")


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(CheckpointError, match=r"cannot be locked \(Operation not supported\); take a folder on a file system"):
        Journal(tmp_path / "q.jsonl", HEADER)


def test_other_settings_and_a_second_process_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", question("a"))
    with pytest.raises(CheckpointError, match="begun with another labels; go on with its own settings"):
        Journal(path, {**HEADER, "labels": {"completions": 4}})
    with Journal(path, HEADER), pytest.raises(CheckpointError, match="in use: another process"):
        Journal(path, HEADER)
    with Journal(path, HEADER) as again:
        assert again.done == {"a"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_data_set_has_a_record_a_solution(tmp_path: Path, kind: Any) -> None:
    first, second, unknown = solution([0.5, None, 0.0], right=False), solution([1.0], right=None), solution([None], right=None)
    path = write(tmp_path / "q.jsonl", question("a", first, second, unknown), question("b", status="all right"), question("c", first))
    records = read_records(export(path, kind))
    assert [r.values["id"] for r in records] == ["a/0", "a/1", "c/0"]
    values = records[0].values
    assert values["labels"] == values["soft"] == [0.5, None, 0.0] and values["hard"] == [True, None, False]
    assert (values["tokens"], values["start"], values["ends"]) == ([5, 0, 1, 2], 1, [2, 3, 4])
    assert records[1].values["right"] is None and values["right"] is False and values["reward"] == 0.0
    assert not list(tmp_path.glob("*.tmp"))
    for learns, number in (("prm", 3), ("value", 2)):  # a value model: not the solution that nobody could judge
        examples, left_out = read_examples([str(export(path, kind))], learns, SupervisedConfig(max_tokens=64), TOKENIZER)  # type: ignore[arg-type]
        assert (len(examples), left_out.total()) == (number, 3 - number), "what a job learns from"
        assert examples[0].labels == (0.5, None, 0.0) if learns == "prm" else examples[0].reward == 0.0


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    """What the task's own check said, and what the labels of the question cost, among it."""
    checked = solution([0.5, 0.0], right=False, exact=[True, None])
    path = write(tmp_path / "q.jsonl", question("a", checked, solution([1.0], right=True)), question("c", checked, generated=7))
    lines, rows = (read_records(export(path, kind)) for kind in ("jsonl", "parquet"))
    assert [r.values for r in lines] == [r.values for r in rows]
    assert {frozenset(r.values) for r in [*lines, *rows]} == {frozenset({"id", "question", "prompt", "cost", *checked})}
    assert [r.values["exact"] for r in rows] == [[True, None], None, [True, None]]
    assert [r.values["cost"]["generated"] for r in rows] == [100, 100, 7], "of the whole question, in each of its records"
    assert rows[0].values["cost"] == {"generated": 100, "prompt": 50, "prompt_computed": 10}


def test_the_report_by_hand(tmp_path: Path) -> None:
    wrong, right = solution([0.5, 0.25, 0.0, 0.0], right=False), solution([1.0, None, None, 1.0], right=True)
    early = solution([0.0, 0.0, 0.0, 0.0], right=False, exact=[True, False, False, False])
    failed = {"id": "z", "status": "failed", "error": "too long"}
    path = write(
        tmp_path / "q.jsonl", question("a", wrong, right), question("b", early, generated=250), question("c", status="all wrong"), failed
    )
    report = summarise(entries(path))
    assert report["questions"] == 4 and report["by_status"] == {"all wrong": 1, "failed": 1, "labelled": 2}
    assert (report["solutions"], report["solutions_right"], report["steps"]) == (3, 1, 12)
    assert (report["labels"], report["labels_right"], report["balance"], report["soft_labels"]) == (10, 4, 0.4, 10)
    assert report["first_errors"] == {
        "solutions": 2,
        "by_step": {"0": 1, "2": 1},
        "by_quarter": {"first quarter": 1, "second quarter": 0, "third quarter": 1, "last quarter": 0},
    }
    assert report["tokens_per_label"] == 450 / 10
    assert report["agreement"] == 3 / 4, "of the solution that was checked"
    assert (report["estimates"], report["graded"], report["grader_failures"]) == (9, 72, 3)
    text = "\n".join(lines_of(report))
    assert "40.0% right" in text and "45.0 generated tokens a label" in text and "3 answers not graded" in text
    assert "6 completions cut by the limit" in text


def test_a_report_of_nothing() -> None:
    empty = summarise([])
    assert empty["balance"] is empty["tokens_per_label"] is None
    assert lines_of(empty)[-1] == "faults      none"
