"""Credit, value normalisation and losses of teams, by hand and against the kernels of the language agents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.agents.mat.ppo import Rows, Totals, huber, normalised, team_credit, team_gae, team_loss, value_loss
from reasoner_ray.agents.mat.value_norm import ValueNorm
from reasoner_ray.losses.value import value_loss as squared_value_loss


def column(*values: float) -> torch.Tensor:
    """[T, 1, 1]"""
    return torch.tensor(values).view(-1, 1, 1)


def flags(*values: int) -> torch.Tensor:
    return column(*values).bool()


def test_an_end_by_time_is_bootstrapped_and_an_end_by_success_is_not() -> None:
    """Three steps, the episode ends at the second; gamma 0.5, lambda 0.5, by hand."""
    given_ = {"rewards": column(1, 2, 3), "values": column(10, 20, 30), "next_values": column(20, 8, 4)}
    ended = team_gae(**given_, terminated=flags(0, 1, 0), truncated=flags(0, 0, 0), gamma=0.5, gae_lambda=0.5)
    # delta: 1 + 10 - 10 = 1; 2 - 20 = -18; 3 + 2 - 30 = -25
    assert ended.advantages.flatten().tolist() == [1 + 0.25 * -18, -18, -25]
    cut = team_gae(**given_, terminated=flags(0, 0, 0), truncated=flags(0, 1, 0), gamma=0.5, gae_lambda=0.5)
    # delta: 1; 2 + 4 - 20 = -14; -25. Nothing of the next episode reaches the first two.
    assert cut.advantages.flatten().tolist() == [1 + 0.25 * -14, -14, -25]
    assert cut.returns.flatten().tolist() == [10 + 1 + 0.25 * -14, 20 - 14, 5]


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 9), seed=st.integers(0, 1000))
def test_with_lambda_one_an_advantage_is_the_discounted_return_minus_the_value(steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rewards, values, gamma = torch.randn(steps, 2, 3), torch.randn(steps, 2, 3), 0.9
    last = torch.randn(1, 2, 3)
    none = torch.zeros(steps, 2, 3, dtype=torch.bool)
    credit = team_gae(rewards, values, torch.cat([values[1:], last]), none, none, gamma=gamma, gae_lambda=1.0)
    returns = sum(gamma**t * rewards[t] for t in range(steps)) + gamma**steps * last[0]
    torch.testing.assert_close(credit.returns[0], returns)
    torch.testing.assert_close(credit.advantages[0], returns - values[0])


def test_joint_advantage_is_that_of_the_living_agents_mean_value() -> None:
    rewards = torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]]])
    values = torch.tensor([[[2.0, 4.0]], [[6.0, 100.0]]])
    next_values = torch.tensor([[[6.0, 100.0]], [[0.0, 0.0]]])
    active = torch.tensor([[[True, True]], [[True, False]]])
    after = torch.tensor([[[True, False]], [[False, False]]])
    none = torch.zeros(2, 1, 2, dtype=torch.bool)
    ended = torch.tensor([[[False, False]], [[True, True]]])
    credit = team_credit(rewards, values, next_values, ended, none, active, after, advantage="joint", gamma=1.0, gae_lambda=0.0)
    # The second agent dies in step 0, so in state 1 the team's value is 6, the first agent's alone, from either side:
    # delta_0 = 1 + 6 - mean(2, 4) = 4 and delta_1 = 1 + 0 - 6 = -5. (With the dead agent's 100 in V(s_1) of the first alone,
    # delta_0 would be 51: a step would be praised for a value that the next step does not start from.)
    assert credit.advantages.tolist() == [[[4.0, 4.0]], [[-5.0, -5.0]]]
    assert credit.returns.tolist() == [[[7.0, 101.0]], [[1.0, 1.0]]], "each critic keeps its own target"
    whole = team_credit(rewards, values, next_values, ended, none, active, after, advantage="joint", gamma=1.0, gae_lambda=1.0)
    # With lambda = 1 the values between cancel: A_0 = 1 + 1 - mean(2, 4), the return minus the first state's value.
    assert whole.advantages[0].tolist() == [[-1.0, -1.0]]
    each = team_credit(rewards, values, next_values, ended, none, active, after, advantage="per_agent", gamma=1.0, gae_lambda=0.0)
    assert each.advantages.tolist() == [[[5.0, 97.0]], [[-5.0, -99.0]]]


def test_a_team_goes_on_when_one_agents_time_is_up() -> None:
    rewards, zero = torch.tensor([[[0.0, 0.0]], [[0.0, 5.0]]]), torch.zeros(2, 1, 2)
    active = torch.tensor([[[True, True]], [[False, True]]])
    after = torch.tensor([[[False, True]], [[False, False]]])
    cut = torch.tensor([[[True, False]], [[False, False]]])
    ended = torch.tensor([[[False, False]], [[True, True]]])
    credit = team_credit(rewards, zero, zero, ended, cut, active, after, advantage="joint", gamma=1.0, gae_lambda=1.0)
    assert credit.advantages[0].tolist() == [[5.0, 5.0]], "what the other earns later counts for the step before"


def test_normalisation_counts_the_living_alone() -> None:
    advantages, active = torch.tensor([1.0, 3.0, 1000.0]), torch.tensor([True, True, False])
    assert normalised(advantages, active)[:2].tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_huber_is_symmetric() -> None:
    """The reference's own tests ``e > d``: an error of -11 cost nothing."""
    assert huber(torch.tensor([-11.0, -10.0, -1.0, 0.0, 1.0, 10.0, 11.0]), 10.0).tolist() == [60.0, 50.0, 0.5, 0.0, 0.5, 50.0, 60.0]
    error = torch.tensor([-25.0], requires_grad=True)
    huber(error, 10.0).backward()
    assert error.grad is not None and error.grad.tolist() == [-10.0], "a large negative error still pulls"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_huber_is_torchs_and_within_delta_the_value_loss_is_the_squared_one(seed: int) -> None:
    torch.manual_seed(seed)
    values, old, targets = (3 * torch.randn(20) for _ in range(3))
    torch.testing.assert_close(huber(values, 1.5), torch.nn.functional.huber_loss(values, torch.zeros(20), reduction="none", delta=1.5))
    for clip in (None, 0.2):
        torch.testing.assert_close(
            value_loss(values, old, targets, clip=clip, delta=100.0), squared_value_loss(values, targets, old, clip=clip)
        )


