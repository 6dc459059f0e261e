"""The particle filter against an exact posterior on a grid, its calibration, and what it does with readings that cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from reasoner_ray.agents.agdc.belief import FAULTS, ParticleBelief, _effective_size, _normalised, _systematic
from reasoner_ray.agents.agdc.prior import SourcePrior
from reasoner_ray.agents.agdc.settings import BeliefConfig
from reasoner_ray.config import load_config
from reasoner_ray.envs.source_term.core import at_ground
from reasoner_ray.envs.source_term.plume import concentration, log_likelihood, read_sensor
from reasoner_ray.envs.source_term.settings import SensorConfig, SourceTermConfig
from reasoner_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
KNOWN = {
    "z": (0.0, 0.0),
    "strength_shape": 1e6,
    "strength_scale": 5e-6,
    "wind_sd": 1e-4,
    "direction_sd": 1e-3,
    "diffusivity_width": 1e-4,
    "lifetime_width": 1e-4,
}
"""A prior that leaves the position alone open."""
ESTIMATES = torch.tensor([2.0, math.radians(45), 2.0, 10.0])


def observe(places: torch.Tensor, readings: torch.Tensor, estimates: torch.Tensor = ESTIMATES) -> torch.Tensor:
    """Observations [E, 7] at ``places`` [E, 2]."""
    return torch.cat([places, readings[:, None], estimates.expand(len(places), 4)], dim=-1)


def walk(belief: ParticleBelief, places: torch.Tensor, readings: torch.Tensor, estimates: torch.Tensor = ESTIMATES) -> None:
    """``places`` [T, 2], ``readings`` [E, T]."""
    everyone = torch.ones(belief.n, dtype=torch.bool)
    for t, place in enumerate(places):
        observation = observe(place.expand(belief.n, 2), readings[:, t], estimates)
        (belief.reset if t == 0 else belief.update)(everyone, observation)


def test_posterior_of_the_position_equals_the_one_on_a_grid() -> None:
    environment = SourceTermConfig.model_validate({"prior": KNOWN})
    places = torch.tensor([[2.0, 3.0], [6.0, 9.0], [11.0, 7.0], [12.0, 12.0]])
    readings = torch.tensor([[0.0, 0.02, 0.0, 0.09]])
    belief = ParticleBelief(BeliefConfig(particles=4000, move_steps=3), environment, 1, seed=1)
    walk(belief, places, readings)
    grid = torch.cartesian_prod(torch.arange(0.05, 25, 0.1), torch.arange(0.05, 25, 0.1))
    sources = torch.cat([grid, torch.tensor([0.0, 5.0, *ESTIMATES.tolist()]).expand(len(grid), 6)], dim=-1)
    means = concentration(sources[:, None], at_ground(places))
    exact = torch.softmax(log_likelihood(means, readings, environment.sensor).sum(-1), dim=0)
    mean = exact @ grid
    spread = ((exact[:, None] * (grid - mean)).T @ (grid - mean)).sqrt()
    assert belief.mean()[0, :2].tolist() == pytest.approx(mean.tolist(), abs=0.2)
    assert belief.covariance()[0, :2, :2].sqrt().diagonal().tolist() == pytest.approx(spread.diagonal().tolist(), rel=0.06)
    x, weights = belief.particles[0, :, 0], belief.weights[0]
    for border in (11.0, 13.0, 15.0, 18.0):
        assert float(weights[x < border].sum()) == pytest.approx(float(exact[grid[:, 0] < border].sum()), abs=0.04)


def coverage(n: int, **belief_settings: Any) -> tuple[int, list[int]]:
    """Of ``n`` truths drawn from the prior: how many lie in the region, and in each parameter's interval, of nine tenths."""
    environment = SourceTermConfig()
    estimates = ESTIMATES.expand(n, 4)
    stream = torch.Generator().manual_seed(11)
    prior = SourcePrior(environment)
    truth = prior.draw(estimates, 1, stream)
    side = torch.arange(2.0, 24.0, 4.0)
    places = torch.cat([torch.stack([side, side], -1), torch.stack([side, 22 - side * 0.6], -1)])
    means = concentration(truth, at_ground(places))  # [n, T]
    readings = read_sensor(means, torch.randn(means.shape, generator=stream), torch.rand(means.shape, generator=stream), environment.sensor)
    at_truth = prior.log_density(truth, estimates) + log_likelihood(means, readings, environment.sensor).sum(-1, keepdim=True)
    belief = ParticleBelief(BeliefConfig.model_validate(belief_settings), environment, n, seed=2)
    walk(belief, places, readings, estimates)
    density = prior.log_density(belief.particles, estimates) + belief._log_likelihood
    above = (belief.weights * (density > at_truth)).sum(-1)
    ranks = (belief.weights[..., None] * (belief.particles < truth)).sum(1)
    return int((above <= 0.9).sum()), ((ranks >= 0.05) & (ranks <= 0.95)).sum(0).tolist()


