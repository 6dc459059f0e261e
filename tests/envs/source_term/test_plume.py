"""The plume and the sensor against values worked out by hand, and what must hold for every source."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reasoner_ray.envs.source_term.plume import NEAREST, concentration, log_likelihood, read_sensor
from reasoner_ray.envs.source_term.settings import SensorConfig

SENSOR = SensorConfig()


def source(
    x: float = 0, y: float = 0, z: float = 0, q: float = 5, u: float = 2, phi: float = 0, d: float = 2, tau: float = 10
) -> torch.Tensor:
    return torch.tensor([x, y, z, q, u, phi, d, tau], dtype=torch.float64)


def test_concentration_by_hand() -> None:
    # d = 2, tau = 10, u = 2: lambda = sqrt(20 / (1 + 40 / 8)) = sqrt(10 / 3). Three metres from it, against and with the wind from x.
    reach = math.sqrt(10 / 3)
    upwind = 5 / (8 * math.pi * 3) * math.exp(-3 * 2 / 4 - 3 / reach)
    downwind = 5 / (8 * math.pi * 3) * math.exp(3 * 2 / 4 - 3 / reach)
    places = torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]], dtype=torch.float64)
    assert concentration(source(), places).tolist() == pytest.approx([upwind, downwind])
    calm = concentration(source(u=0, d=1, tau=4), torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64))
    assert float(calm) == pytest.approx(5 / (4 * math.pi * 5) * math.exp(-5 / 2)), "without wind lambda is sqrt(d tau)"


def test_wind_from_the_north_blows_south() -> None:
    north = source(phi=math.pi / 2)
    south_side, north_side = concentration(north, torch.tensor([[0.0, -4, 0], [0.0, 4, 0]], dtype=torch.float64)).tolist()
    assert south_side > 10 * north_side


def test_on_top_of_the_source_it_is_finite() -> None:
    at_source = float(concentration(source(), torch.zeros(3, dtype=torch.float64)))
    assert at_source == pytest.approx(5 / (8 * math.pi * NEAREST), rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.floats(-60, 60)] * 2, st.floats(0, 5)),
    st.floats(0, 50),
    st.floats(0, 20),
    st.floats(-4, 4),
    st.floats(0.05, 20),
    st.floats(0.05, 100),
)
def test_no_source_exceeds_still_air_without_decay(place: tuple[float, ...], q: float, u: float, phi: float, d: float, tau: float) -> None:
    position = torch.tensor(place, dtype=torch.float64)
    value = float(concentration(source(q=q, u=u, phi=phi, d=d, tau=tau), position))
    assert math.isfinite(value)
    assert 0 <= value <= q / (4 * math.pi * d * max(float(position.norm()), NEAREST)) * (1 + 1e-9)


def test_readings_by_hand() -> None:
    mean = torch.tensor([1.0, 1.0, 1e-4, 1.0])
    got = read_sensor(mean, torch.tensor([1.0, -2.1, 1.0, 0.0]), torch.tensor([0.69, 0.0, 0.0, 0.71]), SENSOR)
    assert got.tolist() == pytest.approx([1.5001, 0.0, 0.0, 0.0]), "seen; below zero; below the threshold; missed"


def test_likelihood_by_hand() -> None:
    mean = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    got = log_likelihood(mean, torch.tensor([1.2, 0.0, 0.0], dtype=torch.float64), SENSOR)
    seen = math.log(0.7) + stats.norm.logpdf(1.2, 1.0, 0.5001)
    nothing_there = math.log(0.7 * stats.norm.cdf(5.0) + 0.3)
    missed = math.log(0.7 * stats.norm.cdf((5e-4 - 1) / 0.5001) + 0.3)
    assert got.tolist() == pytest.approx([seen, nothing_there, missed])


def test_likelihood_is_the_density_of_the_readings() -> None:
    mean, n = torch.full((200_000,), 2e-3, dtype=torch.float64), 200_000
    stream = torch.Generator().manual_seed(3)
    readings = read_sensor(mean, torch.randn(n, generator=stream).double(), torch.rand(n, generator=stream).double(), SENSOR)
    zero = float(torch.exp(log_likelihood(mean[:1], torch.zeros(1, dtype=torch.float64), SENSOR)))
    assert float((readings == 0).double().mean()) == pytest.approx(zero, abs=4 * math.sqrt(zero * (1 - zero) / n))
    grid = torch.linspace(SENSOR.threshold, 0.02, 20_001, dtype=torch.float64)
    density = torch.exp(log_likelihood(torch.full_like(grid, 2e-3), grid, SENSOR))
    assert float(torch.trapezoid(density, grid)) + zero == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("reading", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_not_finite_says_nothing(reading: float) -> None:
    assert log_likelihood(torch.tensor([1e-5, 3.0]), torch.tensor(reading), SENSOR).tolist() == [0.0, 0.0]
