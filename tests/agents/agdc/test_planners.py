"""Planners against scores worked out particle by particle, and evaluation with its intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from reasoner_ray.agents.agdc.cessation import make_rule
from reasoner_ray.agents.agdc.evaluate import Arena, Searches, search_metrics
from reasoner_ray.agents.agdc.planners import DCEE, PLANNERS, Entrotaxis, Infotaxis, View
from reasoner_ray.agents.agdc.settings import BeliefConfig, CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.envs.source_term.core import SourceTermBatch
from reasoner_ray.envs.source_term.settings import SourceTermConfig

N, READINGS = 5, 3


def posterior(prior: np.ndarray, likelihood: np.ndarray) -> np.ndarray:
    return prior * likelihood / (prior * likelihood).sum()


def test_scores_by_hand() -> None:
    draw = np.random.default_rng(0)
    prior, likelihoods = draw.dirichlet(np.ones(N)), draw.uniform(0.1, 2.0, size=(READINGS, N))
    particles, place = draw.uniform(0, 10, size=(N, 8)), np.array([2.0, 3.0])
    after = np.stack([posterior(prior, row) for row in likelihoods])
    evidence = (likelihoods * prior).sum(-1)
    divergence = [float((w * np.log(w / prior)).sum()) for w in after]
    cost = []
    for w in after:
        mean = w @ particles[:, :2]
        variance = float(w @ ((particles[:, :2] - mean) ** 2).sum(-1))
        cost.append(float(((place - mean) ** 2).sum()) + variance)
    tensors = [torch.as_tensor(t) for t in (place, particles, after, np.log(likelihoods), np.log(evidence))]
    arguments = (tensors[0][None, None], tensors[1][None], tensors[2][None, None], tensors[3][None, None], tensors[4][None, None])
    assert (-Infotaxis().score(*arguments))[0, 0].tolist() == pytest.approx(divergence)
    assert DCEE().score(*arguments)[0, 0].tolist() == pytest.approx(cost)
    assert (-Entrotaxis().score(*arguments))[0, 0].tolist() == pytest.approx((-np.log(evidence)).tolist())


def view_of(config: SourceTermConfig, n: int, seed: int = 0, particles: int = 200) -> View:
    search = SourceTermBatch(config, n)
    belief = SourceBelief(BeliefConfig(particles=particles), config, n, seed=seed)
    belief.reset(torch.ones(n, dtype=torch.bool), search.reset(seeds=list(range(n))))
    return View(search, belief, belief.features())


def test_a_belief_that_is_a_point_draws_dcee_there() -> None:
    view = view_of(SourceTermConfig(start=(12.0, 12.0)), 4)
    targets = torch.tensor([[20.0, 12.0], [12.0, 20.0], [4.0, 12.0], [12.0, 4.0]])
    view.belief.filter.particles[..., :2] = targets[:, None]
    assert DCEE(seed=1).act(view).tolist() == [0, 1, 2, 3]


def test_infotaxis_measures_where_beliefs_differ() -> None:
    """Two places are possible, both a good way off: a reading to the west tells them apart, one to the east does not."""
    view = view_of(SourceTermConfig(start=(12.0, 12.0), speed=4.0), 1)
    particles = view.belief.filter.particles
    particles[0] = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.5, math.pi / 4, 2.0, 10.0])
    particles[0, ::2, :2], particles[0, 1::2, :2] = torch.tensor([8.5, 12.0]), torch.tensor([1.0, 24.0])
    assert Infotaxis(readings=100, seed=1).act(view).tolist() == [2]


def test_the_oracle_takes_the_shortest_way() -> None:
    for moves in ("discrete", "heading"):
        config = SourceTermConfig.model_validate({"moves": moves, "max_steps": 60, "prior": {"centred": True}})
        arena = Arena(config, BeliefConfig(particles=20, move="none"), make_rule(CessationConfig(rule="never")), FeedbackConfig(), 1.0)
        found = arena.run(PLANNERS.get("oracle")(seed=0), 6)
        assert float(found.distance.max()) <= 1.0, "it stands at the source in the end"
        assert not found.stopped.any()
        assert found.steps.tolist() == [60] * 6


@pytest.mark.parametrize("name", ["infotaxis", "entrotaxis", "dcee", "random"])
def test_planners_choose_moves_that_the_environment_takes(name: str) -> None:
    for moves in ("discrete", "heading"):
        view = view_of(SourceTermConfig.model_validate({"moves": moves}), 3, particles=30)
        actions = PLANNERS.get(name)(seed=2).act(view)
        assert actions.shape == (3,)
        again = PLANNERS.get(name)(seed=2).act(view)
        assert torch.equal(actions, again), "a seed repeats it"
        view.search.step(actions)


def test_parts_of_the_episodes_give_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(SourceTermConfig(start=(12.0, 12.0)), 4)
    view.belief.filter.particles[..., :2] = torch.tensor([[20.0, 12.0], [12.0, 20.0], [4.0, 12.0], [12.0, 4.0]])[:, None]
    monkeypatch.setattr("reasoner_ray.agents.agdc.planners.ELEMENTS", 1)
    assert DCEE(seed=1).act(view).tolist() == [0, 1, 2, 3]


def test_episodes_are_fixed_by_their_seeds_and_stops_are_counted() -> None:
    config = SourceTermConfig(max_steps=40)
    arena = Arena(config, BeliefConfig(particles=100), make_rule(CessationConfig(threshold=2.0)), FeedbackConfig(), 1.0, at_once=5)
    once, twice = (arena.run(PLANNERS.get("dcee")(seed=0), 8, first_seed=7) for _ in range(2))
    assert torch.equal(once.error, twice.error)
    assert torch.equal(once.steps, twice.steps)
    assert bool(once.stopped.any())
    assert set(once.steps[~once.stopped].tolist()) <= {40}
    assert once.evidence.shape == (8, 5)
    assert torch.isfinite(once.evidence).all()


def test_figures_by_hand() -> None:
    searches = Searches(
        stopped=torch.tensor([True, True, True, False]),
        error=torch.tensor([0.5, 1.0, 3.0, 0.2]),
        steps=torch.tensor([10, 20, 30, 40]),
        travelled=torch.tensor([9.0, 18.0, 27.0, 36.0]),
        distance=torch.zeros(4),
        evidence=torch.zeros(4, 2),
        evidence_error=torch.zeros(4),
    )
    figures = search_metrics(searches, tolerance=1.0)
    expected = {"stop_rate": 3 / 4, "correct_stops": 2 / 3, "success": 1 / 2, "wrong_stops": 1 / 4, "steps": 25.0, "distance": 22.5}
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value)
    wilson = stats.binomtest(2, 4).proportion_ci(0.95, method="wilson")
    assert (figures["success_low"], figures["success_high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    half = 1.959964 * np.std([10, 20, 30, 40], ddof=1) / 2
    assert figures["steps_high"] - figures["steps"] == pytest.approx(half)


def test_without_a_stop_nothing_is_said_of_correct_stops() -> None:
    none = Searches(
        *(torch.zeros(2, dtype=torch.bool), torch.zeros(2), torch.ones(2), torch.ones(2), torch.ones(2)), torch.zeros(2, 1), torch.ones(2)
    )
    assert "correct_stops" not in search_metrics(none, 1.0)
    assert search_metrics(none, 1.0)["success"] == 0
