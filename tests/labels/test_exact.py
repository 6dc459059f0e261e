"""The task's own word on steps: of steps that end where a line does, and of no others."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.labels.exact import Lines, labels_of_steps

TEXT = "a = 1\nb = 2\n\n c = 9\nso d"


def cut(text: str, *places: int) -> list[str]:
    return [text[a:b] for a, b in pairwise((0, *places, len(text)))]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (cut(TEXT, 6, 12, 20), [True, True, False, True]),  # a step is a line
        (cut(TEXT, 3, 6, 12, 20), [None, True, True, False, True]),  # the first line is two steps: it is judged where it ends
        (cut(TEXT, 12), [True, False]),  # two lines each: right only where both are
        (cut(TEXT, 9, 20), [None, False, True]),  # a line and a half says nothing of the half
        (cut(TEXT, 12, 13, 20), [True, None, False, True]),  # a step of white space says nothing
        (list(TEXT), [None] * 4 + [True] + [None] * 5 + [True] + [None] * 7 + [False] + [None] * 4 + [True]),  # characters
    ],
)
def test_steps_are_judged_where_lines_end(steps: list[str], expected: list[bool | None]) -> None:
    lines = Lines.of(steps, whole=True)
    assert lines.texts == ("a = 1", "b = 2", "c = 9", "so d")
    found = labels_of_steps(steps, lines, [True, True, False, True])
    if len(steps) == len(TEXT):
        assert [label for label in found if label is not None] == [True, True, False, True]
        assert [i for i, label in enumerate(found) if label is not None] == [4, 10, 18, len(TEXT) - 1]
    else:
        assert found == expected


def test_a_line_that_a_limit_cut_is_not_judged() -> None:
    assert Lines.of(["a\n", "b"], whole=False).texts == ("a",)
    assert Lines.of(["a\n", "b\n"], whole=False).texts == ("a", "b")
    assert labels_of_steps(["a\n", "b"], Lines.of(["a\n", "b"], whole=False), [True]) == [True, None]
    assert Lines.of(["", "\n"], whole=True).texts == ()


def test_an_answer_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        labels_of_steps(["a\n", "b"], Lines.of(["a\n", "b"], whole=True), [True])


@given(st.text("ab \n", max_size=30), st.lists(st.integers(0, 30)))
def test_every_line_is_judged_once_and_never_by_a_part_of_it(text: str, places: list[int]) -> None:
    steps = cut(text, *sorted(p for p in places if p <= len(text)))
    lines = Lines.of(steps, whole=True)
    assert list(lines.texts) == [line.strip() for line in text.split("\n") if line.strip()]
    for wrong in range(len(lines.texts)):
        found = labels_of_steps(steps, lines, [i != wrong for i in range(len(lines.texts))])
        assert found.count(False) <= 1
        if False in found:
            so_far = "".join(steps[: found.index(False) + 1])
            assert so_far.rstrip().endswith(lines.texts[wrong]) or lines.texts[wrong] in so_far
