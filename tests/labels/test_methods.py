"""Math-Shepherd and OmegaPRM on planted errors: priorities by hand, no rollout twice, few estimates, true labels."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.labels import math_shepherd, omega_prm
from reasoner_ray.labels.estimates import Estimator, Rollout, State
from reasoner_ray.labels.omega_prm import Candidate, Pool, exploration, find_first_error, quality
from reasoner_ray.labels.records import LabelledSolution, QuestionLabels
from reasoner_ray.labels.settings import OmegaConfig
from reasoner_ray.search.policy import Continuation
from reasoner_ray.steps import Partial
from tests.labels.planted import PROMPT, RIGHT, WRONG, PlantedPolicy, grade, root, true_first_error


def estimator(policy: PlantedPolicy, completions: int = 16) -> Estimator:
    return Estimator(policy, grade, completions)


def omega(policy: PlantedPolicy, completions: int = 16, **values: object) -> QuestionLabels:
    return asyncio.run(omega_prm.label_question(estimator(policy, completions), root(), OmegaConfig(**values)))  # type: ignore[arg-type]


def shepherd(policy: PlantedPolicy, completions: int = 16, solutions: int = 8) -> QuestionLabels:
    return asyncio.run(math_shepherd.label_question(estimator(policy, completions), root(), solutions))


def rollout(steps: Sequence[int], *, start: int = 0, right: bool, length: int = 0, cut: bool = False) -> Rollout:
    """A solution whose steps are one token each; ``start`` of them were the state's."""
    tokens = (*PROMPT, *steps)
    ends = tuple(range(len(PROMPT) + 1, len(tokens) + 1))
    return Rollout(Partial(tokens, ends, len(PROMPT)), length or len(steps) - start, cut, right)


def test_quality_and_exploration_by_hand() -> None:
    config = OmegaConfig(alpha=0.5, beta=0.9, length_scale=500)
    assert quality(0.75, 500, config) == pytest.approx(0.5**0.25 * 0.9)  # 0.7568
    assert quality(0.25, 1000, config) == pytest.approx(0.5**0.75 * 0.81)  # 0.4816
    assert exploration(0, 0, 0.125) == 0
    assert exploration(1, 4, 0.125) == pytest.approx(0.125 * 2 / 2)
    assert exploration(3, 9, 0.125) == pytest.approx(0.125 * 3 / 4)


def test_priorities_of_a_small_tree_by_hand() -> None:
    """Two states: the question (MC 1/2, wrong rollouts of 500 and 1000 tokens) and one below it (MC 3/4, a wrong one of 250)."""
    config = OmegaConfig(alpha=0.5, beta=0.9, length_scale=500, c_puct=0.125)
    long, short = rollout([7, 7, 7], right=False, length=1000), rollout([8, 8], right=False, length=500)
    first = State(root(), (long, short, rollout([9], right=True), rollout([9, 9], right=True)))
    below = rollout([8, 1, 2], start=1, right=False, length=250)
    goods = tuple(rollout([8, 5, i], start=1, right=True) for i in range(3))
    second = State(Partial((*PROMPT, 8), (4,), 3), (below, *goods))
    pool = Pool(config)
    pool.add(first)
    pool.add(second)
    by_rollout = {id(c.rollout): pool.priority(c) for c in pool.candidates}
    assert by_rollout[id(long)] == pytest.approx(math.sqrt(0.5) * 0.81)  # 0.5728
    assert by_rollout[id(short)] == pytest.approx(math.sqrt(0.5) * 0.9)  # 0.6364
    assert by_rollout[id(below)] == pytest.approx(0.5**0.25 * math.sqrt(0.9))  # 0.7977
    assert pool.choose().rollout is below
    # N(second) = 1, all visits 1: the question's rollouts have U = 0.125, that of the second state 0.0625.
    assert pool.priority(Candidate(first, short)) == pytest.approx(math.sqrt(0.5) * 0.9 + 0.125)
    assert pool.choose().rollout is short
    assert pool.priority(Candidate(first, long)) == pytest.approx(math.sqrt(0.5) * 0.81 + 0.125 * math.sqrt(2) / 2), "U is never stale"
    assert pool.choose().rollout is long
    assert pool.candidates == []


