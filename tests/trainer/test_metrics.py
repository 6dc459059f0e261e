"""The figures of a step and of an evaluation, from the groups' summaries."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reasoner_ray.trainer.metrics import evaluation_metrics, step_metrics
from reasoner_ray.trainer.parts import GroupResult
from tests.trainer.fakes import summary


def group(n: int = 2, failed: bool = False, **more: Any) -> GroupResult:
    return GroupResult(trajectories=None, summary={**summary(0, n, failed), **more})


def test_the_terms_of_a_reward_are_shown_beside_their_sum() -> None:
    right, formed = {"math": 1.0, "format": 1.0}, {"math": 0.0, "format": 1.0}
    metrics = step_metrics([group(parts=right), group(parts=formed)], trained_at=0, learned={}, phases={})
    assert (metrics["reward/math"], metrics["reward/format"], metrics["reward/mean"]) == (0.5, 1.0, 0.5)
    plain = step_metrics([group()], trained_at=0, learned={}, phases={})
    assert {name for name in metrics if name not in plain} == {"reward/math", "reward/format"}


def test_an_evaluation_shows_its_terms_without_what_could_not_be_scored() -> None:
    right, formed = {"math": 1.0, "format": 1.0}, {"math": 0.0, "format": 1.0}
    metrics = evaluation_metrics([group(1, parts=right), group(1, parts=formed), group(1, failed=True, parts={"math": 1.0, "format": 1.0})])
    assert (metrics["eval/math"], metrics["eval/format"], metrics["eval/failed"]) == (0.5, 1.0, 1.0)
    assert metrics["eval/accuracy"] == pytest.approx(0.0), "the mean of the rewards as they were given"


def test_one_answer_that_could_not_be_judged_does_not_hide_the_others_of_its_prompt() -> None:
    rewards, statuses = [1.0, 1.0, 0.0, math.nan], ["finished", "finished", "truncated", "failed"]
    metrics = evaluation_metrics([group(4, failed=True, rewards=rewards, statuses=statuses, parts={"math": 2 / 3})])
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert (metrics["eval/answers"], metrics["eval/failed"], metrics["eval/math"]) == (3.0, 1.0, pytest.approx(2 / 3))