def test_value_norm_takes_out_the_bias_of_its_start() -> None:
    norm = ValueNorm(beta=0.99999)
    assert norm.normalise(torch.tensor([3.0])).item() == 3.0
    returns, counted = torch.tensor([1.0, 5.0, 1e6]), torch.tensor([1.0, 1.0, 0.0])
    norm.update(returns, counted)
    assert norm.moments == pytest.approx((3.0, 2.0)), "after one update, its own moments: not 0.001 % of them"
    assert norm.normalise(torch.tensor([5.0])).item() == pytest.approx(1.0)
    assert norm.denormalise(torch.tensor([1.0])).item() == pytest.approx(5.0)
    norm.update(torch.tensor([11.0]), torch.ones(1))
    assert norm.moments[0] == pytest.approx((0.99999 * 3 + 11) / 1.99999)
    other = ValueNorm(beta=0.99999)
    other.load_state_dict(norm.state_dict())
    assert other.moments == norm.moments
    norm.update(torch.ones(1), torch.zeros(1))
    assert other.moments == norm.moments, "a minibatch without a living agent says nothing"
    flat = ValueNorm(beta=0.9)
    flat.update(torch.ones(4), torch.ones(4))
    assert flat.moments == (pytest.approx(1.0), pytest.approx(0.1)), "variance is at least 0.01"


def rows(n: int = 6, parts: int = 2, seed: int = 0, **changes: Any) -> Rows:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        **{name: 0.1 * torch.randn(n, 3, parts) for name in ("logprobs", "old_logprobs", "entropy")},
        **{name: torch.randn(n, 3) for name in ("values", "old_values", "advantages", "targets")},
        "policy_weights": torch.ones(n, 3),
        "value_weights": torch.ones(n, 3),
        "parts": torch.ones(3, parts),
    }
    return Rows(**fields | changes)


SETTINGS: dict[str, Any] = {"clip": 0.2, "clip_value": True, "huber_delta": 10.0, "entropy_coef": 0.01, "value_coef": 0.5}


def test_the_ratio_is_taken_of_each_part_and_summed_after_the_minimum() -> None:
    """One row, one agent, two dimensions with ratios 2 and 1/2, advantage 1: -(min(2, 1.2) + min(0.5, 0.8))."""
    one = {"old_logprobs": torch.zeros(1, 1, 2), "entropy": torch.zeros(1, 1, 2), "parts": torch.ones(1, 2)}
    zeros = {name: torch.zeros(1, 1) for name in ("values", "old_values", "targets")}
    ones = {name: torch.ones(1, 1) for name in ("advantages", "policy_weights", "value_weights")}
    batch = Rows(logprobs=torch.tensor([[[2.0, 0.5]]]).log(), **one, **zeros, **ones)
    loss, metrics = team_loss(batch, Totals(policy=1.0, value=1.0), **SETTINGS)
    assert loss.item() == pytest.approx(-1.7)
    assert metrics["clip_fraction"].item() == pytest.approx(0.5), "the first part's gradient is cut"


def test_agents_that_have_died_do_not_count() -> None:
    weights = torch.ones(6, 3)
    weights[2, 1] = weights[4, 0] = 0.0
    batch = rows(policy_weights=weights, value_weights=weights)
    for name in ("logprobs", "values", "entropy", "advantages", "targets"):
        getattr(batch, name)[2, 1] += 50.0
    clean = rows(policy_weights=weights, value_weights=weights)
    totals = Totals(policy=float(weights.sum()), value=float(weights.sum()))
    spoilt, untouched = team_loss(batch, totals, **SETTINGS)[0], team_loss(clean, totals, **SETTINGS)[0]
    torch.testing.assert_close(spoilt, untouched)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 5), seed=st.integers(0, 100))
def test_micro_batches_add_up(cut: int, seed: int) -> None:
    batch, totals = rows(seed=seed), Totals(policy=18.0, value=18.0)
    halves = [
        Rows(**{f: getattr(batch, f) if f == "parts" else getattr(batch, f)[part] for f in Rows.__dataclass_fields__})
        for part in (slice(0, cut), slice(cut, None))
    ]
    whole, sums = team_loss(batch, totals, **SETTINGS)
    pieces = [team_loss(half, totals, **SETTINGS) for half in halves]
    torch.testing.assert_close(pieces[0][0] + pieces[1][0], whole)
    for name, value in sums.items():
        torch.testing.assert_close(pieces[0][1][name] + pieces[1][1][name], value, atol=1e-6, rtol=1e-5)