def test_only_wrong_whole_rollouts_of_mixed_states_come_into_the_pool_and_only_once() -> None:
    pool = Pool(OmegaConfig())
    wrong, cut = rollout([1], right=False), rollout([2], right=False, cut=True)
    for state in (State(root(), (wrong, wrong)), State(root(), (rollout([3], right=True),)), State(root(), ())):
        pool.add(state)
    assert pool.candidates == []
    mixed = State(root(), (wrong, wrong, cut, rollout([3], right=True)))
    pool.add(mixed)
    pool.add(mixed)
    assert [c.rollout for c in pool.candidates] == [wrong]
    pool.choose()
    pool.add(mixed)
    assert pool.candidates == [], "a searched rollout never comes back"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.05, 0.4))
def test_no_rollout_is_searched_twice_and_no_state_estimated_twice(seed: int, steps: int, error: float) -> None:
    policy = PlantedPolicy(steps=steps, error=error, seed=seed)
    found = omega(policy, completions=8, keep_right=0)
    searched = [s.partial.tokens for s in found.solutions]
    assert len(searched) == len(set(searched)) <= 20
    assert max(Counter(tokens for tokens, _ in policy.calls).values()) == 1
    assert found.estimates == len(policy.calls) == len(found.states)
    assert sum(state["visits"] for state in found.states) == len(searched)


