"""Each scorer on answers judged by hand, the weighted sum, and a user's own function."""

from __future__ import annotations

import gzip
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import ScoringConfig, TaskConfig, load_config
from reasoner_ray.data.tasks import Item, get_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.scoring.base import Answer, CompositeScorer, Score, Term, build_scorer, reward_terms
from reasoner_ray.scoring.exact_match import numbers_in

OBEY = "tests.scoring.graders_that_fail:obey"


def judge(name: str, text: str, reference: Any = "", *, n_tokens: int = 0, **args: Any) -> float:
    score = CompositeScorer([Term(name, 1.0, args)]).score(Answer(text=text, n_tokens=n_tokens), Item(id="i", prompt="", answer=reference))
    assert score.status == "ok", score
    return score.value


@pytest.mark.parametrize(
    ("args", "text", "reference", "value"),
    [
        ({}, " 46\n", "46", 1),
        ({}, " 46\n13 + 4", "46", 0),
        ({}, "46", 46, 1),
        ({}, "forty six", "46", 0),
        ({"stop": ["###"]}, " 46 ###", "46", 1),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "Yes", "yes", 1),
    ],
)
def test_exact_match(args: dict[str, Any], text: str, reference: Any, value: float) -> None:
    assert judge("exact_match", text, reference, **args) == value


@pytest.mark.parametrize(
    ("args", "text", "reference", "value"),
    [
        ({}, "3 apples and 4 pears make 7.", 7, 1),
        ({"which": "first"}, "7 = 3 + 4", "7", 1),
        ({}, "It costs $1,234.50", "1234.5", 1),
        ({}, "-3", "3", 0),
        ({}, "x-3", "-3", 1),
        ({}, "1e3", "1000", 1),
        ({}, "none", "1", 0),
        ({}, "0.333", "0.3333", 0),
        ({"tolerance": 0.01}, "0.333", "0.3333", 1),
        ({}, "12,34", "34", 1),
    ],
)
def test_numeric(args: dict[str, Any], text: str, reference: Any, value: float) -> None:
    assert judge("numeric", text, reference, **args) == value


@pytest.mark.parametrize(
    ("args", "text", "reference", "value"),
    [
        ({}, "so the answer is $\\boxed{\\frac{1}{2}}$.", "0.5", 1),
        ({}, "We try \\boxed{17}, then \\boxed{18}", "18", 1),  # the last box counts,
        ({}, "We try \\boxed{18}, then \\boxed{17}", "18", 0),  # and the last alone
        ({}, "That makes 1,000 dollars", "1000", 1),
        ({}, "\\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ({}, "\\boxed{(1, 2)}", "(2,1)", 0),
        ({}, "\\boxed{[1,2]}", "(1,2)", 0),  # brackets mean something
        ({}, "\\boxed{(1,2]}", "[1,2]", 0),
        ({}, "\\boxed{50}", "0.5", 0),  # and so does a factor of 100
        ({}, "\\boxed{5}", "500", 0),
        ({}, "\\boxed{\\$32,\\!348}", "\\$32,\\!348", 1),
        ({}, "\\boxed{50\\%}", "$50\\%$", 1),
        ({}, "I do not know", "3", 0),
        ({}, "3", "3", 1),
        ({"boxed_only": True}, "3", "3", 0),
        ({"boxed_only": True}, "\\boxed{3}", "3", 1),
        ({}, "\\boxed{" * 200, "3", 0),
    ],
)
def test_math(args: dict[str, Any], text: str, reference: Any, value: float) -> None:
    assert judge("math", text, reference, **args) == value


@pytest.mark.parametrize(
    ("args", "text", "value"),
    [
        ({"style": "boxed"}, "so \\boxed{1}", 1),
        ({"style": "boxed"}, "so \\boxed{}", 0),
        ({"style": "think"}, "<think>a\nb</think>\nc", 1),
        ({"style": "think"}, "<think>a</think>", 0),
        ({"style": "think"}, "<think>a<think>b</think>c", 0),
        ({"style": "think"}, "a <think>b</think> c", 0),
        ({"style": "answer"}, "so\n<answer>3</answer>\n", 1),
        ({"style": "answer"}, "<answer>3</answer> and more", 0),
        ({"style": "answer"}, "<answer> </answer>", 0),
        ({"pattern": r"\d+.*end"}, "12\nend", 1),
        ({"pattern": r"\d+"}, "12 ", 0),
    ],
)
def test_format(args: dict[str, Any], text: str, value: float) -> None:
    assert judge("format", text, **args) == value


@pytest.mark.parametrize(("n", "penalty"), [(0, 0), (80, 0), (85, -0.25), (100, -1), (200, -1)])
def test_overlong(n: int, penalty: float) -> None:
    assert judge("overlong", "", n_tokens=n, limit=100, margin=20) == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("extract", "text", "value"),
    [("tag", "so <answer> {} </answer>", 1), ("tag", "so {}", 0), ("last_line", "so\n{}\n", 1), ("all", " {}\n", 1), ("all", "1 {}", 0.5)],
)
def test_reasoning_gym_uses_the_sets_own_verifier(extract: str, text: str, value: float) -> None:
    task = get_task(TaskConfig(name="reasoning_gym", args={"dataset": "chain_sum", "train_size": 1, "held_out_size": 1}))
    item = task.held_out()[0]
    answer = Answer(text=text.replace("{}", item.answer))
    score = build_scorer(Term("reasoning_gym", args={"extract": extract})).score(answer, item)
    if value == 0.5:  # this set gives part marks: the share of the answer that is right
        assert 0 < score < 1
    else:
        assert score == value