def test_the_truth_lies_in_the_region_of_nine_tenths_nine_times_out_of_ten() -> None:
    region, intervals = coverage(160, particles=400, move="posterior", move_steps=6)
    low, high = stats.binom.interval(0.999, 160, 0.9)
    assert low <= region <= high
    assert all(low <= covered <= high for covered in intervals), intervals


def test_so_it_does_with_the_jobs_own_particles_and_moves() -> None:
    belief = load_config(ROOT / "jobs" / "agdc" / "base.yaml").agdc.belief
    region, _ = coverage(1000, **belief.model_dump())
    low, high = stats.binom.interval(0.999, 1000, 0.9)
    assert low <= region <= high


def test_published_moves_are_over_confident() -> None:
    _, intervals = coverage(160, particles=400, move="reading", move_steps=1)
    assert max(intervals) < stats.binom.ppf(1e-4, 160, 0.9)


def test_one_reading_reweights_by_its_likelihood() -> None:
    environment = SourceTermConfig()
    belief = ParticleBelief(BeliefConfig(particles=50, resample_below=1e-9, move="none"), environment, 2, seed=3)
    everyone = torch.ones(2, dtype=torch.bool)
    belief.reset(everyone, observe(torch.zeros(2, 2), torch.zeros(2)))
    particles, before = belief.particles.clone(), belief.weights.clone()
    belief.update(torch.tensor([True, False]), observe(torch.full((2, 2), 8.0), torch.tensor([0.05, 0.05])))
    likelihood = log_likelihood(concentration(particles, torch.tensor([8.0, 8.0, 0.0])), torch.tensor(0.05), environment.sensor).exp()
    expected = before[0] * likelihood[0] / (before[0] * likelihood[0]).sum()
    assert torch.equal(belief.particles, particles)
    assert belief.weights[0].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-7)
    assert torch.equal(belief.weights[1], before[1]), "a belief outside the mask is left alone"
    assert belief.effective_size[0].item() == pytest.approx(float(1 / (expected**2).sum()), rel=1e-3)


def test_beliefs_do_not_mix() -> None:
    """What one belief reads does not move another's weights, and each resamples from its own particles."""
    belief = ParticleBelief(BeliefConfig(particles=200), SourceTermConfig(), 2, seed=4)
    walk(belief, torch.tensor([[6.0, 6.0], [8.0, 8.0], [10.0, 10.0]]), torch.tensor([[0.0, 0.0, 0.0], [0.03, 0.06, 0.2]]))
    assert belief.covariance()[0, :2, :2].trace() > 2 * belief.covariance()[1, :2, :2].trace()
    assert belief.effective_size.min() >= 0.5 * 200 - 1


def test_systematic_resampling_keeps_each_share() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    counts = torch.bincount(_systematic(weights, 8, torch.Generator().manual_seed(0))[0], minlength=4)
    assert counts.tolist() == [4, 2, 2, 0]


def test_effective_size_by_hand() -> None:
    log_weights = _normalised(torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0]]).log())
    assert _effective_size(log_weights).tolist() == pytest.approx([4.0, 1 / (0.75**2 + 0.25**2)])


