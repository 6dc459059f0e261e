"""Group baselines: hand-computed cases, unbiasedness by enumeration, independence of one's own stopping turn."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.credit import action_returns_to_go, group_advantages
from tests.credit.streams import Actions, action_lists, make_streams, make_trajectory

TWO_GROUPS = torch.tensor([0, 0, 0, 0, 1, 1])
RETURNS = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 5.0])


def test_grpo_by_hand() -> None:
    out = group_advantages(RETURNS, TWO_GROUPS, baseline="mean", scale_by_std=True)
    # mean .25, squared deviations .5625 + 3 * .0625 = .75, std sqrt(.75/3) = .5; second group std sqrt(2)
    torch.testing.assert_close(out, torch.tensor([1.5, -0.5, -0.5, -0.5, -1 / math.sqrt(2), 1 / math.sqrt(2)]), atol=1e-5, rtol=0)


def test_unbiased_grpo_by_hand() -> None:
    out = group_advantages(RETURNS, TWO_GROUPS, baseline="mean", scale_by_std=False)
    assert out.tolist() == [0.75, -0.25, -0.25, -0.25, -1.0, 1.0]


def test_rloo_by_hand() -> None:
    out = group_advantages(RETURNS, TWO_GROUPS, baseline="leave_one_out", scale_by_std=False)
    torch.testing.assert_close(out, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, -2.0, 2.0]))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_equal_rewards_and_lone_samples_teach_nothing(baseline: Literal["mean", "leave_one_out"], scale_by_std: bool) -> None:
    returns, groups = torch.tensor([0.1] * 7 + [3.0]), torch.tensor([0] * 7 + [1])
    out = group_advantages(returns, groups, baseline=baseline, scale_by_std=scale_by_std)
    torch.testing.assert_close(out, torch.zeros(8), atol=1e-6, rtol=0)
    assert out[-1] == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_mean_is_scaled_leave_one_out(samples: list[tuple[int, float]], random: object) -> None:
    groups, returns = torch.tensor([g for g, _ in samples]), torch.tensor([r for _, r in samples])
    order = list(range(len(samples)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for scale in (True, False):
        straight = group_advantages(returns, groups, baseline="mean", scale_by_std=scale)
        moved = group_advantages(returns[order], groups[order], baseline="mean", scale_by_std=scale)
        torch.testing.assert_close(straight[order], moved, atol=1e-5, rtol=1e-4)
    count = torch.bincount(groups)[groups]
    loo = group_advantages(returns, groups, baseline="leave_one_out", scale_by_std=False)
    torch.testing.assert_close(group_advantages(returns, groups, baseline="mean", scale_by_std=False), loo * (count - 1) / count)


def test_returns_to_go_by_hand() -> None:
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0), (1, 4.0)]), make_trajectory([]), make_trajectory([(2, -1.0)]))
    returns, turn = action_returns_to_go(streams)
    assert returns.tolist() == [[7.0, 6.0, 4.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]
    assert turn.tolist() == [0, 0, 1, 2, 0, 0]


@settings(deadline=None, max_examples=40)
@given(st.lists(action_lists, min_size=2, max_size=5), action_lists)
def test_baseline_does_not_depend_on_ones_own_stopping_turn(group: list[Actions], other: Actions) -> None:
    """Whatever sample 0 does and however long it goes on, what is subtracted from its returns stays the same."""

    def baseline_of_first(first: Actions) -> torch.Tensor:
        streams = make_streams(*[make_trajectory(actions) for actions in [first, *group[1:]]])
        returns, _ = action_returns_to_go(streams)
        padded = torch.zeros(len(group), 8)
        padded[:, : returns.shape[1]] = returns
        return (padded - group_advantages(padded, streams.group_index, baseline="leave_one_out", scale_by_std=False))[0]

    torch.testing.assert_close(baseline_of_first(group[0]), baseline_of_first(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_action", [True, False])
def test_leave_one_out_gradient_is_exact_where_the_policy_decides_when_to_stop(per_action: bool) -> None:
    """Two turns; after the first (reward 1) the policy may stop, the second pays 3 or -2. Groups of 2, enumerated."""
    logits = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    go_on, good = torch.sigmoid(logits)
    # name -> (probability, log-probs of its actions, rewards of its actions)
    stop = (1 - go_on, [torch.log(1 - go_on)], [(1, 1.0)])
    win = (go_on * good, [torch.log(go_on), torch.log(good)], [(1, 1.0), (1, 3.0)])
    lose = (go_on * (1 - good), [torch.log(go_on), torch.log(1 - good)], [(1, 1.0), (1, -2.0)])
    surrogate = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product([stop, win, lose], repeat=2):
        streams = make_streams(make_trajectory(a[2]), make_trajectory(b[2]))
        if per_action:
            returns, turn = action_returns_to_go(streams)
            advantages = group_advantages(returns, streams.group_index, baseline="leave_one_out", scale_by_std=False)
            credit = advantages[streams.trajectory_index, turn]
        else:
            totals = streams.returns_per_trajectory()
            credit = group_advantages(totals, streams.group_index, baseline="leave_one_out", scale_by_std=False)[streams.trajectory_index]
        logprobs = torch.stack([*a[1], *b[1]])
        surrogate = surrogate + (a[0] * b[0]).detach() * (logprobs * credit.double()).sum() / 2
    objective = 1 + go_on * (3 * good - 2 * (1 - good))
    exact = torch.autograd.grad(objective, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], exact)
