"""What votes is what is graded, for every registered task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from reasoner_ray.config import ScorerSpec, TaskConfig
from reasoner_ray.data.tasks import TASKS, Item, Task, get_task
from reasoner_ray.scoring.answers import final_value
from reasoner_ray.scoring.base import Answer, Term, build_scorer
from reasoner_ray.search.answers import answer_grouper, answer_reader, judge_of

SUM = {"dataset": "chain_sum", "config": {}, "entry": {"answer": "5", "metadata": {}}}
HAND = {"numbers": [1, 1, 4, 6], "target": 24}
GAMES = (
    "The answer is 6 * 4 * 1 * 1. I hope it is correct.",
    "\\boxed{6 \\times 4 \\times 1 \\times 1}",
    "6 * 4 * 1 * 1",
    "$6 * 4 * 1 * 1$",
)
SUMS = (
    "The answer is 5. I hope it is correct.",
    "so \\boxed{5.0}",
    "#### 5",
    "\\boxed{\\frac{10}{2}}",
    "So she has 5 apples left.",
    "9 - 2 = 7, so 5 in total",
    "She earns $5 a day",
    "Of 12 he ate 7.\nThat makes 5.0 dollars.",
    "The answer is 5 apples.",
    "Hence the total is 2 + 3",
    "So the value is \\(x = \\frac{10}{2}\\).",
    "Therefore $4 + 1$ dollars are left",
    "So he pays $20 - $15 = $5",
    "He paid $12 and $7, so $5 are left",
    "Out of 12, 5 are left",
    "On July 12, 2020 there were 5",
    "the area is $12$, so 5 boxes",
)
WRONG_SUMS = ("The answer is 6. Not 5?", "\\boxed{}", "#### 7", "Of 5 he ate 2, so 3 are left")


@dataclass(frozen=True)
class Case:
    """A task, texts that give one answer, which is right, others that are wrong, and how an answer alone is written."""

    args: dict[str, Any]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    answer: Any = "5"
    info: dict[str, Any] | None = None
    alone: Callable[[str], str] = str


CASES = {
    "arithmetic": Case({}, (" 5\n", "5"), ("The answer is 5", "5.", "6", "")),
    "jsonl": Case({"path": "x"}, ("5", " 5 "), ("4\n5", "\\boxed{5}", "")),
    "parquet": Case({"path": "x"}, ("5", " 5 "), ("4\n5", "\\boxed{5}", "")),
    "gsm8k": Case(
        {"path": "x"},
        SUMS,
        WRONG_SUMS,
        alone="\\boxed{{{}}}".format,
    ),
    "math": Case(
        {"path": "x"},
        SUMS,
        WRONG_SUMS,
        alone="\\boxed{{{}}}".format,
    ),
    "countdown": Case({}, GAMES, ("6 * 4", "The answer is 24.", ""), 24, HAND),
    "game24": Case({}, GAMES, ("6 * 4", "The answer is 24.", ""), 24, HAND),
    "deduction": Case(
        {}, ("True", "**true**", "The answer is true. I hope so.", "true."), ("The answer is False.", "true or false?", ""), "true"
    ),
    "reasoning_gym": Case(
        {"dataset": "chain_sum"},
        ("2 + 3 = 5\n<answer>5</answer>", "<answer> 5\n</answer>", "<answer>4</answer><answer>5</answer> I think"),
        ("<answer>4</answer>", "The answer is 5", "<answer></answer>", ""),
        info=SUM,
        alone="<answer>{}</answer>".format,
    ),
}


def test_every_registered_task_is_here() -> None:
    built_in = {name for name in TASKS.names() if TASKS.get(name).__module__.startswith("reasoner_ray.")}
    assert built_in - {"environment"} == {*CASES}, "an environment's episode has no answer"


@pytest.mark.parametrize("name", CASES)
def test_what_votes_is_what_is_graded(name: str) -> None:
    case, task = CASES[name], get_task(TaskConfig(name=name, args=CASES[name].args))
    item = Item(id="i", prompt="", answer=case.answer, info=case.info or {})
    scorer, read = build_scorer(Term(task.default_scorer)), answer_reader("auto", task)

    def grade(text: str) -> Any:
        return scorer.score(Answer(text=text), item)

    for texts, value in ((case.right, 1.0), (case.wrong, None)):
        for text in texts:
            found = grade(text)
            assert found == grade(case.alone(read(text))), f"{text!r} is graded by another answer than {read(text)!r}"
            assert found == value if value else found < 1, text
    right, wrong = ([read(text) for text in texts] for texts in (case.right, case.wrong))
    groups = answer_grouper("auto", task)([*right, *wrong])
    assert set(groups[: len(right)]) == {0}, f"{right} are one answer"
    assert 0 not in groups[len(right) :], wrong


class Bare(Task):
    """A task that leaves its answers to a scorer."""

    default_scorer = "exact_match"

    def train(self) -> list[Item]:
        return []

    def held_out(self) -> list[Item]:
        return []


def test_values_in_words() -> None:
    """What is no number stays as it is, and letters that stand together are no words."""
    found = {
        "The answer is (B) because it is": "(B) because it is",
        "The answer is $2xy$": "$2xy$",
        "so it is $2xy$ in all": "2xy",
        "She has 12,345 dollars (USD)": "12,345",
        "about 50% of them": "50%",
        "no number here": "no number here",
        "So x is -3 then": "-3",
        "2 days (16 hours)": "16",
    }
    assert {text: final_value(text) for text in found} == found


def test_the_jobs_own_scorer_decides() -> None:
    task = Bare()
    assert answer_reader("auto", task)("so\nThe answer is 5.") == "so\nThe answer is 5."
    scorers = [ScorerSpec(name="format", args={"style": "boxed"}), ScorerSpec(name="math")]
    assert judge_of(task, scorers) == ("math", {})
    assert answer_reader("auto", task, scorers) is final_value
    assert answer_grouper("auto", task, scorers)(["1/2", "0.5"]) == [0, 0]
    assert answer_grouper("auto", task)(["1/2", "0.5"]) == [0, 1]
    assert judge_of(task, [ScorerSpec(name="format"), ScorerSpec(name="task")])[0] == "exact_match"
    gym = get_task(TaskConfig(name="reasoning_gym", args={"dataset": "chain_sum"}))
    last_line = [ScorerSpec(name="task", args={"extract": "last_line"})]
    assert answer_reader("auto", gym, last_line)("<answer>4</answer>\n5 ") == "5"


def test_numbers_and_texts_vote_as_their_scorers_read_them() -> None:
    task = get_task(TaskConfig(name="arithmetic"))
    numeric = answer_reader("auto", task, [ScorerSpec(name="numeric")])
    assert numeric("The answer is 5. That leaves 7") == "7", "the last number is graded"
    assert answer_reader("auto", task, [ScorerSpec(name="numeric", args={"which": "first"})])("5, then 7") == "5"
    exact = answer_reader("auto", task, [ScorerSpec(name="exact_match", args={"stop": [";"], "ignore_case": True})])
    assert exact(" Yes;") == exact("yes") == "yes"
