"""Figures by hand, against scipy, and their invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.prm.hacking import process_metrics
from reasoner_ray.prm.metrics import auc, cross_entropy, first_error, first_error_metrics, step_metrics, value_metrics

scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30)


def test_auc_by_hand() -> None:
    right = np.array([True, True, False, False])
    assert auc(np.array([4, 3, 2, 1]), right) == 1
    assert auc(np.array([1, 2, 3, 4]), right) == 0
    assert auc(np.array([1, 1, 1, 1]), right) == 0.5
    assert auc(np.array([3, 1, 2, 1]), right) == (2 + 0.5) / 4, "of four pairs two are right, one is tied"
    assert math.isnan(auc(np.array([1.0, 2.0]), np.array([True, True])))


@given(scored)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, right = np.array([s for s, _ in rows], dtype=float), np.array([r for _, r in rows])
    ones, zeros = scores[right], scores[~right]
    if not len(ones) or not len(zeros):
        assert math.isnan(auc(scores, right))
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in ones for b in zeros]
    assert auc(scores, right) == pytest.approx(np.mean(pairs))
    assert auc(np.exp(scores), right) == pytest.approx(np.mean(pairs)), "only the order counts"


def test_auc_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 20, 200).astype(float), rng.random(200) < 0.3
    u = stats.mannwhitneyu(scores[right], scores[~right]).statistic
    assert auc(scores, right) == pytest.approx(u / (right.sum() * (~right).sum()))


def test_steps_by_hand() -> None:
    figures = step_metrics(np.array([0.9, 0.6, 0.4, 0.2]), np.array([1.0, 0.0, 1.0, 0.0]), 0.5)
    assert figures["accuracy"] == 0.5 and figures["majority"] == 0.5
    assert figures["auc"] == 0.75
    assert figures["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.4) + math.log(0.8)) / 4)
    assert (figures["steps"], figures["steps_wrong"]) == (4, 2)
    assert step_metrics(np.array([0.9, 0.6]), np.array([1.0, 0.0]), 0.7)["accuracy"] == 1, "the threshold is an argument"
    assert math.isfinite(cross_entropy(np.array([0.0, 1.0]), np.array([1.0, 0.0]))), "a sure mistake costs much, not infinitely much"


def test_first_errors_by_hand() -> None:
    assert first_error([0.9, 0.4, 0.1], 0.5) == 1
    assert first_error([0.9, 0.5], 0.5) == -1
    assert first_error([], 0.5) == -1
    figures = first_error_metrics([1, 2, -1, -1, 0], [1, 1, -1, -1, -1])
    assert figures == {
        "accuracy_on_erroneous": 0.5,
        "accuracy_on_correct": pytest.approx(2 / 3),
        "f1": pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)),
        "erroneous": 2,
        "correct": 3,
    }
    assert first_error_metrics([0, -1], [1, -1])["f1"] == 0, "all right samples and no wrong one: harmonic, not arithmetic"
    assert first_error_metrics([-1], [0])["accuracy_on_erroneous"] == 0
    assert math.isnan(first_error_metrics([-1], [-1])["f1"]), "over no erroneous sample there is no F1"
    with pytest.raises(ValueError):
        first_error_metrics([1], [1, 2])


def test_values_by_hand() -> None:
    figures = value_metrics(np.array([1.0, 0.0, -1.0]), np.array([1.0, 1.0, -1.0]))
    assert figures["loss"] == pytest.approx(1 / 3) and figures["auc"] == 1
    assert value_metrics(np.array([0.3, 0.3]), np.array([1.0, -1.0]))["explained_variance"] == 0
    assert math.isnan(value_metrics(np.array([0.3]), np.array([1.0]))["explained_variance"])


def test_hacking_shows() -> None:
    """The same rewards with scores that follow the truth, and with scores that length buys."""

    def group(score: list[float]) -> dict[str, object]:
        about = {"score": score, "reward": score, "truth": [1.0, 0.0, 1.0, 0.0], "steps": [2, 2, 2, 6], "tokens": [10, 10, 10, 42]}
        return {"process": about}

    honest, hacked = process_metrics([group([0.9, 0.1, 0.9, 0.1])]), process_metrics([group([0.1, 0.2, 0.1, 0.9])])
    assert honest["process/correlation"] == pytest.approx(1) and honest["process/gap"] == pytest.approx(0.8)
    assert hacked["process/correlation"] < -0.5 and hacked["process/gap"] < 0
    assert hacked["process/length_correlation"] > 0.9 > 0 > honest["process/length_correlation"]
    assert hacked["process/steps_correlation"] > 0.9 > 0 > honest["process/steps_correlation"] and honest["process/solution_tokens"] == 18
    assert honest["process/steps"] == 3 and honest["process/tokens_per_step"] == 6
    both = process_metrics([group([0.9, 0.1, 0.9, 0.1]), {"rewards": [1.0]}])
    assert both == honest, "groups without process rewards add nothing"
    assert process_metrics([{}]) == {}
    same = process_metrics([{"process": {"score": [0.5], "reward": [0.5], "truth": [1.0], "steps": [1], "tokens": [3]}}])
    assert "process/correlation" not in same and "process/gap" not in same, "what is undefined is left out"
