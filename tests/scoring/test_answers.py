"""Answers grouped for votes: by mathematical equality where there is any, never longer than the time-out allows."""

from __future__ import annotations

import time

import pytest

from reasoner_ray.scoring import answers
from reasoner_ray.scoring.answers import final_answer, group_answers


def test_equal_values_share_a_group_in_order_of_first_appearance() -> None:
    given = ["1/2", "2", "0.5", "\\frac{1}{2}", " 2 ", "x+1", "1+x", "7"]
    assert group_answers(given) == [0, 1, 0, 0, 1, 2, 2, 3]
    assert group_answers(list(reversed(given))) == [0, 1, 1, 2, 3, 3, 2, 3]


def test_texts_alone_count_where_answers_are_not_mathematics() -> None:
    assert group_answers(["6 * 4", "4 * 6", "6  * 4"], mathematical=False) == [0, 1, 0]
    assert group_answers(["6 * 4", "4 * 6"]) == [0, 0]
    assert group_answers([]) == []
    assert group_answers(["", "3", ""]) == [0, 1, 0], "no answer is a group of its own"


def test_a_comparison_that_hangs_is_killed_and_counts_as_different(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "9^{9^{9^{9^9}}}"
    monkeypatch.setattr(answers, "COMPARE_SECONDS", 0.5)
    answers._pool.cache_clear()
    began = time.monotonic()
    assert group_answers(["5", slow, f"{slow}+1", slow, "5.0"]) == [0, 1, 2, 1, 0]
    assert time.monotonic() - began < 30
    answers._pool.cache_clear()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("steps\n#### 42", "42"),
        ("The answer is 3.\nThe answer is: 4.", "4"),
        ("no mark\n17", "17"),
        ("The answer is 5. I hope it is correct.", "5"),
        ("The answer is 3.5. It is.", "3.5"),
        ("So the answer is 3.5", "3.5"),
        ("The answer is B. The others are wrong.", "B"),
        ("The answer is Dr. Smith. He said so.", "Dr. Smith"),
        ("The answer is John F. Kennedy.", "John F. Kennedy"),
        ("The answer is J. K. Rowling", "J. K. Rowling"),
        ("The answer is the U.S. Army.", "the U.S. Army"),
        ("The answer is approx. 3.5", "approx. 3.5"),
        ("The answer is 4! It is", "4"),
        ("The answer is 4! + 1", "4! + 1"),
        ("#### 1. and so on", "1. and so on"),
        ("<think>the answer is 3</think>\n<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>\n5\n</answer> I think", "5"),
        ("<answer>\\boxed{6}</answer>", "6"),
        ("", ""),
    ],
)
def test_where_an_answer_is_read(text: str, answer: str) -> None:
    assert final_answer(text) == answer