def test_weighted_sum_by_hand() -> None:
    composite = CompositeScorer([Term("exact_match", 2.0), Term("format", -0.5, {"pattern": r"\d+"}), Term(OBEY, 0.25, {"good": 3.0})])
    score = composite.score(Answer(text="7"), Item(id="i", prompt="", answer="7"))
    assert score.value == 2.0 - 0.5 + 0.75
    assert score.parts == {"exact_match": 1.0, "format": 1.0, OBEY: 3.0}
    twice = CompositeScorer([Term("format", 1.0, {"pattern": p}) for p in (r"\d+", r"\w+", "")])
    assert twice.score(Answer(text="x1"), Item(id="i", prompt="", answer="")).parts == {"format": 0.0, "format.2": 1.0, "format.3": 0.0}


@pytest.mark.parametrize(
    ("text", "error_type", "detail"),
    [
        ("raise", "KeyError", "no such thing"),
        ("nan", "ValueError", "finite"),
        ("text", "ValueError", "five"),
        ("refuse", "NotMyField", "I do not judge"),
    ],
)
def test_a_term_that_fails_makes_the_score_fail_and_is_named(text: str, error_type: str, detail: str) -> None:
    score = CompositeScorer([Term("exact_match"), Term(OBEY, 0.0)]).score(Answer(text=text), Item(id="i", prompt="", answer=text))
    assert (score.status, score.error_type) == ("error", error_type)
    assert math.isnan(score.value), "never a silent 0"
    assert score.detail.startswith(f"{OBEY}: ") and detail in score.detail


def test_a_reference_that_cannot_be_judged_is_an_error_not_a_wrong_answer() -> None:
    for name, reference in (("math", ""), ("numeric", "seven")):
        score = CompositeScorer([Term(name)]).score(Answer(text="7"), Item(id="i7", prompt="", answer=reference))
        assert score.status == "error" and "i7" in score.detail


