"""Deduction: questions whose proof is their only way out, and a checker that takes the published proofs."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.config import TaskConfig
from reasoner_ray.data.deduction import DeductionTask, check_proof, draw_question, read_statement
from reasoner_ray.data.tasks import Item, get_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.scoring.base import Answer, Term, build_scorer

CONTEXT = ["Every zorb is a plim.", "Plims are not wooden.", "Each drell is wooden.", "Sally is a zorb."]
PROOF = [
    "Sally is a zorb.",
    "Every zorb is a plim.",
    "Sally is a plim.",
    "Plims are not wooden.",
    "Sally is not wooden.",
    "The answer is false.",
]


def test_labels_of_a_proof() -> None:
    assert check_proof(PROOF, CONTEXT, answer=False) == [True] * 6
    assert check_proof(PROOF, CONTEXT, answer=True) == [True] * 5 + [False]
    wrong = ["Sally is wooden.", "Every plim is a zorb.", "Max is a plim.", "Sally is a drell.", "hm"]
    assert check_proof(wrong, CONTEXT, answer=False) == [False] * 5
    assert check_proof(["Sally is not wooden."], CONTEXT, answer=False) == [False], "two rules at once"
    assert check_proof(["Sally is a plim.", "Sally is not wooden."], CONTEXT, answer=False) == [True, True], "rules need not be repeated"
    assert check_proof(["Sally is a drell.", "Sally is wooden."], CONTEXT, answer=False) == [False, False], (
        "nothing follows from a wrong line"
    )


def test_the_three_wordings_of_a_rule_are_one_statement() -> None:
    assert read_statement("Each zorb is a plim.") == read_statement("Every zorb is a plim.") == read_statement("Zorbs are plims.")
    assert read_statement("Zorbs are not plims.") != read_statement("Zorbs are plims.")
    assert read_statement("Sally is a zorb.") != read_statement("Each sally is a zorb.")
    assert read_statement("Butterflies are lepidopterans.") == read_statement("Each butterfly is a lepidopteran.")


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 8), st.integers(1, 6))
def test_every_question_has_a_proof_and_no_shorter_way(seed: int, hops: int, distractors: int) -> None:
    question, context, answer, proof = draw_question(random.Random(seed), hops, distractors)
    assert all(check_proof(proof, context, answer == "true"))
    assert len(proof) == 2 * (hops + 1) + 2
    assert all(sentence in question for sentence in context)
    asked = read_statement(f"{question.partition('statement ')[2].split(chr(34))[1]}.")
    proved = read_statement(proof[-2])
    assert (asked == proved) is (answer == "true")
    without = [s for s in context if s != proof[-3]]
    assert not all(check_proof(proof, without, answer == "true")), "the deciding rule is needed"


def test_the_splits_share_nothing_and_answers_are_balanced() -> None:
    task = get_task(TaskConfig(name="deduction", args={"train_size": 400, "held_out_size": 100}), seed=2)
    train, held_out = task.train(), task.held_out()
    assert (len(train), len(held_out)) == (400, 100)
    assert not {str(i.prompt) for i in train} & {str(i.prompt) for i in held_out}
    assert [i.prompt for i in DeductionTask(seed=7, held_out_size=100).held_out()] == [i.prompt for i in held_out]
    assert 150 < sum(i.answer == "true" for i in train) < 250
    scorer, strict = build_scorer(Term("deduction")), build_scorer(Term("deduction", args={"proof": True}))
    for item in train:
        assert isinstance(task, DeductionTask) and all(task.check_steps(item, item.info["solution"].splitlines()))
        assert scorer.score(Answer(text=item.info["solution"]), item) == strict.score(Answer(text=item.info["solution"]), item) == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("So it is.\nThe answer is true.", 1.0),
        ("The answer is: **True**", 1.0),
        ("the answer is false. No: the answer is true", 1.0),
        ("TRUE", 1.0),
        ("The answer is false.", 0.0),
        ("true or false?", 0.0),
        ("true\nfalse", 0.0),
        ("It is untrue", 0.0),
        ("", 0.0),
    ],
)
def test_the_scorer_reads_the_last_verdict(text: str, right: float) -> None:
    item = Item(id="i", prompt="", answer="true")
    assert build_scorer(Term("deduction")).score(Answer(text=text), item) == right


CHAIN = ["Sally is a zorb.", "Every zorb is a plim.", "Sally is a plim.", "Plims are not wooden.", "Sally is not wooden."]
LAST = "The answer is false."


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        ([*CHAIN, LAST], 1.0),
        ([LAST], 0.0),  # a guess
        ([*CHAIN[:-1], LAST], 0.0),  # what was asked is not said
        ([*CHAIN[:2], CHAIN[-1], LAST], 0.0),  # a leap
        ([*CHAIN, "The answer is true."], 0.0),
        (CHAIN, 0.0),  # no answer
    ],
)
def test_a_guess_is_no_proof(lines: list[str], right: float) -> None:
    info = {"context": [CHAIN[0], CHAIN[1], CHAIN[3], "Each drell is wooden."], "solution": "\n".join([*CHAIN, LAST])}
    item, strict = Item(id="i", prompt="", answer="false", info=info), build_scorer(Term("deduction", args={"proof": True}))
    assert strict.score(Answer(text="\n".join(lines)), item) == right
    assert build_scorer(Term("deduction")).score(Answer(text="\n".join(lines)), item) == float(lines[-1] == LAST)


def test_what_votes_is_what_the_scorer_reads() -> None:
    read = DeductionTask().read_answer
    assert {read(text) for text in ("True", "true.", "**true**", "The answer is true. I hope it is correct.")} == {"true"}
    assert read("The answer is: **False**") == "false"
    assert read("true or false?") == read("") == ""


def test_a_reference_of_another_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        build_scorer(Term("deduction")).score(Answer(text="true"), Item(id="i", prompt="", answer="24"))


def test_a_line_that_runs_on_is_read_at_once() -> None:
    began = time.monotonic()
    assert check_proof(["a is " * 8000], ["Sally is a zorb."], True) == [False]
    assert time.monotonic() - began < 5, "a retrying pattern took 38 s"


def test_the_published_proofs_pass(data_dir: Path) -> None:
    proofs = 0
    for line in (data_dir / "puzzles/prontoqa/test.jsonl").read_text().splitlines():
        record = json.loads(line)
        context = re.split(r"(?<=\.) ", record["question"].partition(" Is the statement ")[0])
        for answer in record["answer"]:
            lines = answer["text"].splitlines()
            assert all(check_proof(lines, context, lines[-1] == "The answer is true."))
            proofs += 1
    assert proofs == 500


@pytest.mark.parametrize(("args", "key"), [({"hops": [0, 2]}, "hops"), ({"hops": [3]}, "hops"), ({"distractors": 0}, "distractors")])
def test_bad_arguments_are_named(args: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.args\.{key}: must be"):
        get_task(TaskConfig(name="deduction", args=args))
