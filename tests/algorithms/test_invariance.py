"""A loss, its gradients and its metrics do not depend on order, padding, or the cut into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.algorithms import algorithm_names, get_algorithm
from reasoner_ray.credit import mean_std, whiten
from reasoner_ray.losses import Denominators, gather_inputs, trainable_weights
from reasoner_ray.trajectory import TokenStreams, Trajectory
from tests.credit.streams import random_streams, trajectory_lists

ALL_TERMS = {"kl_coef": 0.3, "entropy_coef": 0.05}
VARIANTS = [
    (name, {**ALL_TERMS, **extra})
    for name in ("poad", "ntpo", "ppo_action", "grpo", "rloo")
    for extra in ({}, {"kl_in": "reward", "loss_average": "sequence", "normalize_advantages": True}, {"loss_average": "constant"})
]


@dataclass
class Policy:
    """One free number for each log-prob, entropy and value: the gradients are those of a model's outputs."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, streams: TokenStreams) -> Policy:
        generator = torch.Generator().manual_seed(7)
        assert streams.old_logprobs is not None
        noise = torch.randn(3, streams.n_tokens, generator=generator)
        return cls(*[x.clone().requires_grad_() for x in (streams.old_logprobs + 0.3 * noise[0], noise[1].abs(), noise[2])])


def total(
    streams: TokenStreams, name: str, raw: dict[str, object], parts: list[torch.Tensor]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Summed metrics, and the gradients, of one step whose tokens come in ``parts``."""
    algorithm = get_algorithm(name)
    chosen = algorithm.settings(raw)
    weights = trainable_weights(streams)
    credit = algorithm.credit(streams, chosen)
    if chosen.normalize_advantages:
        credit = replace(credit, advantages=whiten(credit.advantages, *mean_std(algorithm.moments(credit, streams, weights))))
    counts = torch.stack([Denominators.of(streams, weights, index).to_tensor() for index in parts]).sum(0)
    policy, metrics = Policy.of(streams), dict[str, float]()
    for index in parts:
        outputs = {"logprobs": policy.logprobs[index], "entropy": policy.entropy[index], "values": policy.values[index]}
        inputs = gather_inputs(streams, credit, weights, index, Denominators.from_tensor(counts), **outputs)
        out = algorithm.loss(inputs, chosen)
        out.loss.backward()
        for key, x in out.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + x.item()
    leaves = [policy.logprobs, policy.entropy, policy.values]
    return metrics, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_same(a: tuple[dict[str, float], list[torch.Tensor]], b: tuple[dict[str, float], list[torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5, rel=1e-5)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_every_algorithm_is_covered() -> None:
    assert {name for name, _ in VARIANTS} <= set(algorithm_names())


@pytest.mark.parametrize(("name", "raw"), VARIANTS, ids=str)
@settings(deadline=None, max_examples=8)
@given(trajectories=trajectory_lists(), seed=st.integers(0, 1000))
def test_cut_and_order_do_not_matter(name: str, raw: dict[str, object], trajectories: list[Trajectory], seed: int) -> None:
    streams = random_streams(trajectories, seed)
    whole = torch.arange(streams.n_tokens)
    random = np.random.default_rng(seed)
    owner = torch.from_numpy(random.integers(0, 3, streams.n_trajectories))[streams.trajectory_index]
    parts = [whole[owner == part] for part in range(3)]  # whole trajectories, one part may be empty
    shuffled = [part[torch.from_numpy(random.permutation(len(part)))] for part in parts]
    assert_same(total(streams, name, raw, [whole]), total(streams, name, raw, shuffled))


@pytest.mark.parametrize(("name", "raw"), VARIANTS, ids=str)
@settings(deadline=None, max_examples=8)
@given(trajectories=trajectory_lists(), seed=st.integers(0, 1000))
def test_order_of_the_trajectories_does_not_matter(name: str, raw: dict[str, object], trajectories: list[Trajectory], seed: int) -> None:
    """Credit, whitening and loss on a permuted set of trajectories."""
    streams = random_streams(trajectories, seed)
    order = np.random.default_rng(seed).permutation(len(trajectories))
    place = torch.cat([torch.arange(streams.n_tokens)[streams.trajectory_index == i] for i in order.tolist()])
    moved = random_streams([trajectories[i] for i in order], seed)
    per_token = ("values", "old_logprobs", "behaviour_logprobs", "ref_logprobs")
    moved = replace(moved, **{key: getattr(streams, key)[place] for key in per_token})
    moved = replace(moved, bootstrap=streams.bootstrap[order.tolist()] if streams.bootstrap is not None else None)
    algorithm = get_algorithm(name)
    chosen = algorithm.settings(raw)
    straight, permuted = algorithm.credit(streams, chosen), algorithm.credit(moved, chosen)
    torch.testing.assert_close(permuted.advantages, straight.advantages[place], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted.returns, straight.returns[place], atol=1e-5, rtol=1e-5)
    weights = torch.ones(streams.n_tokens)
    torch.testing.assert_close(
        algorithm.moments(straight, streams, weights), algorithm.moments(permuted, moved, weights), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(("name", "raw"), VARIANTS, ids=str)
def test_dropped_tokens_leave_no_trace(name: str, raw: dict[str, object]) -> None:
    """Tokens whose behaviour log-prob is NaN get gradient 0, and everything stays finite."""
    from tests.credit.streams import make_trajectory

    streams = random_streams([make_trajectory([(2, 1.0), (3, 0.5)]), make_trajectory([(4, -1.0)]), make_trajectory([(1, 2.0)])])
    behaviour = streams.behaviour_logprobs.clone()
    behaviour[5:9] = float("nan")  # the whole second trajectory
    metrics, gradients = total(replace(streams, behaviour_logprobs=behaviour), name, raw, [torch.arange(streams.n_tokens)])
    assert all(np.isfinite(x) for x in metrics.values())
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient[5:9] == 0).all()
    assert (gradients[0] != 0).any()
