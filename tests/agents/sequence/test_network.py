"""The network against transformers' own Decision Transformer, the heads against torch.distributions, and what padding must not do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from reasoner_ray.agents.sequence.heads import EDGE, Head, squashed_normal
from reasoner_ray.agents.sequence.network import DecisionTransformer
from reasoner_ray.agents.sequence.player import Context
from reasoner_ray.agents.sequence.settings import OnlineConfig, SequenceConfig
from reasoner_ray.agents.sequence.spaces import Interface
from reasoner_ray.agents.sequence.windows import NO_ACTION, Windows

NUMBERS = Interface(state=3, choices=0, low=(-1.0, -1.0), high=(1.0, 1.0))
CHOICES = Interface(state=3, choices=4)


def network(interface: Interface = NUMBERS, **settings: Any) -> DecisionTransformer:
    torch.manual_seed(0)
    return DecisionTransformer(
        interface, SequenceConfig(**{"width": 16, "blocks": 2, "heads": 2, "context": 5} | settings), horizon=9
    ).eval()


def windows(interface: Interface = NUMBERS, rows: int = 2, context: int = 5, padded: int = 2) -> Windows:
    """The first row begins with ``padded`` steps of padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, context, dtype=torch.bool)
    mask[0, :padded] = False
    draw = {"generator": generator}
    actions = torch.rand(rows, context, interface.action, **draw) * 2 - 1
    times = torch.arange(context).expand(rows, -1).clone()
    return Windows(
        states=torch.randn(rows, context, interface.state, **draw),
        actions=actions,
        returns=torch.rand(rows, context, **draw),
        times=times,
        mask=mask,
    )


def test_the_network_is_transformers_decision_transformer() -> None:
    """Its weights, copied over by name, give the same actions; its position embedding, which the paper removes, is set to 0."""
    ours = network()
    oracle = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=3,
            act_dim=2,
            hidden_size=16,
            max_ep_len=9,
            n_layer=2,
            n_head=2,
            n_inner=64,
            activation_function="relu",
            n_positions=15,
            vocab_size=1,
        )
    ).eval()
    given, missing = ours.state_dict(), []
    for name, tensor in oracle.state_dict().items():
        source = name.replace("encoder.", "trunk.", 1).replace("predict_action.0", "head.layer")
        if source in given:
            tensor.copy_(given[source])
        else:
            missing.append(name)
    assert missing == [f"predict_{what}.{part}" for what in ("state", "return") for part in ("weight", "bias")], (
        "heads that are not trained"
    )
    seen = windows()
    with torch.no_grad():
        expected = oracle(
            states=seen.states,
            actions=seen.actions,
            returns_to_go=seen.returns[..., None],
            timesteps=seen.times,
            attention_mask=seen.mask.long(),
        ).action_preds
        said = ours(seen)
    assert (said - expected)[seen.mask].abs().max() < 1e-5
    assert expected[seen.mask].std() > 1e-3, "and not because both say nothing"


def test_a_step_sees_the_past_and_not_what_comes_after() -> None:
    ours, seen = network(), windows(padded=0)
    with torch.no_grad():
        before = ours(seen)
        seen.actions[:, 3], seen.states[:, 4], seen.returns[:, 4] = 0.7, 9.0, 5.0  # the action at 3 is known from 4 on
        after = ours(seen)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6) and not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"variant": "bc"}, {"time_embedding": False}])
def test_padding_is_never_looked_at(settings: dict[str, Any]) -> None:
    ours, seen = network(**settings), windows(padded=3)
    with torch.no_grad():
        before = ours(seen)
        for part, value in ((seen.states, 100.0), (seen.actions, -10.0), (seen.returns, 50.0)):
            part[0, :3] = value
        after = ours(seen)
        assert torch.allclose(before[seen.mask], after[seen.mask], atol=1e-5)
        short = windows(padded=3)
        alone = ours(short.rows(slice(0, 1)))
        cut = Windows(**{name: getattr(short, name)[:1, 3:] for name in Windows.__dataclass_fields__})
        assert torch.allclose(alone[0, 3:], ours(cut)[0], atol=1e-5), "a short window says what a padded one does"


def test_cloning_does_not_see_returns() -> None:
    ours, seen = network(variant="bc"), windows()
    with torch.no_grad():
        before = ours(seen)
        seen.returns[:] = 77.0
        assert torch.equal(before, ours(seen))
    assert not any("return" in name for name in ours.state_dict())


def test_only_its_own_weights_learn() -> None:
    names = set(network().trained())
    assert not names & {"trunk.wpe.weight", "trunk.wte.weight"} and {"embed_timestep.weight", "head.layer.weight"} <= names
    assert not network().trunk.wpe.weight.any()