def test_a_score_that_is_ok_is_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Score(value=math.inf)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{name: exact_mach}", "scoring.scorers.name: unknown scorer 'exact_mach'; did you mean 'exact_match'"),
        ("{name: exact_match, args: {stopp: x}}", "scoring.scorers.exact_match.args.stopp: unknown key; did you mean 'stop'"),
        (f"{{name: '{OBEY}', args: {{god: 1}}}}", r"args\.god: unknown key; did you mean 'good'"),
        (f"{{name: '{OBEY}', args: {{item: 1}}}}", r"args\.item: unknown key"),
        (f"{{name: '{OBEY}s'}}", "has no 'obeys'; did you mean 'obey'"),
        ("{name: overlong, args: {limit: 5}}", "scoring.scorers.overlong.args.margin: must be given"),
    ],
)
def test_a_job_with_a_wrong_scorer_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"scoring.scorers=[{spec}]"])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("format", {}, "either style or pattern"),
        ("format", {"style": "box"}, "unknown 'box'; did you mean 'boxed'"),
        ("format", {"pattern": "("}, "not a regular expression"),
        ("numeric", {"which": "best"}, "must be first or last"),
        ("overlong", {"limit": 5, "margin": 6}, "margin: must be in 1..limit=5"),
        ("reasoning_gym", {"extract": "tags"}, "did you mean 'tag'"),
    ],
)
def test_a_scorer_refuses_what_it_cannot_do(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scorer(Term(name, args=args))


def test_the_tasks_own_scorer_and_the_environments_weight() -> None:
    scoring = ScoringConfig.model_validate({"scorers": [{"name": "task", "weight": 2}, {"name": "environment", "weight": 0.5}]})
    reward = reward_terms(scoring, TaskConfig(name="gsm8k"))
    assert [(t.name, t.weight) for t in reward.terms] == [("math", 2.0)]
    assert reward.environment_weight == 0.5
    assert reward_terms(ScoringConfig(), TaskConfig()).environment_weight == 1.0
    with pytest.raises(ConfigError, match="names no scorer of its own"):
        reward_terms(ScoringConfig(), TaskConfig(name="tests.data.test_tasks:items"))


def test_math_agrees_with_the_outcome_labels_of_gsm8k(data_dir: Path) -> None:
    """OpenAI's graded solutions of four models; every twelfth question here, all of them in benchmarks/grader.py."""
    file = data_dir / "gsm8k" / "example_model_solutions.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no graded solutions at {file}")
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines][::12]
    scorer = build_scorer(Term("math"))
    agree = []
    for row in rows:
        item = Item(id="", prompt=row["question"], answer=row["ground_truth"].rpartition("A:")[2].strip())
        for solution in (v for v in row.values() if isinstance(v, dict)):
            agree.append((scorer.score(Answer(text=solution["solution"]), item) == 1.0) == solution["is_correct"])
    assert len(agree) == 440
    assert sum(agree) / len(agree) >= 0.99


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("e5", ["5"]),
        ("the5e", ["5"]),
        ("1,234.5 and -7e2", ["1234.5", "-7E+2"]),
        (".5, 1e99999999999999999999", ["0.5", "1", "99999999999999999999"]),
        ("12,34", ["12", "34"]),
    ],
)
def test_numbers_in_a_text(text: str, numbers: list[str]) -> None:
    """An exponent needs a mantissa and a size that a decimal can have: a model writes anything."""
    assert [str(n) for n in numbers_in(text)] == numbers


@pytest.mark.long
def test_every_reasoning_gym_set_is_a_task_whose_own_answers_are_right() -> None:
    from reasoning_gym.factory import DATASETS

    scorer = build_scorer(Term("reasoning_gym"))
    unanswered = set()
    for name in sorted({*DATASETS} - {"composite"}):  # that one is made of others, which its config must name
        task = get_task(TaskConfig(name="reasoning_gym", args={"dataset": name, "train_size": 1, "held_out_size": 2}))
        for item in pickle.loads(pickle.dumps(task.held_out())):
            score = scorer.score(Answer(text=f"<answer>{item.answer}</answer>"), item)
            assert isinstance(score, float), f"{name}: {score}"
            if item.answer is None:
                unanswered.add(name)
            else:
                assert score == 1.0, f"{name}: its own answer {item.answer!r} earns {score}"
    assert len(unanswered) <= 5, "sets that know how to judge an answer and not what one is"
