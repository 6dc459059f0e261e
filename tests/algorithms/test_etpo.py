"""ETPO on problems small enough to be solved exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from reasoner_ray.algorithms import EtpoSettings, describe_algorithm, get_algorithm
from reasoner_ray.config import parse_config
from reasoner_ray.credit import Credit
from reasoner_ray.errors import ConfigError
from reasoner_ray.losses import Denominators, LossInputs, gather_inputs
from reasoner_ray.trajectory import Status, TokenStreams
from tests.credit.streams import make_streams, make_trajectory

WORDS, BETA, GAMMA = 3, 0.3, 0.9
STARTS = (0, 4, 8)
"""The state before the first token of the first action, and of the second after either observation; the three states
before an action's second token follow each, one for each first word."""


def observation(first: int, second: int) -> int:
    """What the first action leads to."""
    return 1 + (first == second)


class Toy:
    """Two actions of two words each; all 81 episodes, and the soft optimum."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        rewards = torch.randn(3, WORDS, WORDS, generator=generator, dtype=torch.float64)  # [start, first word, second word]
        self.rho = torch.randn(12, WORDS, generator=generator, dtype=torch.float64).log_softmax(-1)
        trajectories, places = [], []
        for a, b, c, d in itertools.product(range(WORDS), repeat=4):
            then = observation(a, b)
            trajectories.append(make_trajectory([(2, rewards[0, a, b].item()), (2, rewards[then, c, d].item())]))
            places += [(0, a), (1 + a, b), (STARTS[then], c), (STARTS[then] + 1 + c, d)]
        self.streams = make_streams(*trajectories)
        self.state, self.word = torch.tensor(places).unbind(1)
        self.q = torch.zeros(12, WORDS, dtype=torch.float64)
        for i in (1, 2, 0):  # the second action's states first
            for a in range(WORDS):
                later = [0.0 if i else GAMMA * self.value(STARTS[observation(a, b)]) for b in range(WORDS)]
                self.q[STARTS[i] + 1 + a] = rewards[i, a] + torch.tensor(later)
                self.q[STARTS[i], a] = self.value(STARTS[i] + 1 + a)

    def value(self, state: int) -> float:
        """beta log sum rho exp(Q / beta): the soft-optimal value."""
        return BETA * torch.logsumexp(self.rho[state] + self.q[state] / BETA, 0).item()

    def policy(self) -> torch.Tensor:
        """rho exp(Q / beta) / Z, [state, word]."""
        return (self.rho + self.q / BETA).softmax(-1)


def inputs_of(streams: TokenStreams, credit: Credit, q: torch.Tensor, expected_q: torch.Tensor, kl: torch.Tensor) -> LossInputs:
    weights = torch.ones(streams.n_tokens)
    counts = Denominators.of(streams, weights)
    index, logprobs = torch.arange(streams.n_tokens), torch.zeros(streams.n_tokens)
    outputs = {"logprobs": logprobs, "entropy": None, "values": None, "q": q, "expected_q": expected_q, "kl": kl}
    return gather_inputs(streams, credit, weights, index, counts, **outputs)


def test_a_table_learns_the_soft_optimum() -> None:
    """Every episode once an update, whatever the policy: Q learning does not ask who acted."""
    toy, etpo = Toy(), get_algorithm("etpo")
    chosen = etpo.settings({"beta": BETA, "gamma_action": GAMMA, "target_decay": 0.8})
    rho = toy.rho.float()
    logits, q = rho.clone().requires_grad_(), torch.zeros(12, WORDS, requires_grad=True)
    target = q.detach().clone()
    optimizer = torch.optim.Adam([logits, q], lr=0.03)
    for _ in range(1000):
        log_pi = logits.log_softmax(-1)
        kl = (log_pi.exp() * (log_pi - rho)).sum(-1)[toy.state]
        means = [(log_pi.exp() * x).sum(-1)[toy.state] for x in (q.detach(), target)]
        streams = replace(toy.streams, target_q=means[1].detach(), kl=kl.detach())
        inputs = inputs_of(streams, etpo.credit(streams, chosen), q[toy.state, toy.word], means[0], kl)
        optimizer.zero_grad()
        etpo.loss(inputs, chosen).loss.backward()
        optimizer.step()
        target.lerp_(q.detach(), 1 - etpo.target_decay(chosen))
    assert (logits.softmax(-1) - toy.policy()).abs().max() < 1e-2
    assert (q - toy.q).abs().max() < 1e-2
    assert (toy.policy() - toy.rho.exp()).abs().max() > 0.3, "the optimum is far from where the policy began"


def soft_streams(status: Status = Status.FINISHED, *, unended: bool = False) -> TokenStreams:
    """An action of three tokens that earns 1, one of a token that earns 2; an episode of one token that earns 4."""
    streams = make_streams(make_trajectory([(3, 1.0), (1, 2.0)], status=status, unended=unended), make_trajectory([(1, 4.0)]))
    return replace(streams, target_q=torch.tensor([5.0, 3.0, 7.0, 0.5, 9.0]), kl=torch.tensor([1.0, 0.2, 0.6, 0.1, 2.0]))


@pytest.mark.parametrize("status", [Status.FINISHED, Status.TRUNCATED])
def test_targets_by_hand(status: Status) -> None:
    etpo = get_algorithm("etpo")
    credit = etpo.credit(soft_streams(status), etpo.settings({"beta": 0.5, "gamma_action": 0.8}))
    # V = 4.5, 2.9, 6.7, 0.45, 8: inside the action the next V as it is, at its end R + gamma V, at the end R alone
    assert credit.returns.tolist() == pytest.approx([2.9, 6.7, 1 + 0.8 * 0.45, 2.0, 4.0])


def test_an_episode_that_only_our_limit_ended_goes_on_with_the_last_value_known() -> None:
    etpo = get_algorithm("etpo")
    settings = etpo.settings({"beta": 0.5, "gamma_action": 0.8})
    credit = etpo.credit(soft_streams(Status.TRUNCATED, unended=True), settings)
    assert credit.returns.tolist() == pytest.approx([2.9, 6.7, 1 + 0.8 * 0.45, 2 + 0.8 * 0.45, 4.0])
    # an action of several tokens: the state before its first, V = 4.5, not the one before its last
    cut = make_streams(make_trajectory([(3, 1.0)], status=Status.TRUNCATED, unended=True))
    cut = replace(cut, target_q=torch.tensor([5.0, 3.0, 7.0]), kl=torch.tensor([1.0, 0.2, 0.6]))
    assert etpo.credit(cut, settings).returns.tolist() == pytest.approx([2.9, 6.7, 1 + 0.8 * 4.5])


def test_targets_that_look_to_the_outcome_by_hand() -> None:
    etpo = get_algorithm("etpo")
    all_the_way = etpo.settings({"beta": 0.5, "gamma_action": 0.8, "lambda_token": 1.0, "lambda_action": 1.0})
    # beta KL = .5, .1, .3, .05: y4 = 2, y3 = 1 + .8 (y4 - .05), y2 = y3 - .3, y1 = y2 - .1; what Q' said plays no part
    assert etpo.credit(soft_streams(), all_the_way).returns.tolist() == pytest.approx([2.16, 2.26, 2.56, 2.0, 4.0])
    half = etpo.settings({"beta": 0.5, "gamma_action": 0.8, "lambda_token": 0.5})
    # y3 = 1 + .8 * .45, y2 = (6.7 + y3 - .3) / 2, y1 = (2.9 + y2 - .1) / 2
    assert etpo.credit(soft_streams(), half).returns.tolist() == pytest.approx([3.34, 3.88, 1.36, 2.0, 4.0])


def test_loss_and_metrics_by_hand() -> None:
    etpo, streams = get_algorithm("etpo"), soft_streams()
    credit = Credit(advantages=torch.zeros(5), returns=torch.tensor([1.0, 2.0, 3.0, 2.0, 4.0]))
    q = torch.tensor([0.0, 2.0, 1.0, 2.0, -20.0], requires_grad=True)
    expected_q, kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True), torch.full((5,), 2.0, requires_grad=True)
    out = etpo.loss(inputs_of(streams, credit, q, expected_q, kl), etpo.settings({"beta": 0.5}))
    critic = (0.5 * 1 + 0 + 0.5 * 4 + 0 + 10 * (24 - 5)) / 5
    assert out.loss.item() == pytest.approx(0.5 * 2 - 3 + critic)
    shown = {"policy_loss": -2.0, "value_loss": critic, "reference_kl": 2.0, "expected_q": 3.0, "q": -3.0, "approx_kl": 0.0}
    assert {name: out.metrics[name].item() for name in shown} == pytest.approx(shown)
    gradients = torch.autograd.grad(out.loss, [q, expected_q, kl])
    assert gradients[0].tolist() == pytest.approx([-0.2, 0, -0.4, 0, -2.0])
    assert gradients[1].tolist() == pytest.approx([-0.2] * 5) and gradients[2].tolist() == pytest.approx([0.1] * 5)


def test_settings_are_those_that_have_an_effect() -> None:
    etpo = get_algorithm("etpo")
    chosen = etpo.settings({})
    assert isinstance(chosen, EtpoSettings)
    assert (chosen.beta, chosen.gamma_action, chosen.huber_delta, etpo.target_decay(chosen)) == (0.01, 0.99, 10.0, 0.995)
    for useless in ("clip_low", "clip_high", "behaviour_cap", "entropy_coef", "kl_coef", "kl_in", "kl_estimator", "normalize_advantages"):
        with pytest.raises(ConfigError, match=f"{useless}: unknown setting of etpo"):
            etpo.settings({useless: 0.1})
    assert not (etpo.wants_reference(chosen) or etpo.wants_old_logprobs(chosen))
    assert etpo.wants_bootstrap(chosen) == "none"
    text = describe_algorithm("etpo")
    for part in ("Estimator:", "When:", "How it fails:", "Deviations:", "soft critic (learner.critic=soft_q)", "beta", "arXiv"):
        assert part in text
    assert "clip_low" not in text and max(len(line) for line in text.splitlines()) <= 180


def test_a_job_with_defaults_but_the_critic_is_valid() -> None:
    assert parse_config({"algorithm": {"name": "etpo"}, "learner": {"critic": "soft_q"}}).learner.critic == "soft_q"


def test_what_the_soft_critic_gives_is_needed() -> None:
    etpo, streams = get_algorithm("etpo"), make_streams(make_trajectory([(2, 1.0)]))
    with pytest.raises(ValueError, match="target_q"):
        etpo.credit(streams, etpo.settings({}))
    inputs = replace(inputs_of(streams, Credit(advantages=torch.zeros(2), returns=torch.zeros(2)), *torch.zeros(3, 2)), q=None)
    with pytest.raises(ValueError, match="expected_q"):
        etpo.loss(inputs, etpo.settings({}))
