"""Whole objectives on cases small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from reasoner_ray.algorithms import get_algorithm
from reasoner_ray.credit import Credit
from reasoner_ray.losses import Denominators, LossInputs, gather_inputs
from reasoner_ray.trajectory import TokenStreams
from tests.credit.streams import make_streams, make_trajectory


def inputs_of(streams: TokenStreams, credit: Credit, **outputs: Any) -> LossInputs:
    weights = torch.ones(streams.n_tokens)
    counts = Denominators.of(streams, weights)
    given = {"entropy": None, "values": None, **outputs}
    return gather_inputs(streams, credit, weights, torch.arange(streams.n_tokens), counts, **given)


def two_tokens() -> TokenStreams:
    """One action of two tokens; old log-probs -1, behaviour log-probs -0.5, reference -2, old values 0."""
    streams = make_streams(make_trajectory([(2, 1.0)]), values=[0.0, 0.0])
    return replace(streams, old_logprobs=torch.tensor([-1.0, -1.0]), ref_logprobs=torch.tensor([-2.0, -2.0]))


ADVANTAGES = Credit(advantages=torch.tensor([2.0, 2.0]), returns=torch.tensor([1.0, 1.0]))


def test_poad_objective_by_hand() -> None:
    algorithm = get_algorithm("poad")
    chosen = algorithm.settings({"clip_high": 0.1, "entropy_coef": 0.1, "value_coef": 0.5})
    logprobs = torch.tensor([-1.0, -1.0 + math.log(1.5)])
    out = algorithm.loss(
        inputs_of(two_tokens(), ADVANTAGES, logprobs=logprobs, entropy=torch.tensor([3.0, 1.0]), values=torch.tensor([0.0, 2.0])), chosen
    )
    weight = math.exp(-0.5)  # pi_old / mu
    policy = -weight * (1.0 * 2 + 1.1 * 2) / 2
    assert out.metrics["policy_loss"].item() == pytest.approx(policy)
    assert out.metrics["value_loss"].item() == pytest.approx(0.5)
    assert out.metrics["entropy"].item() == pytest.approx(2.0)
    assert out.metrics["clip_fraction"].item() == 0.5
    assert out.metrics["approx_kl"].item() == pytest.approx((1.5 - 1 - math.log(1.5)) / 2)
    assert out.metrics["behaviour_weight"].item() == pytest.approx(weight)
    assert out.metrics["behaviour_capped"].item() == 0
    assert out.loss.item() == pytest.approx(policy - 0.1 * 2.0 + 0.5 * 0.5)
    assert out.metrics["loss"].item() == pytest.approx(out.loss.item())


def test_capped_and_absent_behaviour_weight() -> None:
    algorithm = get_algorithm("rloo")
    streams = replace(two_tokens(), behaviour_logprobs=torch.tensor([-3.0, -1.0]))
    inputs = inputs_of(streams, ADVANTAGES, logprobs=torch.tensor([-1.0, -1.0]))
    capped = algorithm.loss(inputs, algorithm.settings({"behaviour_cap": 2.0}))
    assert capped.loss.item() == pytest.approx(-(2 * 2 + 1 * 2) / 2)
    assert capped.metrics["behaviour_capped"].item() == 0.5
    plain = algorithm.loss(inputs, algorithm.settings({"behaviour_cap": None}))
    assert plain.loss.item() == pytest.approx(-2.0)
    assert "behaviour_weight" not in plain.metrics


def test_entropy_bonus_is_that_of_the_whole_distribution() -> None:
    """The bonus reads the vocabulary's entropy, not -log pi of the sampled token."""
    algorithm = get_algorithm("rloo")
    chosen = algorithm.settings({"entropy_coef": 1.0})
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    entropy = torch.tensor([0.7, 0.1], requires_grad=True)
    no_advantage = replace(ADVANTAGES, advantages=torch.zeros(2))
    out = algorithm.loss(inputs_of(two_tokens(), no_advantage, logprobs=logprobs, entropy=entropy), chosen)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.4)
    assert entropy.grad is not None and entropy.grad.tolist() == [-0.5, -0.5]
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0]


def test_kl_in_the_loss_pulls_towards_the_reference() -> None:
    algorithm = get_algorithm("grpo")
    chosen = algorithm.settings({"kl_coef": 0.1, "behaviour_cap": None})
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    no_advantage = replace(ADVANTAGES, advantages=torch.zeros(2))
    out = algorithm.loss(inputs_of(two_tokens(), no_advantage, logprobs=logprobs), chosen)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.1 * (math.exp(-1) - 1 + 1))
    assert out.metrics["reference_kl"].item() == pytest.approx(math.exp(-1))
    # on-policy the gradient of each token is kl_coef * (log pi - log ref) / tokens
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.05, 0.05]))
    weighted = algorithm.loss(inputs_of(two_tokens(), no_advantage, logprobs=logprobs), algorithm.settings({"kl_coef": 0.1}))
    assert weighted.loss.item() == pytest.approx(0.1 * math.exp(-1) * math.exp(-0.5))  # pi_old / mu