def test_the_squashed_normal_by_hand() -> None:
    """log pi(a) = log N(x; mu, std) - sum log(1 - a^2), x = atanh(a); log_std = -5 + 3.5 (tanh(raw) + 1)."""
    out = torch.tensor([[0.3, -0.2, 0.1, -0.4]], dtype=torch.float64)
    actions = torch.tensor([[0.5, -0.9]], dtype=torch.float64)
    mean, std = out[:, :2], (-5 + 3.5 * (out[:, 2:].tanh() + 1)).exp()
    x = actions.atanh()
    expected = (torch.distributions.Normal(mean, std).log_prob(x) - (1 - actions**2).log()).sum(-1)
    torch.testing.assert_close(squashed_normal(out).log_prob(actions), expected)
    head = Head(4, NUMBERS, stochastic=True)
    torch.testing.assert_close(head.loss(out, actions), -expected)
    assert head.loss(out, torch.ones_like(actions)).isfinite().all(), "an action at its bound"
    torch.testing.assert_close(head.loss(out, torch.ones_like(actions)), head.loss(out, torch.full_like(actions, 1 - EDGE)))


def test_the_sampled_entropy_is_that_of_the_distribution() -> None:
    """Its mean over many samples, against the integral -int p log p on a grid."""
    head = Head(4, Interface(state=3, choices=0, low=(-1.0,), high=(1.0,)), stochastic=True)
    out = torch.tensor([0.4, 0.2], dtype=torch.float64)
    grid = torch.linspace(-1 + 1e-7, 1 - 1e-7, 400_001, dtype=torch.float64)
    logp = squashed_normal(out.expand(len(grid), 2)).log_prob(grid[:, None])
    exact = float(torch.trapezoid(-logp.exp() * logp, grid))
    torch.manual_seed(0)
    assert float(head.entropy(out.expand(40_000, 2)).mean()) == pytest.approx(exact, abs=0.02)
    raw = torch.tensor([[0.4, 0.2]], requires_grad=True)
    head.entropy(raw.expand(64, 2)).mean().backward()
    assert raw.grad is not None and raw.grad.abs().min() > 0, "it has a gradient"


def test_choices_and_tanh_by_hand() -> None:
    head = Head(4, CHOICES, stochastic=True)
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    chosen = F.one_hot(torch.tensor([1]), 4).float()
    policy = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(head.loss(logits, chosen), -policy.log_prob(torch.tensor([1])))
    torch.testing.assert_close(head.entropy(logits), policy.entropy())
    assert head.act(logits, greedy=True).tolist() == chosen.tolist()
    drawn = head.act(logits.expand(20_000, 4), greedy=False, generator=torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(drawn, policy.probs[0], atol=0.015, rtol=0)
    tanh = Head(4, NUMBERS, stochastic=False)
    assert not tanh.stochastic and tanh.loss(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx((0.25 + 1) / 2)
    with pytest.raises(ValueError, match="no entropy"):
        tanh.entropy(logits)
    gaussian = Head(4, NUMBERS, stochastic=True)
    out = torch.tensor([[0.5, -0.5, 0.0, 0.0]])
    torch.testing.assert_close(gaussian.act(out, greedy=True), torch.tensor([[math.tanh(0.5), math.tanh(-0.5)]]))
    many = gaussian.act(out.expand(20_000, 4), greedy=False, generator=torch.Generator().manual_seed(0))
    assert many.abs().max() <= 1 and float(many[:, 0].atanh().std()) == pytest.approx(math.exp(-1.5), rel=0.03)


@pytest.mark.parametrize(("interface", "drawn"), [(NUMBERS, False), (NUMBERS, True), (CHOICES, False)])
def test_acting_step_by_step_is_what_training_sees(interface: Interface, drawn: bool) -> None:
    """The rolling context of the players holds the windows that are cut from the finished trajectory."""
    ours = network(interface, online=OnlineConfig(target=1.0) if drawn else None, return_scale=2.0)
    ours.measure_in(np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0, 2.0, 2.0], np.float32))
    rng = np.random.default_rng(0)
    states, rewards = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    encoded = rng.uniform(-1, 1, (8, interface.action)).astype(np.float32)
    from reasoner_ray.agents.sequence.recordings import Recording, returns_to_go
    from reasoner_ray.agents.sequence.windows import stack

    whole = Recording(states=states, actions=encoded, rewards=rewards, last=states[-1], truncated=False)
    context, asked = Context(1, 5, interface, ours.units), returns_to_go(rewards)
    for time in range(8):
        now = context.push([0], states[time : time + 1], asked[time : time + 1], time)
        assert (now.actions[0, -1] == (0.0 if interface.choices else NO_ACTION)).all(), "its own action is not known yet"
        context.acted([0], encoded[time : time + 1])
        first = max(0, time - 4)
        so_far = replace(whole, states=states[: time + 1], actions=encoded[: time + 1], rewards=rewards[: time + 1])
        cut = stack([ours.units.window(so_far, first, 5)])
        cut.returns[0, 4 - min(time, 4) :] = torch.from_numpy(asked[first : time + 1] / 2)
        cut.actions[0, -1] = now.actions[0, -1]
        for name in Windows.__dataclass_fields__:
            torch.testing.assert_close(getattr(now, name), getattr(cut, name))
        assert torch.equal(ours.act(now, greedy=True), ours.act(cut, greedy=True))
