"""A chain of decisions in which one token of three decides: where do poad and ntpo put the credit?

After the case study of POAD (Wen et al. 2024): open the microwave, put the food in, close it. Each action has three
tokens: a verb, a filler that the policy is free to choose, and a noun. In the first and the last state the verb may be
"open" or "close", and only the right one leads on. Reaching the end pays 1, five actions without it pay -1.
All episodes are enumerated and weighted by their probability, and the critic is exact, so nothing here is noise.

The paper says that poad puts the credit on the deciding token and ntpo does not. That does not hold as stated: with an exact critic of
its own ntpo does as well as poad, since that critic has absorbed the discount inside an action; with the critic of the other's discount
both spread the credit. What ntpo's discount costs is elsewhere: the same action said in more tokens is worth less.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from reasoner_ray.algorithms import TokenCriticSettings, get_algorithm
from reasoner_ray.losses import Denominators, gather_inputs
from reasoner_ray.trajectory import TokenStreams
from tests.credit.streams import make_streams, make_trajectory

RIGHT = (0, None, 1)
"""The verb that leads on from each state; None where there is only one verb."""
LIMIT, GAMMA = 5, 0.95
VERB, FILLER, NOUN = range(3)


@dataclass(frozen=True)
class Token:
    """One token of an episode."""

    state: int
    step: int
    kind: int
    verb: int
    choice: int

    @property
    def decides(self) -> bool:
        return self.kind == VERB and RIGHT[self.state] is not None


@dataclass(frozen=True)
class Episodes:
    """Every episode as streams, the distinct tokens in them, and which of these each stream entry is."""

    streams: TokenStreams
    kinds: tuple[Token, ...]
    index: torch.Tensor  # int64 [K] into kinds


@cache
def episodes() -> Episodes:
    trajectories, kinds, index = [], dict[Token, int](), []
    for verbs in itertools.product((0, 1), repeat=LIMIT):
        path, state = [], 0
        for step in range(LIMIT):
            verb = 0 if RIGHT[state] is None else verbs[step]
            path.append((state, step, verb))
            state += RIGHT[state] in (None, verb)
            if state == len(RIGHT):
                break
        # A verb that was not needed (one choice, or after the end) must be 0, so that each path comes once.
        if any(verbs[step] for step in range(LIMIT) if step >= len(path) or RIGHT[path[step][0]] is None):
            continue
        for fillers in itertools.product((0, 1), repeat=len(path)):
            outcome = 1.0 if state == len(RIGHT) else -1.0
            trajectories.append(make_trajectory([(3, 0.0)] * (len(path) - 1) + [(3, outcome)]))
            for (s, step, verb), filler in zip(path, fillers, strict=True):
                for kind, choice in ((VERB, verb), (FILLER, filler), (NOUN, 0)):
                    index.append(kinds.setdefault(Token(s, step, kind, verb, choice), len(kinds)))
    return Episodes(make_streams(*trajectories), tuple(kinds), torch.tensor(index))


def token_logprobs(verb_logits: torch.Tensor, filler_logits: torch.Tensor) -> torch.Tensor:
    """log pi of each token of every episode; logits are [state, choice]."""
    tables = {VERB: torch.log_softmax(verb_logits, -1), FILLER: torch.log_softmax(filler_logits, -1)}
    certain = torch.zeros(())
    per_kind = [tables[t.kind][t.state, t.choice] if t.decides or t.kind == FILLER else certain for t in episodes().kinds]
    return torch.stack(per_kind)[episodes().index]


def exact_values(verb_logits: torch.Tensor, gamma_token: float = 1.0) -> torch.Tensor:
    """The value before each token under the current policy, which falls by ``gamma_token`` for each token of the action still to come.

    At 1 it is V(state) before the verb and Q(state, verb) after it.
    """
    probability = torch.softmax(verb_logits, -1).tolist()

    @cache
    def q(state: int, step: int, verb: int) -> float:
        following = state + (RIGHT[state] in (None, verb))
        if following == len(RIGHT):
            return 1.0
        return -1.0 if step == LIMIT - 1 else GAMMA * v(following, step + 1)

    @cache
    def v(state: int, step: int) -> float:
        if RIGHT[state] is None:
            return gamma_token**NOUN * q(state, step, 0)
        return gamma_token**NOUN * sum(probability[state][verb] * q(state, step, verb) for verb in (0, 1))

    def after_verb(token: Token) -> float:
        return gamma_token ** (NOUN - token.kind) * q(token.state, token.step, token.verb)

    per_kind = [v(t.state, t.step) if t.kind == VERB else after_verb(t) for t in episodes().kinds]
    return torch.tensor(per_kind)[episodes().index]


def mean_absolute_credit(advantages: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Mean |E[A | what was seen and chosen]| over deciding tokens, and over the others."""
    everything = episodes()
    mass = torch.zeros(len(everything.kinds)).index_add(0, everything.index, weights)
    total = torch.zeros(len(everything.kinds)).index_add(0, everything.index, weights * advantages)
    decides = torch.tensor([t.decides for t in everything.kinds])
    deciding, other = (float(total[which].abs().sum() / mass[which].sum()) for which in (decides, ~decides))
    return deciding, other


