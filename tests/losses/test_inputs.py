"""Denominators, averages, gathering, and the step from tokens to actions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from reasoner_ray.credit import Credit
from reasoner_ray.losses import Denominators, LossInputs, average, gather_inputs, to_actions, trainable_weights
from reasoner_ray.trajectory import TokenStreams
from tests.credit.streams import make_streams, make_trajectory

EXAMPLE = (make_trajectory([(2, 1.0), (1, 2.0)]), make_trajectory([(3, -1.0)]))


def example_streams() -> TokenStreams:
    return make_streams(*EXAMPLE, values=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def gather(streams: TokenStreams, index: list[int], weights: torch.Tensor, logprobs: torch.Tensor | None = None) -> LossInputs:
    k = streams.n_tokens
    ramp = torch.arange(float(k))
    chosen = torch.tensor(index, dtype=torch.int64)
    return gather_inputs(
        streams,
        Credit(advantages=10 + ramp, returns=20 + ramp),
        weights,
        chosen,
        Denominators.of(streams, weights),
        logprobs=(-ramp)[chosen] if logprobs is None else logprobs,
        entropy=ramp[chosen],
        values=(30 + ramp)[chosen],
    )


def test_denominators_count_tokens_actions_and_trajectories_that_have_weight() -> None:
    streams = example_streams()
    assert Denominators.of(streams, torch.ones(6)) == Denominators(tokens=6, actions=3, sequences=2)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert Denominators.of(streams, weights) == Denominators(tokens=2, actions=1, sequences=1)
    assert Denominators.of(streams, torch.ones(6), torch.tensor([3, 4, 5])) == Denominators(tokens=3, actions=1, sequences=1)
    assert Denominators.of(streams, torch.ones(6), torch.zeros(0, dtype=torch.int64)) == Denominators(tokens=0, actions=0, sequences=0)


def test_denominators_add_over_ranks() -> None:
    streams = example_streams()
    parts = [Denominators.of(streams, torch.ones(6), torch.tensor(index)).to_tensor() for index in ([0, 1, 2], [3, 4, 5])]
    assert Denominators.from_tensor(parts[0] + parts[1]) == Denominators.of(streams, torch.ones(6))


def test_tokens_without_a_finite_behaviour_logprob_get_no_weight() -> None:
    streams = replace(example_streams(), behaviour_logprobs=torch.tensor([-1.0, math.nan, -1.0, -math.inf, -1.0, -1.0]))
    assert trainable_weights(streams).tolist() == [1, 0, 1, 0, 1, 1]


def test_gather_takes_each_token_from_its_place() -> None:
    streams = replace(example_streams(), old_logprobs=torch.arange(6.0), ref_logprobs=-torch.arange(6.0))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    inputs = gather(streams, [5, 0, 2], weights)
    assert inputs.advantages.tolist() == [15, 10, 12]
    assert inputs.returns.tolist() == [25, 20, 22]
    assert inputs.old_logprobs.tolist() == [5, 0, 2]
    assert inputs.ref_logprobs is not None and inputs.ref_logprobs.tolist() == [-5, 0, -2]
    assert inputs.old_values is not None
    torch.testing.assert_close(inputs.old_values, torch.tensor([0.6, 0.1, 0.3]))
    assert inputs.action_start.tolist() == [False, True, True]
    assert inputs.trajectory_index.tolist() == [1, 0, 0]
    assert inputs.trajectory_lengths.tolist() == [3, 2, 2]
    assert inputs.weights.tolist() == [1, 1, 0]


def test_without_old_logprobs_the_current_policy_is_the_old_one() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = gather(example_streams(), [0, 1], torch.ones(6), logprobs)
    assert torch.equal(inputs.old_logprobs, logprobs) and not inputs.old_logprobs.requires_grad


def test_averages_by_hand() -> None:
    streams = make_streams(make_trajectory([(1, 0.0)]), make_trajectory([(3, 0.0)]))
    inputs = gather(streams, [0, 1, 2, 3], torch.ones(4))
    x = torch.tensor([4.0, 1.0, 1.0, 1.0])
    assert average(x, inputs, "token").item() == pytest.approx(7 / 4)
    assert average(x, inputs, "sequence").item() == pytest.approx((4 + 1) / 2)
    assert average(x, inputs, "constant", 10.0).item() == pytest.approx((0.4 + 0.3) / 2)


def test_a_step_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="trains on no token"):
        average(torch.ones(2), gather(example_streams(), [0, 1], torch.zeros(6)))


def test_an_empty_microbatch_adds_nothing_but_can_be_differentiated() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    inputs = gather(example_streams(), [], torch.ones(6), logprobs)
    for part in (inputs, to_actions(inputs)):
        total = average(part.logprobs, part)
        assert total.item() == 0
        assert torch.autograd.grad(total, logprobs)[0].shape == (0,)


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5], [4, 2, 1, 5, 0, 3]], ids=["in order", "interleaved"])
def test_actions_by_hand(index: list[int]) -> None:
    streams = replace(example_streams(), old_logprobs=torch.arange(6.0), ref_logprobs=2 * torch.arange(6.0))
    actions = to_actions(gather(streams, index, torch.ones(6)))
    assert actions.logprobs.tolist() == [-1, -2, -12]
    assert actions.old_logprobs.tolist() == [1, 2, 12]
    assert actions.ref_logprobs is not None and actions.ref_logprobs.tolist() == [2, 4, 24]
    assert actions.behaviour_logprobs.tolist() == [-1, -0.5, -1.5]
    assert actions.entropy is not None and actions.entropy.tolist() == [1, 2, 12]
    assert actions.values is not None and actions.values.tolist() == [30, 32, 33]
    assert actions.advantages.tolist() == [10, 12, 13]
    assert actions.trajectory_index.tolist() == [0, 0, 1]
    assert actions.trajectory_lengths.tolist() == [2, 2, 1]
    assert actions.token_denominator == 3


def test_one_dropped_token_drops_its_action() -> None:
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    actions = to_actions(gather(example_streams(), [0, 1, 2, 3, 4, 5], weights))
    assert actions.weights.tolist() == [0, 1, 1]
    assert actions.trajectory_lengths.tolist() == [1, 1, 1]
    assert actions.token_denominator == 2


def test_a_split_action_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be split"):
        to_actions(gather(example_streams(), [1, 2], torch.ones(6)))
