"""The two losses of soft Q learning by hand, and what the policy's is least at."""

from __future__ import annotations

import pytest
import torch

from reasoner_ray.losses import soft_policy_loss, soft_q_loss


def test_q_loss_is_quadratic_then_linear_on_both_sides() -> None:
    q = torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True)
    loss = soft_q_loss(q, torch.tensor([3.0, -1.0, 14.0, -14.0]), delta=10.0)
    assert loss.tolist() == [2.0, 2.0, 10 * (14 - 5), 10 * (14 - 5)]
    (gradient,) = torch.autograd.grad(loss.sum(), q)
    assert gradient.tolist() == [-2.0, 2.0, -10.0, 10.0]


def test_policy_loss_is_least_at_the_tilted_reference() -> None:
    """At pi = rho exp(Q / beta) / Z it is -beta log Z, its gradient is 0, and every other pi is worse."""
    beta, generator = 0.3, torch.Generator().manual_seed(0)
    rho = torch.randn(4, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(4, 9, generator=generator, dtype=torch.float64)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        pi = logits.log_softmax(-1)
        return soft_policy_loss((pi.exp() * q).sum(-1), (pi.exp() * (pi - rho)).sum(-1), beta=beta)

    best = (rho + q / beta).requires_grad_()
    torch.testing.assert_close(loss(best), -beta * torch.logsumexp(best, -1))
    assert torch.autograd.grad(loss(best).sum(), best)[0].abs().max() < 1e-12
    for _ in range(5):
        assert (loss(best + 0.3 * torch.randn(4, 9, generator=generator)) > loss(best)).all()


def test_beta_weighs_the_divergence() -> None:
    assert soft_policy_loss(torch.tensor([2.0]), torch.tensor([3.0]), beta=0.5).tolist() == [pytest.approx(-0.5)]
