"""Data sets from files: what they yield, and where they are broken."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import TaskConfig
from reasoner_ray.data.math import last_boxed
from reasoner_ray.data.records import read_hub, read_records
from reasoner_ray.data.tasks import Task, get_task
from reasoner_ray.errors import ConfigError, DataError

ROWS = [{"prompt": f"{i} + 1 =", "answer": i + 1, "level": i % 3} for i in range(200)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_gzip(path: Path, rows: list[Any], keep: float = 1.0) -> Path:
    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
    path.write_bytes(packed[: int(len(packed) * keep)])
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def task_of(name: str, path: Path, **args: Any) -> Task:
    return get_task(TaskConfig(name=name, args={"path": str(path), **args}))


@pytest.mark.parametrize(
    ("task", "file", "write"),
    [("jsonl", "a.jsonl", write_lines), ("jsonl", "a.jsonl.gz", write_gzip), ("parquet", "a.parquet", write_parquet)],
)
def test_every_format_gives_the_same_items(tmp_path: Path, task: str, file: str, write: Callable[[Path, list[Any]], Path]) -> None:
    loaded = task_of(task, write(tmp_path / file, ROWS))
    train, held_out = loaded.train(), loaded.held_out()
    found = sorted((i.answer, i.prompt, i.info["level"]) for i in [*train, *held_out])
    assert found == [(r["answer"], r["prompt"], r["level"]) for r in ROWS]
    assert 5 < len(held_out) < 40
    assert not {i.prompt for i in train} & {i.prompt for i in held_out}


def test_held_out_questions_that_are_learnt_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"{i} + 1 ?", "answer": f"so\n#### {i + 1}"} for i in range(4)]
    train, apart = write_lines(tmp_path / "t.jsonl", rows[:3]), write_lines(tmp_path / "h.jsonl", rows[3:])
    both = write_lines(tmp_path / "b.jsonl", rows[2:])
    task_of("gsm8k", train, held_out_path=str(apart)).held_out()
    assert "as well" not in caplog.text
    task_of("gsm8k", train, held_out_path=str(both)).held_out()
    assert "1 of 2 held-out questions are training questions as well" in caplog.text
    caplog.clear()
    same = write_lines(tmp_path / "s.jsonl", ROWS[:3])
    task_of("jsonl", same, held_out_path=str(same)).held_out()
    assert "3 of 3 held-out questions" in caplog.text


def test_the_split_is_decided_by_content(tmp_path: Path) -> None:
    forwards = task_of("jsonl", write_lines(tmp_path / "a.jsonl", ROWS))
    backwards = task_of("jsonl", write_lines(tmp_path / "b.jsonl", ROWS[::-1]))
    assert {i.prompt for i in forwards.held_out()} == {i.prompt for i in backwards.held_out()}


def test_keys_styles_and_a_file_of_held_out_records(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", [{"q": "why?", "a": 1}, {"q": [{"role": "user", "content": "chat"}], "a": 2}])
    held_out = write_lines(tmp_path / "b.jsonl", [{"q": "when?", "a": 3}])
    task = task_of("jsonl", train, held_out_path=str(held_out), prompt="q", answer="a", style="chat", instruction="Be brief.")
    assert [i.prompt for i in task.train()] == [[{"role": "user", "content": "why?\n\nBe brief."}], [{"role": "user", "content": "chat"}]]
    assert [i.answer for i in task.held_out()] == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": 1}\n{"prompt": "b", "ans', r"a\.jsonl, line 2: not valid JSON"),
        ('{"prompt": "a", "answer": 1}\n\n[1]\n', r"a\.jsonl, line 3: must be a JSON object, not a list"),
        ('{"prompt": "a"}\n', r"a\.jsonl, line 1: no value for 'answer'; the keys are prompt"),
        ('{"prompt": " ", "answer": 1}\n', r"a\.jsonl, line 1: 'prompt' must be a non-empty string"),
        ('{"prompt": [], "answer": 1}\n', r"a\.jsonl, line 1: 'prompt' must be a string or a list of messages"),
        ("", r"a\.jsonl holds no records"),
        ("\n \n", r"a\.jsonl holds no records"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        task_of("jsonl", path).train()


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at .*none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
    rows = [{"prompt": f"{i} {hash(i)}", "answer": i} for i in range(5000)]
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line \d+: the gzip stream is broken or truncated"):
        read_records(write_gzip(tmp_path / "a.jsonl.gz", rows, keep=0.7))
    (tmp_path / "b.jsonl.gz").write_text("no gzip at all")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz, line 1: the gzip stream"):
        read_records(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 1 or later: not UTF-8"):
        read_records(tmp_path / "c.jsonl")
    whole = write_parquet(tmp_path / "d.parquet", ROWS).read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"d\.parquet, row 1: not a readable Parquet file"):
        read_records(tmp_path / "d.parquet")


def test_a_hub_that_does_not_answer_is_one_error() -> None:
    with pytest.raises(DataError, match=r"cannot load openai/gsm8k\[train\] .* set task\.args\.path"):
        read_hub("openai/gsm8k", "train", "main")


def test_gsm8k_from_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### 1,{i:03d}"} for i in range(3)]
    path = write_lines(tmp_path / "g.jsonl", rows)
    task = task_of("gsm8k", path, held_out_path=str(path), style="text", shots=1, instruction="")
    assert task.default_scorer == "math"
    assert [(i.id, i.answer) for i in task.train()] == [("g-2", "1001"), ("g-3", "1002")]  # the first one became the example
    assert task.train()[0].prompt == (
        "Question: What is 0 + 1?\nAnswer: It is 1.\nThe answer is \\boxed{1000}.\n\nQuestion: What is 1 + 1?\nAnswer:"
    )
    with pytest.raises(DataError, match=r"h\.jsonl, line 1: 'answer' has no final number"):
        task_of("gsm8k", write_lines(tmp_path / "h.jsonl", [{"question": "?", "answer": "7"}]), held_out_path=str(path)).train()
    with pytest.raises(ConfigError, match=r"task\.args\.shots: only 3 training records"):
        task_of("gsm8k", path, held_out_path=str(path), shots=4).train()


def test_math_answers_and_examples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"problem": "p0", "answer": "\\frac{1}{2}", "level": "Level 1"},
        {"problem": "p1", "solution": "so \\boxed{x^{2}}."},
        {"problem": "p2", "answer": ""},
    ]
    path = write_lines(tmp_path / "m.jsonl", rows)
    task = task_of("math", path, held_out_path=str(path), shots=1)
    assert [(i.answer, i.info) for i in task.train()] == [("\\frac{1}{2}", {"level": "Level 1"})]
    assert [i.answer for i in task.held_out()] == ["\\frac{1}{2}", "x^{2}"]
    assert [m["role"] for m in task.train()[0].prompt] == ["user", "assistant", "user"]
    assert "1 of 3 records have no answer" in caplog.text and "line 3" in caplog.text


def test_questions_can_be_chosen_by_a_key_of_their_records(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": str(i), "level": f"Level {i % 3}"} for i in range(6)]
    path = write_lines(tmp_path / "m.jsonl", rows)
    one = task_of("math", path, held_out_path=str(path), where={"level": "Level 1"})
    assert [i.answer for i in one.train()] == [i.answer for i in one.held_out()] == ["1", "4"]
    two = task_of("math", path, held_out_path=str(path), where={"level": ["Level 0", "Level 1"]}, held_out_size=3)
    assert [i.answer for i in two.train()] == ["0", "1", "3", "4"] and len(two.held_out()) == 3


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"level": 9}, r"of 6 records, the first at .*m\.jsonl, line 1, none has level in \[9\]; they have 0, 1, 2"),
        ({"level": "1"}, r"none has level in \['1'\]; they have 0, 1, 2"),
        ({"level": True}, r"none has level in \[True\]; they have 0, 1, 2"),
        ({"levle": 1}, r"none has levle in \[1\]; their keys are problem, answer, level"),
        ({"levle": None}, r"none has levle in \[None\]"),
        ({"level": []}, r"where\.level: must name at least one value"),
        ("level", r"must name keys and their values.*got 'level'"),
        (0, r"must name keys and their values.*got 0"),
    ],
)
def test_a_choice_that_leaves_nothing_or_is_none_is_told(tmp_path: Path, where: Any, message: str) -> None:
    rows = [{"problem": f"p{i}", "answer": str(i), "level": i % 3} for i in range(6)]
    path = write_lines(tmp_path / "m.jsonl", rows)
    with pytest.raises((ConfigError, DataError), match=message):
        task_of("math", path, held_out_path=str(path), where=where).train()


def test_records_without_the_key_of_a_choice_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"problem": f"p{i}", "answer": str(i), **({"level": 1} if i else {})} for i in range(3)]
    path = write_lines(tmp_path / "m.jsonl", rows)
    assert [i.answer for i in task_of("math", path, held_out_path=str(path), where={"level": 1}).train()] == ["1", "2"]
    assert "1 of 3 records have no level and are left out" in caplog.text


def test_last_boxed() -> None:
    assert last_boxed("\\boxed{1} then \\boxed{\\frac{a}{b}} end") == "\\frac{a}{b}"
    assert last_boxed("no box") is None
    assert last_boxed("\\boxed{open {") is None


@pytest.mark.parametrize(
    ("name", "files", "counts"),
    [
        ("gsm8k", ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl"), (7473, 1319)),
        ("math", ("math/math12k_train.jsonl.gz", "math/math500_test.jsonl"), (11998, 500)),
    ],
)
def test_the_real_sets_load(data_dir: Path, name: str, files: tuple[str, str], counts: tuple[int, int]) -> None:
    task = task_of(name, data_dir / files[0], held_out_path=str(data_dir / files[1]))
    assert (len(task.train()), len(task.held_out())) == counts
    assert not {str(i.prompt) for i in task.train()} & {str(i.prompt) for i in task.held_out()}


def test_a_fixed_sample_of_the_held_out_records(data_dir: Path) -> None:
    paths = {"path": str(data_dir / "math/math12k_train.jsonl.gz"), "held_out_path": str(data_dir / "math/math500_test.jsonl")}
    whole = get_task(TaskConfig(name="math", args=paths)).held_out()
    sample = get_task(TaskConfig(name="math", args={**paths, "held_out_size": 100}), seed=4).held_out()
    smaller = get_task(TaskConfig(name="math", args={**paths, "held_out_size": 40})).held_out()
    assert (len(sample), len(smaller)) == (100, 40)
    assert {i.id for i in smaller} < {i.id for i in sample} < {i.id for i in whole}
    assert [i.id for i in sample] == [i.id for i in whole if i.id in {s.id for s in sample}]
    with pytest.raises(ConfigError, match=r"task\.args\.held_out_size: must be at least 1"):
        get_task(TaskConfig(name="math", args={**paths, "held_out_size": 0}))
