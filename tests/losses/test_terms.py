"""Each term of the losses against hand-computed cases and exact gradients."""

from __future__ import annotations

import math

import pytest
import torch

from reasoner_ray.credit import KlKind
from reasoner_ray.losses import behaviour_weights, clipped_surrogate, kl_penalty, summarise, value_loss


def test_surrogate_and_its_gradient_in_every_quadrant() -> None:
    """Ratio below, inside and above the range, with advantage +2 and -2; bounds 0.8 and 1.3."""
    ratio = torch.tensor([0.5, 0.9, 1.5, 0.5, 0.9, 1.5])
    logprobs = ratio.log().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, clipped = clipped_surrogate(logprobs, torch.zeros(6), advantages, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -1.8, -2.6, 1.6, 1.8, 3.0]))
    assert clipped.tolist() == [False, False, True, True, False, False]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.8, 0.0, 0.0, 1.8, 3.0]))


def test_gradient_at_the_old_policy_is_reinforce() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, logprobs.detach(), torch.tensor([3.0, -4.0]), clip_low=0.2, clip_high=0.2)
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == [-3.0, 4.0]


def test_behaviour_weight_is_truncated_detached_and_blind_to_dropped_tokens() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0 - math.log(1.5), -3.0, -0.5, math.nan])
    out = behaviour_weights(old, behaviour, torch.tensor([1.0, 1.0, 1.0, 0.0]), cap=2.0)
    torch.testing.assert_close(out, torch.tensor([1.5, 2.0, math.exp(-0.5), 1.0]))
    assert not out.requires_grad


def test_value_loss_by_hand() -> None:
    values, returns, old = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 0.1])
    assert value_loss(values, returns, None, clip=None).tolist() == [0.5, 0.5, 8.0]
    # clipped values .5, .5, 0: squared errors max(1, .25), max(1, 6.25), max(16, 16)
    assert value_loss(values, returns, old, clip=0.5).tolist() == [0.5, 3.125, 8.0]
    with pytest.raises(ValueError, match="before the update"):
        value_loss(values, returns, None, clip=0.5)


def test_clipped_value_loss_stops_the_gradient_only_where_the_step_went_too_far() -> None:
    values = torch.tensor([2.0, 2.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), clip=0.5)
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_penalty_has_the_gradient_of_the_kl(kind: KlKind, on_policy: bool) -> None:
    """The mean over all tokens, weighted by pi_old as sampling would, against the gradient of sum p log(p/q)."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, other = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logprobs, ref_logprobs = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    old = logprobs.detach() if on_policy else torch.log_softmax(other, -1)
    estimate = (old.exp() * kl_penalty(logprobs, old, ref_logprobs, kind)).sum()
    exact = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    expected = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(estimate, logits)[0], expected)


def test_explained_variance_from_added_pieces() -> None:
    returns, values = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 2.0, 4.0, 4.0])
    pieces: dict[str, float] = {"loss": 1.0}
    for name, x in {"return": returns, "error": returns - values}.items():
        pieces |= {f"{name}_mean": x.mean().item(), f"{name}_square": (x**2).mean().item()}
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert summarise(pieces) == {"loss": 1.0, "explained_variance": pytest.approx(expected.item())}


def test_explained_variance_is_left_out_where_it_is_undefined() -> None:
    flat = {"return_mean": 0.3, "return_square": 0.09, "error_mean": 0.1, "error_square": 0.02}
    assert summarise(flat) == {}
    assert summarise({"loss": 2.0}) == {"loss": 2.0}
