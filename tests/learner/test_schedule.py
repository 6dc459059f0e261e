"""Learning rates over a run: by hand, and the same however often the run was broken off."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.learner.schedule import Schedule, rate_scale

BY_HAND: dict[Schedule, list[float]] = {  # two steps of warm-up, then four
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25],
    "cosine": [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
}


@pytest.mark.parametrize("schedule", BY_HAND)
def test_by_hand(schedule: Schedule) -> None:
    found = [rate_scale(update, schedule, warmup=2, updates=6) for update in range(6)]
    assert found == pytest.approx(BY_HAND[schedule])
    assert rate_scale(6, schedule, warmup=2, updates=6) == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert rate_scale(0, schedule, warmup=0, updates=6) == 1.0


@given(st.sampled_from(list(BY_HAND)), st.integers(0, 20), st.integers(1, 40), st.integers(0, 60))
def test_it_never_leaves_its_bounds_and_falls_after_the_warm_up(schedule: Schedule, warmup: int, updates: int, update: int) -> None:
    now, later = (rate_scale(u, schedule, warmup=warmup, updates=updates) for u in (update, update + 1))
    assert 0 <= now <= 1 and 0 <= later <= 1
    assert later >= now if update + 1 < warmup else later <= now or update + 1 == warmup
    if update < updates:
        assert now > 0, "no optimiser step of the run is for nothing"
