"""What is learnt out of searches: right paths alone for the policy, right and wrong ones for the value model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.errors import DataError
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.rounds.data import gather, judged_paths, right_paths
from reasoner_ray.rounds.figures import hacking_figures, training_figures
from reasoner_ray.search.results import make_record
from reasoner_ray.steps import Partial
from tests.search.test_run import COST, ITEMS, found


def solution(text: str, correct: float | None, token: int = 3) -> dict[str, Any]:
    path = {"tokens": [1, 2, token, 4], "start": 2, "ends": [3, 4]}
    return {"text": text, "correct": correct, "path": path, "value": 0.5, "steps": 2, "tokens": 2}


def searched(name: str, *solutions: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "correct": 1.0, "cost": COST, "answers": [], "solutions": list(solutions)}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_wrong_path_is_never_learnt_by_the_policy(tmp_path: Path) -> None:
    """The reference's builder of fine-tuning data does not look at ``correct``."""
    results = write(
        tmp_path / "r.jsonl",
        searched("a", solution("right", 1.0), solution("wrong", 0.0, 5), solution("half", 0.5, 6), solution("unjudged", None, 7)),
        searched("b", solution("wrong", 0.0, 8)),
    )
    counts = gather([results], tmp_path / "policy.jsonl", "sft", right_from=1.0, keep=None)
    assert counts == {"paths": 1.0, "questions": 1.0}
    (line,) = map(json.loads, (tmp_path / "policy.jsonl").read_text().splitlines())
    assert line["tokens"] == [1, 2, 3, 4] and line["start"] == 2
    gather([results], tmp_path / "value.jsonl", "value", right_from=1.0, keep=None)
    learnt = [json.loads(line) for line in (tmp_path / "value.jsonl").read_text().splitlines()]
    assert [(r["tokens"][2], r["reward"]) for r in learnt] == [(3, 1.0), (5, 0.0), (6, 0.5), (8, 0.0)], "what was judged, right and wrong"


def test_each_text_of_a_question_once_and_so_many_at_most() -> None:
    new = searched("a", solution("x", 1.0), solution("x ", 1.0), solution("y", 1.0))
    old = searched("a", solution("y", 1.0), solution("z", 1.0))
    other = searched("b", solution("x", 1.0))
    assert len(right_paths([new, old, other], 1.0, None)) == 4, "x, y, z of a; x of b"
    kept = right_paths([new, old, other], 1.0, 2)
    assert [r["question"] for r in kept] == ["a", "a", "b"], "the newest first"
    assert len({r["id"] for r in judged_paths([new, old, other])}) == 4


@settings(deadline=None)  # a busy machine is no fault of the code
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([0.0, 1.0, None])), max_size=12))
def test_the_policys_data_are_the_right_ones_of_the_value_models(drawn: list[tuple[str, str, float | None]]) -> None:
    truth = {(question, text): correct for question, text, correct in drawn}  # a text is right or wrong, not both
    searches = [searched(question, solution(text, truth[question, text])) for question, text, _ in drawn]
    judged = judged_paths(searches)
    assert right_paths(searches, 1.0, None) == [r for r in judged if r["reward"] == 1.0]
    assert len(judged) == sum(correct is not None for correct in truth.values())


def test_a_round_without_a_right_path_says_so(tmp_path: Path) -> None:
    results = write(tmp_path / "r.jsonl", searched("a", solution("w", 0.0)), searched("b"))
    with pytest.raises(DataError, match=r"no search of 2 training questions found a right path .*nothing to learn from: begin with"):
        gather([results], tmp_path / "p.jsonl", "sft", right_from=1.0, keep=4)
    assert not (tmp_path / "p.jsonl").exists()
    bare = solution("r", 1.0)
    del bare["path"]
    with pytest.raises(DataError, match=r"no tokens to learn from: search\.save_tokens must be true"):
        right_paths([searched("a", bare)], 1.0, None)


def test_what_a_search_records_is_what_training_reads(tmp_path: Path) -> None:
    """Tokens are neither decoded nor encoded on the way from the search to the gradient."""
    record = make_record(0, ITEMS[0], found(ITEMS[0]), [1.0, 0.0], tokens=True)
    assert "path" not in make_record(0, ITEMS[0], found(ITEMS[0]), [1.0, 0.0])["solutions"][0]
    file = tmp_path / "value.jsonl"
    gather([write(tmp_path / "r.jsonl", record)], file, "value", right_from=1.0, keep=None)
    (example,), _ = read_examples([str(file)], "value", SupervisedConfig(), None)  # type: ignore[arg-type]
    assert example.partial == Partial((1, 2, 3), (3,), 1) and example.reward == 1.0
    assert example.trajectory("sft", SupervisedConfig()).loss_mask.tolist() == [False, True, True]


def test_hacking_is_measured_by_hand() -> None:
    """Scores .9 and .1 of right answers, .8 of a wrong one: a gap of -.3."""
    right, also, wrong = solution("x", 1.0), solution("y", 1.0), solution("z", 0.0)
    right["value"], also["value"], wrong["value"] = 0.9, 0.1, 0.8
    figures = hacking_figures([searched("a", right, wrong), searched("b", also, solution("u", None))])
    assert figures["gap"] == pytest.approx(0.5 - 0.8) and figures["score"] == pytest.approx(0.6)
    assert figures["correlation"] < 0 and figures["steps"] == 2 and "reward" not in figures


def test_figures_before_and_after_training() -> None:
    records = [{"step": 0, "eval/auc": 0.5}, {"step": 1, "process/gap": 0.3, "learner/loss": 1.0}, {"step": 2, "eval/auc": 0.7}]
    assert training_figures(records) == {"auc": 0.7, "auc_before": 0.5, "process_gap": 0.3}
