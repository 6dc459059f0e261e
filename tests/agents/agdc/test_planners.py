"""Planners against scores worked out particle by particle, and evaluation with its intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from reasoner_ray.agents.agdc.cessation import make_rule
from reasoner_ray.agents.agdc.evaluate import Arena, Searches, search_metrics
from reasoner_ray.agents.agdc.launch import make_arena
from reasoner_ray.agents.agdc.planners import BINS, DCEE, PLANNERS, Entrotaxis, Infotaxis, Oracle, bin_shares
from reasoner_ray.agents.agdc.problem import View
from reasoner_ray.agents.agdc.settings import AgdcConfig, BeliefConfig, CessationConfig, FeedbackConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.agents.agdc.source_problem import SourceTermProblem
from reasoner_ray.envs.source_term.core import MOVES, SourceTermBatch
from reasoner_ray.envs.source_term.plume import read_sensor
from reasoner_ray.envs.source_term.settings import SensorConfig, SourceTermConfig

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


def test_shares_of_bins_are_those_of_the_sensors_readings() -> None:
    sensor, stream, n = SensorConfig(), torch.Generator().manual_seed(0), 200_000
    means = torch.tensor([2e-4, 3e-3, 0.7])
    shares = bin_shares(means, sensor)  # [B, 3]
    assert shares.shape == (BINS + 1, 3)
    assert shares.sum(dim=0).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    readings = read_sensor(means, torch.randn(n, 3, generator=stream), torch.rand(n, 3, generator=stream), sensor)
    which = torch.where(readings > 0, (readings / sensor.threshold).clamp_min(1).log2().floor() + 1, 0)
    for column in range(3):
        counted = torch.bincount(which[:, column].long(), minlength=BINS + 1) / n
        assert (counted - shares[:, column]).abs().max() < 0.005


def test_entrotaxis_does_not_depend_on_the_unit_of_concentration() -> None:
    scores, unit = [], 1000.0
    for factor in (1.0, unit):
        sensor = {"noise": 0.5, "background": 1e-4 * factor, "threshold": 5e-4 * factor}
        view = view_of(SourceTermConfig.model_validate({"sensor": sensor, "start": (12.0, 12.0)}), 3)
        drawn = view_of(SourceTermConfig(start=(12.0, 12.0)), 3).belief.filter
        view.belief.filter.particles[:], view.belief.filter.log_weights[:] = drawn.particles, drawn.log_weights
        view.belief.filter.particles[..., 3] *= factor  # the strength
        places = view.search.position[:, None] + MOVES
        scores.append(Entrotaxis()._some(places, view.belief, slice(0, 3)))
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
    assert scores[0].std(dim=-1).min() > 1e-3, "the moves differ"


def test_entrotaxis_goes_where_readings_are_uncertain() -> None:
    """Half the belief reads 0 to the east, half something; to the west all read 0."""
    view = view_of(SourceTermConfig(start=(12.0, 12.0), speed=4.0), 1)
    particles = view.belief.filter.particles
    particles[0] = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.5, math.pi / 4, 2.0, 10.0])
    particles[0, ::2, :2], particles[0, 1::2, :2] = torch.tensor([18.0, 12.0]), torch.tensor([24.9, 24.9])
    assert Entrotaxis().act(view).tolist() == [0]


def test_the_oracle_takes_the_shortest_way() -> None:
    for moves in ("discrete", "heading"):
        config = SourceTermConfig.model_validate({"moves": moves, "max_steps": 60, "prior": {"centred": True}})
        problem = SourceTermProblem(AgdcConfig(environment=config, belief=BeliefConfig(particles=20, move="none")))
        arena = Arena(problem, make_rule(CessationConfig(rule="never")), FeedbackConfig(), 1.0)
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
    config = SourceTermConfig(max_steps=30)
    problem = SourceTermProblem(AgdcConfig(environment=config, belief=BeliefConfig(particles=100)))
    arena = Arena(problem, make_rule(CessationConfig(threshold=2.0)), FeedbackConfig(), 1.0, at_once=5)
    once, twice = (arena.run(PLANNERS.get("dcee")(seed=0), 8, first_seed=7) for _ in range(2))
    assert torch.equal(once.error, twice.error)
    assert torch.equal(once.steps, twice.steps)
    assert 0 < int(once.stopped.sum()) < 8, "some stop, and some do not"
    assert set(once.steps[~once.stopped].tolist()) == {30}
    assert int(once.steps[once.stopped].min()) < 30
    assert once.evidence.shape == (8, 5)
    assert torch.isfinite(once.evidence).all()


def test_figures_by_hand() -> None:
    searches = Searches(
        stopped=torch.tensor([True, True, True, False]),
        error=torch.tensor([0.5, 1.0, 3.0, 0.2]),
        steps=torch.tensor([10, 20, 30, 40]),
        travelled=torch.tensor([9.0, 18.0, 27.0, 36.0]),
        distance=torch.tensor([1.0, 2.0, 4.0, 9.0]),
        evidence=torch.zeros(4, 2),
        evidence_error=torch.zeros(4),
        faults={"nonfinite": 2, "unexplained": 3, "broken": 0, "forced": 2},
    )
    figures = search_metrics(searches, tolerance=1.0)
    expected = {"stop_rate": 3 / 4, "correct_stops": 2 / 3, "success": 1 / 2, "wrong_stops": 1 / 4, "steps": 25.0, "distance": 22.5}
    expected |= {"right": 3 / 4, "final_distance": 4.0}  # one was right and did not stop
    expected |= {"belief_nonfinite": 2, "belief_unexplained": 3, "belief_broken": 0, "belief_forced": 2}
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value)
    wilson = stats.binomtest(2, 4).proportion_ci(0.95, method="wilson")
    assert (figures["success_low"], figures["success_high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    wilson = stats.binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert (figures["right_low"], figures["right_high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    for name, values in (("steps", [10, 20, 30, 40]), ("final_distance", [1, 2, 4, 9])):
        half = 1.959964 * np.std(values, ddof=1) / 2
        assert figures[f"{name}_high"] - figures[name] == pytest.approx(half)
    blind = search_metrics(replace(searches, believed=False), tolerance=1.0)
    assert "right" not in blind, "without a belief there is no estimate of the policy's own"
    assert blind["final_distance"] == 4.0


def test_a_policy_that_never_stops_can_be_right_and_one_without_a_belief_cannot() -> None:
    agdc = AgdcConfig(
        environment=SourceTermConfig(max_steps=60), belief=BeliefConfig(particles=150), cessation=CessationConfig(rule="never")
    )
    found = {detect: make_arena(agdc.model_copy(update={"detect": detect})).run(Oracle(), 12) for detect in (True, False)}
    figures = {detect: search_metrics(searches, 2.0) for detect, searches in found.items()}
    assert figures[True]["success"] == 0, "it never stops"
    assert figures[True]["right"] > 0.5
    assert figures[True]["final_distance"] < 1.5, "the oracle stands on the source at the end"
    assert not {"right", "right_low"} & figures[False].keys()
    assert figures[False]["final_distance"] == figures[True]["final_distance"]


def test_without_a_stop_nothing_is_said_of_correct_stops() -> None:
    none = Searches(
        *(torch.zeros(2, dtype=torch.bool), torch.zeros(2), torch.ones(2), torch.ones(2), torch.ones(2)),
        torch.zeros(2, 1),
        torch.ones(2),
        {},
    )
    assert "correct_stops" not in search_metrics(none, 1.0)
    assert search_metrics(none, 1.0)["success"] == 0