def test_ppo_action_uses_the_ratio_of_the_whole_action_and_the_first_value() -> None:
    algorithm = get_algorithm("ppo_action")
    chosen = algorithm.settings({"clip_high": 0.2, "value_coef": 1.0, "behaviour_cap": None})
    logprobs = torch.tensor([-1.0 + math.log(1.1), -1.0 + math.log(1.5)], requires_grad=True)
    values = torch.tensor([0.5, 7.0], requires_grad=True)
    out = algorithm.loss(inputs_of(two_tokens(), ADVANTAGES, logprobs=logprobs, values=values), chosen)
    assert out.metrics["policy_loss"].item() == pytest.approx(-1.2 * 2)  # ratio 1.65, one action
    assert out.metrics["clip_fraction"].item() == 1.0
    assert out.metrics["value_loss"].item() == pytest.approx(0.5 * 0.5**2)
    out.loss.backward()
    assert values.grad is not None and values.grad.tolist() == [-0.5, 0.0]


def test_ppo_action_credit_by_hand() -> None:
    algorithm = get_algorithm("ppo_action")
    streams = make_streams(make_trajectory([(2, 1.0), (1, 2.0)]), values=[1.0, 9.0, 4.0])
    credit = algorithm.credit(streams, algorithm.settings({"gamma_action": 0.5, "lambda_action": 0.25}))
    # last action: 2 - 4 = -2; first: 1 + .5*4 - 1 + .5*.25*-2 = 1.75; the value inside the action is not read
    assert credit.advantages.tolist() == [1.75, 1.75, -2.0]
    assert credit.returns.tolist() == [2.75, 2.75, 2.0]
    count, first, _ = algorithm.moments(credit, streams, torch.ones(3)).tolist()
    assert (count, first) == (2, -0.25)


def test_on_actions_of_one_token_all_critic_algorithms_agree() -> None:
    trajectories = [make_trajectory([(1, 1.0), (1, -0.5), (1, 2.0)]), make_trajectory([(1, 0.5)])]
    streams = make_streams(*trajectories, values=[0.3, -0.2, 0.9, 0.1])
    streams = replace(streams, old_logprobs=torch.tensor([-1.0, -2.0, -0.5, -0.1]))
    out = {}
    for name in ("poad", "ntpo", "ppo_action"):
        algorithm = get_algorithm(name)
        shared = {"gamma_action": 0.9, "lambda_action": 0.8}
        chosen = algorithm.settings({**shared, **({"gamma_token": 0.9, "lambda_token": 0.8} if name == "ntpo" else {})})
        outputs = {
            "logprobs": torch.tensor([-1.2, -1.9, -0.6, -0.3]),
            "entropy": torch.ones(4),
            "values": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        }
        loss = algorithm.loss(inputs_of(streams, algorithm.credit(streams, chosen), **outputs), chosen)
        out[name] = {key: x.item() for key, x in loss.metrics.items()}
    assert out["poad"] == pytest.approx(out["ntpo"])
    assert out["poad"] == pytest.approx(out["ppo_action"])


def test_group_credit_over_whole_trajectories_and_over_turns() -> None:
    streams = make_streams(make_trajectory([(2, 1.0), (1, 3.0)]), make_trajectory([(1, 2.0)]))
    rloo, grpo = get_algorithm("rloo"), get_algorithm("grpo")
    assert rloo.credit(streams, rloo.settings({})).advantages.tolist() == [2.0, 2.0, 2.0, -2.0]
    # returns to go: [4, 3] and [2, 0]
    turns = rloo.credit(streams, rloo.settings({"credit": "action"}))
    assert turns.advantages.tolist() == [2.0, 2.0, 3.0, -2.0]
    assert turns.returns.tolist() == [4.0, 4.0, 3.0, 2.0]
    unbiased = grpo.credit(streams, grpo.settings({"scale_by_std": False}))
    assert unbiased.advantages.tolist() == [1.0, 1.0, 1.0, -1.0]
    torch.testing.assert_close(
        grpo.credit(streams, grpo.settings({})).advantages, torch.tensor([1.0, 1.0, 1.0, -1.0]) / math.sqrt(2), atol=1e-5, rtol=0
    )


def test_missing_outputs_are_named() -> None:
    inputs = inputs_of(make_streams(make_trajectory([(2, 1.0)])), ADVANTAGES, logprobs=torch.zeros(2))
    poad, rloo = get_algorithm("poad"), get_algorithm("rloo")
    with pytest.raises(ValueError, match="the critic's values"):
        poad.loss(inputs, poad.settings({}))
    with pytest.raises(ValueError, match="the entropy"):
        rloo.loss(inputs, rloo.settings({"entropy_coef": 0.1}))
    with pytest.raises(ValueError, match="the reference's log-probs"):
        rloo.loss(inputs, rloo.settings({"kl_coef": 0.1}))
