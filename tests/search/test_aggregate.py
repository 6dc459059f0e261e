"""From scores to values and answers: by hand, and what must hold whatever the scores are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.errors import ScoringError
from reasoner_ray.search.aggregate import answer_shares, choose_answer, solution_value, vote_weights

HOWS = ["vote", "max", "majority"]
solutions = st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1)), min_size=1, max_size=12)


def test_values_of_a_solution_by_hand() -> None:
    scores = [0.9, 0.5, 0.8]
    assert [solution_value(scores, how) for how in ("last", "min", "mean", "product")] == pytest.approx(  # type: ignore[arg-type]
        [0.8, 0.5, 2.2 / 3, 0.36]
    )
    with pytest.raises(ScoringError, match="without a step"):
        solution_value([], "last")
    with pytest.raises(ScoringError, match=r"at least 0 \(got -0\.5\)"):
        solution_value([0.5, -0.5], "product")


def test_the_three_ways_to_an_answer_by_hand() -> None:
    groups, values = [0, 1, 0, 2, 1], [0.3, 0.9, 0.4, 1.0, 0.2]
    # votes: 0 has .7, 1 has 1.1, 2 has 1.0
    vote = choose_answer(groups, values, "vote")
    assert (vote.index, vote.confidence) == (1, pytest.approx(1.1 / 2.8))
    assert vote.shares == pytest.approx((0.7 / 2.8, 1.1 / 2.8, 1.0 / 2.8))
    assert choose_answer(groups, values, "max").index == 3
    majority = choose_answer(groups, values, "majority")
    assert (majority.index, majority.confidence) == (2, 0.4), "of equal answers the first; its best solution stands for it"


def test_values_below_zero_vote_by_their_place_between_the_extremes() -> None:
    assert vote_weights([-1.0, 0.0, 1.0]) == pytest.approx([0.0, 1 / 2.001, 2 / 2.001])
    assert vote_weights([0.2, 0.4]) == [0.2, 0.4]
    # Summed as they are, two mild votes for answer 0 (-.2 each) would lose to one strong no (-.3) for answer 1.
    assert choose_answer([0, 0, 1], [-0.2, -0.2, -0.3], "vote").index in (0, 1)
    assert answer_shares([0, 0, 1], [-0.5, -0.5, -0.5], "vote") == pytest.approx({0: 2 / 3, 1: 1 / 3}), "all alike: by number"


def test_solutions_without_an_answer_do_not_vote_unless_there_is_no_other() -> None:
    assert choose_answer([0, 0, 1], [0.9, 0.9, 0.1], "vote", [False, False, True]).index == 2
    assert choose_answer([0, 0], [0.1, 0.9], "vote", [False, False]).index == 1
    with pytest.raises(ValueError, match="no solution"):
        choose_answer([], [], "vote")


@pytest.mark.parametrize("how", HOWS)
@given(solutions)
def test_confidences_are_shares_and_the_winner_is_one_of_them(how: str, found: list[tuple[int, float]]) -> None:
    groups, values = [g for g, _ in found], [v for _, v in found]
    choice = choose_answer(groups, values, how)  # type: ignore[arg-type]
    assert sum(choice.shares) == pytest.approx(1) and all(0 <= s <= 1 + 1e-9 for s in choice.shares)
    mine = groups[choice.index]
    assert values[choice.index] == max(v for g, v in found if g == mine)
    if how != "max":
        assert choice.confidence == pytest.approx(max(choice.shares))


@pytest.mark.parametrize("how", HOWS)
@given(solutions, st.integers(0, 5))
def test_names_of_answers_do_not_matter(how: str, found: list[tuple[int, float]], shift: int) -> None:
    groups, values = [g for g, _ in found], [v for _, v in found]
    assert choose_answer([g + shift for g in groups], values, how) == choose_answer(groups, values, how)  # type: ignore[arg-type]
