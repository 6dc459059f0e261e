"""Observations that cannot be, in the belief over a plume's source: each has a defined outcome, which is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from reasoner_ray.agents.agdc import belief as belief_module
from reasoner_ray.agents.agdc.cessation import make_rule
from reasoner_ray.agents.agdc.settings import BeliefConfig, CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.agents.agdc.wrappers import AGDC
from reasoner_ray.envs.source_term.environment import SourceTerm
from reasoner_ray.envs.source_term.plume import concentration
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.errors import ConfigError

ONE = torch.ones(1, dtype=torch.bool)
FINE = torch.tensor([[3.0, 4.0, 0.02, 2.0, math.radians(45), 2.0, 10.0]])
X, READING, WIND = 0, 2, 3


def belief(**environment: Any) -> SourceBelief:
    return SourceBelief(BeliefConfig(particles=80), SourceTermConfig.model_validate(environment), 1, seed=1)


def but(place: int, value: float) -> torch.Tensor:
    """A fine observation but for one number."""
    changed = FINE.clone()
    changed[0, place] = value
    return changed


def faults(found: SourceBelief) -> dict[str, int]:
    return {name: count for name, count in found.faults().items() if count}


def test_a_reading_below_0_is_taken_for_0_and_counted() -> None:
    found, other = belief(), belief()
    for one, reading in ((found, -0.5), (other, 0.0)):
        one.reset(ONE, FINE)
        one.update(ONE, but(READING, reading))
    assert torch.isfinite(found.features()).all()
    assert torch.equal(found.features(), other.features())
    assert torch.equal(found.filter.log_weights, other.filter.log_weights)
    assert (faults(found), faults(other)) == ({"negative": 1}, {})


@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_a_reading_at_a_place_that_is_unknown_says_nothing_and_is_counted(x: float) -> None:
    found = belief()
    found.reset(ONE, FINE)
    before, mean = found.features(), found.summary().mean
    found.update(ONE, but(X, x))
    after = found.features()
    assert torch.isfinite(after).all()
    assert torch.equal(after[:, :2], before[:, :2]), "the agent is taken to be where it was last"
    assert torch.allclose(found.summary().mean, mean, atol=1e-5)
    assert faults(found) == {"lost": 1}
    for _ in range(3):  # the moves after a resampling go through all places
        found.update(ONE, but(READING, 0.4))
    assert found.filter.resampled > 0
    assert torch.isfinite(found.features()).all()
    assert faults(found) == {"lost": 1}


def test_a_first_place_that_is_unknown_is_the_middle() -> None:
    found = belief()
    found.reset(ONE, but(X, math.nan))
    assert found.features()[0, :2].tolist() == [0.0, 0.0]
    assert torch.isfinite(found.features()).all()
    assert faults(found) == {"lost": 1}


@pytest.mark.parametrize("place", [3, 4, 5, 6])
def test_for_an_estimate_that_is_unknown_stands_the_middle_of_its_range(place: int) -> None:
    scene = {"wind": (1.0, 3.0), "direction": (30, 60), "diffusivity": (2.0, 2.0), "lifetime": (8.0, 12.0)}
    found, other = belief(scene=scene), belief(scene=scene)
    found.reset(ONE, but(place, math.nan))
    other.reset(ONE, FINE)  # which holds those middles
    assert torch.equal(found.features(), other.features())
    assert torch.isfinite(found.features()).all()
    assert (faults(found), faults(other)) == ({"unknown": 1}, {})


def test_a_start_on_top_of_the_source_makes_beliefs_sure_of_the_right_place() -> None:
    """A single reading is worth thousands of nats there: a belief that took it in too fast would be a point somewhere."""
    place = torch.tensor([[10.0, 10.0]])
    source = torch.tensor([[10.0, 10.0, 0.0, 5.0, 2.0, math.radians(45), 2.0, 10.0]])
    reading = float(concentration(source, torch.tensor([[10.0, 10.0, 0.0]]))[0])
    assert reading > 1000
    n = 32
    found = SourceBelief(BeliefConfig(particles=300), SourceTermConfig(), n, seed=1)
    observation = torch.cat([place, torch.tensor([[reading, *FINE[0, 3:].tolist()]])], dim=-1).expand(n, 7)
    found.reset(torch.ones(n, dtype=torch.bool), observation)
    assert float(found.filter.effective_size.min()) > 100
    sure = make_rule(CessationConfig(rule="spread", threshold=0.5)).wants(found.summary())
    error = torch.linalg.vector_norm(found.summary().mean[:, :2] - place, dim=-1)
    assert bool(sure.any()) and float(error[sure].max()) < 0.5
    assert faults(found) == {}


def test_a_stage_that_leaves_too_few_particles_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(belief_module, "SMALLEST_SHARE", 0.5)
    found = belief()
    found.reset(ONE, but(READING, 500.0))
    assert faults(found)["collapsed"] > 0


def test_a_belief_made_for_shorter_episodes_says_so() -> None:
    rule = make_rule(CessationConfig(rule="never"))
    env = AGDC(SourceTerm({"max_steps": 9}), belief(max_steps=4), rule, FeedbackConfig())
    env.reset(seed=0)
    for _ in range(4):
        env.step(0)
    with pytest.raises(ConfigError, match=r"max_steps: this belief was made for episodes of 4 steps, and its environment goes on"):
        env.step(0)