@pytest.mark.parametrize(("steps", "error_at"), [(1, 0), (2, 1), (7, 3), (16, 0), (16, 15), (33, 20), (64, 40)])
def test_a_planted_error_is_found_in_log_steps_estimates(steps: int, error_at: int) -> None:
    """From any prefix before the error half of the completions are right, so every estimate tells the truth."""

    class Planted(PlantedPolicy):
        async def complete(self, partial: Partial, n: int) -> Sequence[Continuation]:
            self.error = 0.0
            good = await super().complete(partial, n // 2)
            self.error = 1.0
            return [*good, *await super().complete(partial, n - n // 2)]

    policy = Planted(steps=steps, error=0.0)
    kinds = [WRONG if i >= error_at else RIGHT for i in range(steps)]
    whole = rollout(kinds, right=False)
    searcher = estimator(policy, completions=4)
    found = asyncio.run(find_first_error(searcher, Candidate(State(root(), (whole,)), whole), Pool(OmegaConfig())))
    assert found == error_at == true_first_error(whole.partial)
    assert searcher.estimates <= math.ceil(math.log2(steps))


def test_a_prefix_of_a_right_rollout_holds_no_error_whatever_its_completions_say() -> None:
    class RightAtFirst(PlantedPolicy):
        async def complete(self, partial: Partial, n: int) -> Sequence[Continuation]:
            self.error = 1.0 if partial.ends else 0.0
            return await super().complete(partial, n)

    searcher = estimator(RightAtFirst(steps=4, error=0.0), completions=4)

    async def story() -> tuple[int | None, float | None]:
        first = await searcher.estimate(root())
        whole = first.rollouts[0].partial.until(2).then((WRONG, 7)).then((WRONG, 8))
        error = await find_first_error(searcher, Candidate(first, Rollout(whole, 16, False, False)), Pool(OmegaConfig()))
        return error, searcher.found(whole.until(2))

    error, completions = asyncio.run(story())
    assert error == 2 and completions == 0.0


def test_labels_of_both_methods_are_true_where_estimates_are_good() -> None:
    policy = PlantedPolicy(steps=6, error=0.15, seed=3)
    for found in (omega(policy, completions=64), shepherd(policy, completions=64, solutions=20)):
        assert found.status == "labelled" and len(found.solutions) > 4
        for solution in found.solutions:
            truth = true_first_error(solution.partial)
            assert solution.first_error == truth
            assert solution.right is (truth is None)
            assert list(solution.hard) == [truth is None or i < truth for i in range(6)]


def test_soft_labels_are_shares_of_right_completions() -> None:
    found = shepherd(PlantedPolicy(steps=4, error=0.2, seed=1), completions=400, solutions=6)
    for solution in found.solutions:
        truth = true_first_error(solution.partial)
        for done, label in enumerate(solution.soft, start=1):
            expected = 0.0 if truth is not None and truth < done else 0.8 ** (4 - done)
            assert label == pytest.approx(expected, abs=0.1)
    assert found.estimates == 6 * 3, "every step but the last, whose label is the grade"


def test_solutions_of_one_step_and_questions_without_contrast() -> None:
    one = omega(PlantedPolicy(steps=1, error=0.5, seed=2))
    assert one.status == "labelled" and one.estimates == 1
    assert {s.hard for s in one.solutions} == {(True,), (False,)}
    assert omega(PlantedPolicy(steps=3, error=0.0)).status == "all right"
    hopeless = omega(PlantedPolicy(steps=3, error=1.0))
    assert (hopeless.status, hopeless.solutions, hopeless.estimates) == ("all wrong", (), 1)


def test_what_a_limit_cuts_is_labelled_up_to_its_last_closed_step_and_counted() -> None:
    cut = shepherd(PlantedPolicy(steps=8, error=0.0, cut_after=12), solutions=3)
    assert cut.cut == 3
    for solution in cut.solutions:
        assert len(solution.partial.ends) == 2 and solution.right is None
    assert shepherd(PlantedPolicy(steps=8, error=0.0, cut_after=1), solutions=3).status == "nothing closed"
    assert omega(PlantedPolicy(steps=8, error=0.0, cut_after=12)).status == "all wrong"


def test_a_grader_that_fails_gives_no_label() -> None:
    async def broken(partial: Partial, cut: bool) -> None:
        return None

    policy = PlantedPolicy(steps=3, error=0.3)
    found = asyncio.run(math_shepherd.label_question(Estimator(policy, broken, 4), root(), 2))
    assert found.grader_failures == found.graded == 2 + 2 * 2 * 4
    assert all(solution.hard == solution.soft == (None, None, None) for solution in found.solutions)
    assert asyncio.run(omega_prm.label_question(Estimator(policy, broken, 4), root(), OmegaConfig())).status == "not graded"


def test_a_budget_of_estimates_is_kept() -> None:
    found = omega(PlantedPolicy(steps=16, error=0.1, seed=5), completions=8, estimates=5, searches=50)
    assert 5 <= found.estimates <= 5 + 4, "a search under way is finished"


def test_a_seed_whose_curve_misses_an_accuracy_is_counted() -> None:
    """The record of benchmarks/label_cost says how many ratios it lacks."""
    from benchmarks.label_cost import Point, compared, tokens_at

    curve = [Point(100, 0.5, 1), Point(400, 0.7, 1)]
    assert tokens_at(0.6, curve) == pytest.approx(200) and tokens_at(0.9, curve) is None
    figures: dict[str, object] = {}
    for accuracy in (0.6, 0.9, 0.5):
        compared(figures, "x", tokens_at(accuracy, curve), 50)
    assert figures == {"x": [pytest.approx(4), pytest.approx(2)], "x: seeds whose accuracy Math-Shepherd's curve does not have": 1}


def test_a_label_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 soft and 2 hard labels for 2 steps"):
        LabelledSolution(partial=rollout([1, 1], right=True).partial, soft=(1.0,), hard=(True, True), right=True)


def test_omega_prm_names_first_errors_at_a_third_of_the_cost_or_less() -> None:
    """Sixteen steps, three solutions of ten right; everything sampled counts."""
    cost, accuracy = {}, {}
    for method in (shepherd, omega):
        policy = PlantedPolicy(steps=16, error=1 - 0.3 ** (1 / 16), seed=7)
        wrong = [s for _ in range(12) for s in method(policy, completions=8).solutions if true_first_error(s.partial) is not None]
        cost[method] = policy.cost.generated / len(wrong)
        accuracy[method] = sum(s.first_error == true_first_error(s.partial) for s in wrong) / len(wrong)
    assert accuracy[omega] >= accuracy[shepherd] > 0.7
    assert cost[omega] * 3 < cost[shepherd]
