"""KL estimators and whitening."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.credit import kl_estimate, mean_std, moments, whiten


def test_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([math.log(0.5), math.log(0.25)]), torch.tensor([math.log(0.25), math.log(0.5)])
    d = math.log(2)
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k1"), torch.tensor([d, -d]))
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k2"), torch.tensor([d * d / 2, d * d / 2]))
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k3"), torch.tensor([0.5 - 1 + d, 2 - 1 - d]))


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.log_softmax(torch.randn(2, 7, generator=generator, dtype=torch.float64), -1)
    exact = (p.exp() * (p - q)).sum()
    mean = {kind: (p.exp() * kl_estimate(p, q, kind)).sum() for kind in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert abs(mean["k2"] - exact) > 1e-3


@settings(deadline=None, max_examples=50)
@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k3_is_never_negative_and_precise_for_small_differences(a: float, b: float) -> None:
    assert kl_estimate(torch.tensor(a), torch.tensor(b), "k3") >= 0
    small = kl_estimate(torch.tensor(1e-4), torch.tensor(0.0), "k3")
    assert small.item() == pytest.approx(0.5e-8, rel=0.05)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=30), st.integers(0, 30))
def test_moments_add_over_ranks(advantages: list[float], cut: int) -> None:
    x = torch.tensor(advantages)
    mask = torch.ones(len(x), dtype=torch.bool)
    parts = moments(x[:cut], mask[:cut]) + moments(x[cut:], mask[cut:])
    mean, std = mean_std(parts)
    assert mean == pytest.approx(x.double().mean().item(), abs=1e-9)
    assert std == pytest.approx(x.double().std(correction=0).item(), abs=1e-6)


def test_an_advantage_of_zero_counts_and_a_masked_one_does_not() -> None:
    """The reference code drops whatever equals 0.0; only the mask may decide."""
    advantages, mask = torch.tensor([0.0, 0.0, 3.0, 99.0]), torch.tensor([True, True, True, False])
    mean, std = mean_std(moments(advantages, mask))
    assert (mean, std) == (pytest.approx(1.0), pytest.approx(math.sqrt(2)))
    torch.testing.assert_close(whiten(advantages, mean, std)[mask], torch.tensor([-1.0, -1.0, 2.0]) / math.sqrt(2))


def test_constant_advantages_become_zero_and_none_at_all_is_refused() -> None:
    x = torch.full((1000,), 0.1)
    mean, std = mean_std(moments(x, x > 0))
    assert whiten(x, mean, std).abs().max() < 1e-6
    with pytest.raises(ValueError, match="no trainable token"):
        mean_std(moments(x, x < 0))