DISCOUNT = {"poad": 1.0, "ntpo": GAMMA}
"""From token to token of an action."""


def train(name: str, critic: str, steps: int) -> tuple[list[float], float]:
    """Ratio of the credit on deciding tokens to that on others at each step, and the final probability of success.

    ``critic`` names the algorithm whose values the exact critic gives.
    """
    everything = episodes()
    streams = everything.streams
    algorithm = get_algorithm(name)
    lambdas = {"lambda_token": 0.95, "lambda_action": 0.95, "behaviour_cap": None, "value_coef": 0.0}
    settings = algorithm.settings({"gamma_action": GAMMA, "gamma_token": DISCOUNT[name], **lambdas})
    assert isinstance(settings, TokenCriticSettings)
    verb_logits = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)  # at first wrong more often than right
    filler_logits = torch.zeros(3, 2, requires_grad=True)
    ratios, index = [], torch.arange(streams.n_tokens)
    for _ in range(steps):
        logprobs = token_logprobs(verb_logits, filler_logits)
        probability = logprobs.detach().new_zeros(streams.n_trajectories).index_add(0, streams.trajectory_index, logprobs.detach()).exp()
        assert probability.sum().item() == pytest.approx(1.0, abs=1e-4)
        weights = probability[streams.trajectory_index]
        current = replace(streams, values=exact_values(verb_logits.detach(), DISCOUNT[critic]))
        credit = algorithm.credit(current, settings)
        deciding, other = mean_absolute_credit(credit.advantages, weights)
        ratios.append(deciding / max(other, 1e-9))
        counts = Denominators(tokens=1.0, actions=1.0, sequences=1.0)  # the weights are probabilities: sums are means
        values = current.values
        inputs = gather_inputs(current, credit, weights, index, counts, logprobs=logprobs, entropy=None, values=values)
        gradients = torch.autograd.grad(algorithm.loss(inputs, settings).loss, [verb_logits, filler_logits])
        with torch.no_grad():
            verb_logits -= gradients[0]
            filler_logits -= gradients[1]
    won = torch.tensor([t.state == 2 and t.kind == VERB and t.choice == RIGHT[2] for t in everything.kinds])
    return ratios, float(weights[won[everything.index]].sum())


@pytest.mark.parametrize("name", ["poad", "ntpo"])
def test_with_its_own_critic_the_credit_lies_on_the_token_that_decides(name: str) -> None:
    ratios, success = train(name, name, 25)
    assert min(ratios) > 10  # exactly 0 on the others, but for rounding
    assert success > 0.9


@pytest.mark.parametrize(("name", "critic"), [("poad", "ntpo"), ("ntpo", "poad")])
def test_with_the_critic_of_another_discount_it_spreads(name: str, critic: str) -> None:
    ratios, _ = train(name, critic, 25)
    assert 1 < max(ratios) < 10


@pytest.mark.parametrize(("name", "tokens_between"), [("poad", 0), ("ntpo", 1)])
def test_under_ntpo_the_same_action_in_more_tokens_is_worth_less(name: str, tokens_between: int) -> None:
    """What followed an action, 1 at the end of the next one, as the algorithm sees it from the first action's first token."""
    short, long = [(3, 0.0), (3, 1.0)], [(5, 0.0), (3, 1.0)]
    streams = make_streams(make_trajectory(short), make_trajectory(long), values=[0.0] * 14)
    algorithm = get_algorithm(name)
    settings = algorithm.settings({"gamma_action": GAMMA, "gamma_token": DISCOUNT[name], "lambda_token": 1.0, "lambda_action": 1.0})
    assert isinstance(settings, TokenCriticSettings)
    returns = algorithm.credit(streams, settings).returns
    # One step lies between the two actions; of the other tokens, 2 + 2 in the short wording and 4 + 2 in the long one.
    assert float(returns[0]) == pytest.approx(GAMMA ** (1 + 4 * tokens_between))
    assert float(returns[6]) == pytest.approx(GAMMA ** (1 + 6 * tokens_between))


def test_the_exact_values_fall_in_the_same_way() -> None:
    """Three certain actions of three tokens: poad's start is worth gamma^2, ntpo's gamma^2 times gamma^2 for each action."""
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    assert float(exact_values(sure, DISCOUNT["poad"])[0]) == pytest.approx(GAMMA**2)
    assert float(exact_values(sure, DISCOUNT["ntpo"])[0]) == pytest.approx(GAMMA**8)