@pytest.mark.parametrize("reading", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_not_finite_is_counted_and_says_nothing(reading: float) -> None:
    belief = ParticleBelief(BeliefConfig(particles=100), SourceTermConfig(), 1)
    everyone = torch.ones(1, dtype=torch.bool)
    belief.reset(everyone, observe(torch.zeros(1, 2), torch.zeros(1)))
    before = belief.weights.clone()
    belief.update(everyone, observe(torch.ones(1, 2), torch.tensor([reading])))
    assert belief.weights[0].tolist() == pytest.approx(before[0].tolist(), rel=1e-4)
    assert belief.nonfinite == 1


def test_a_reading_that_no_particle_explains_is_set_aside_and_counted() -> None:
    exact = {"noise": 1e-3, "background": 0.0, "detection": 1.0, "threshold": 1e-9}  # a reading of 0 cannot be near a source
    scene = {"width": 2, "height": 2, "x": (0, 2), "y": (0, 2)}
    environment = SourceTermConfig.model_validate({"sensor": exact, "scene": scene, "clearance": 0})
    belief = ParticleBelief(BeliefConfig(particles=100), environment, 1)
    everyone = torch.ones(1, dtype=torch.bool)
    belief.reset(everyone, observe(torch.ones(1, 2), torch.zeros(1)))
    assert belief.unexplained == 1
    assert torch.isfinite(belief.log_weights).all()
    belief.update(everyone, observe(torch.ones(1, 2), torch.tensor([0.3])))
    assert torch.isfinite(belief.log_weights).all()
    assert belief.weights.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_sensor_without_noise_is_refused_and_one_without_background_is_not() -> None:
    exact = {"noise": 0.0, "background": 0.0}
    with pytest.raises(ConfigError, match="noise 0 and background 0"):
        ParticleBelief(BeliefConfig(particles=5), SourceTermConfig.model_validate({"sensor": exact}), 1)
    with pytest.raises(ConfigError, match="noise 0 and background 0"):
        load_config(ROOT / "jobs" / "agdc" / "ppo.yaml", [f"agdc.environment.sensor.{name}=0" for name in exact])
    sensor = SensorConfig(noise=0.5, background=0.0)
    away = log_likelihood(torch.tensor([0.0, 0.3]), torch.tensor(0.3), sensor)  # so far away that its concentration is 0
    assert not torch.isnan(away).any()
    assert away[0] < -1e20 < away[1]


def test_a_likelihood_that_is_not_a_number_is_counted_and_explains_nothing() -> None:
    belief = ParticleBelief(BeliefConfig(particles=100), SourceTermConfig(), 2)
    everyone = torch.ones(2, dtype=torch.bool)
    belief.reset(everyone, observe(torch.zeros(2, 2), torch.zeros(2)))
    belief.particles[0, :3, 7] = -1.0  # a lifetime below 0
    belief.update(everyone, observe(torch.full((2, 2), 9.0), torch.tensor([0.02, 0.02])))
    assert belief.faults() == {name: 3 if name == "broken" else 0 for name in FAULTS}
    assert torch.isfinite(belief.log_weights).all()
    assert torch.isfinite(belief.particles).all()


def test_readings_that_stages_cannot_take_in_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reasoner_ray.agents.agdc.belief.MAX_STAGES", 1)
    belief = ParticleBelief(BeliefConfig(particles=100), SourceTermConfig(), 2)
    walk(belief, torch.tensor([[9.0, 9.0]]), torch.full((2, 1), 0.5))
    assert belief.forced == 2


@pytest.mark.parametrize("move", ["posterior", "reading", "none"])
def test_particles_stay_where_sources_can_be(move: str) -> None:
    environment = SourceTermConfig()
    belief = ParticleBelief(BeliefConfig.model_validate({"particles": 120, "move": move}), environment, 3, seed=6)
    readings = torch.tensor([[0.0, 0.01, 0.03, 0.05, 0.3]]).expand(3, 5) * torch.tensor([[1.0], [2.0], [0.0]])
    walk(belief, torch.tensor([[2.0, 2.0], [5.0, 5.0], [8.0, 8.0], [11.0, 11.0], [14.0, 14.0]]), readings)
    assert belief.resampled > 0
    density = SourcePrior(environment).log_density(belief.particles, ESTIMATES.expand(3, 4))
    assert torch.isfinite(density).all()
    assert belief.weights.sum(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
