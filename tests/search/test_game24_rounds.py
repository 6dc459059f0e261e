"""What the Game24 measurement learns from: no solution of a held-out hand, and labels that the task itself gives."""

from __future__ import annotations

import json
import random
import re
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from benchmarks.game24_rounds import exact_steps, step_records, write_gold, write_labels, write_plays
from reasoner_ray.data import game24
from reasoner_ray.data.game24 import Game24Task
from reasoner_ray.data.number_games import is_reachable


@pytest.fixture(autouse=True)
def few_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take a minute to solve."""
    hands = [hand for hand in combinations_with_replacement(range(1, 9), 4) if sum(hand) % 4 == 0 and is_reachable(hand, 24)]
    monkeypatch.setattr(game24, "solvable_hands", lambda: hands)


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_nothing_learnt_solves_a_held_out_hand(tmp_path: Path) -> None:
    task = Game24Task(style="text", instruction="", solutions=4)
    plays = write_plays(tmp_path / "plays.jsonl", 300)
    assert plays == len(records(tmp_path / "plays.jsonl")) > 250
    assert all("Target: 24" not in str(r["prompt"]) for r in records(tmp_path / "plays.jsonl"))
    gold = write_gold(tmp_path / "gold.jsonl", task.train(), 0.1)
    found = records(tmp_path / "gold.jsonl")
    assert gold == len(found) > 0
    hands = {str(r["prompt"]) for r in found}
    assert len(hands) == pytest.approx(0.1 * len({str(item.prompt) for item in task.train()}), abs=1)


def test_each_line_of_a_sample_is_labelled_by_the_exact_check(tmp_path: Path) -> None:
    item = Game24Task(style="text", instruction="").train()[0]
    right = str(item.info["solution"])
    first, *rest = right.split("\n")
    wrong = "\n".join([first, "99 * 9 = 81 (left: 81)", *rest[1:]])
    tokens = {"tokens": [1, 2, 3, 4, 5], "start": 1, "ends": [2, 3, 4, 5]}
    search = {"id": item.id, "correct": 1.0, "cost": {}, "answers": [0, 1], "solutions": []}
    for text in (right, wrong, first):  # the last has fewer lines than steps: left out
        search["solutions"].append({"text": text, "correct": 1.0, "path": tokens})
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(search) + "\n")
    assert write_labels(results, tmp_path / "labels.jsonl") == {"solutions": 2.0, "right lines": 5 / 8, "further steps": 0.0}
    assert [r["labels"] for r in records(tmp_path / "labels.jsonl")] == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_the_exact_scorer_reads_the_hand_from_the_prompt() -> None:
    item = Game24Task(style="text", instruction="").train()[0]
    first, *rest = str(item.info["solution"]).split("\n")
    assert exact_steps(str(item.prompt), [first, *rest]) == [1.0] * 4
    assert exact_steps(str(item.prompt), [first, "99 * 9 = 81 (left: 81)", *rest[1:]]) == [1.0, 0.0, 0.0, 0.0]


def test_steps_of_a_hand_are_right_and_wrong_ones() -> None:
    task = Game24Task(style="text", instruction="")
    item = task.train()[0]
    found = step_records(item, random.Random(0), 8, 6)
    assert {len(record["steps"]) for record in found} == {1, 2}
    for record in found:
        assert task.check_steps(item, record["steps"]) == [bool(label) for label in record["labels"]], record
    last = [record["labels"][-1] for record in found]
    assert 0.3 < sum(last) / len(last) < 0.7


def test_a_misprint_is_a_right_step_with_one_number_changed() -> None:
    task = Game24Task(style="text", instruction="")
    item = task.train()[0]
    plain, found = (step_records(item, random.Random(0), 8, 6, misprints) for misprints in (0, 5))
    assert found[: len(plain)] == plain
    right = {tuple(record["steps"]) for record in plain if record["labels"][-1]}
    assert len(found) == len(plain) + 5
    for record in found[len(plain) :]:
        *before, last = record["steps"]
        assert task.check_steps(item, [*before, last]) == [bool(label) for label in record["labels"]], record
        sum_of = last.split(" (")[0].replace(" = ", " == ")
        assert eval(sum_of) or not record["labels"][-1], record
        changed = [zip(re.findall(r"\d+", last), re.findall(r"\d+", steps[-1]), strict=False) for steps in right if [*steps[:-1]] == before]
        assert any(sum(a != b for a, b in pairs) == 1 for pairs in changed), record
    assert not all(record["labels"][-1] for record in found[len(plain) :])
