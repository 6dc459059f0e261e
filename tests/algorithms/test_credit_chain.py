"""A chain of decisions in which one token of three decides: where do poad and ntpo put the credit?

After the case study of POAD (Wen et al. 2024): open the microwave, put the food in, close it. Each action has three
tokens: a verb, a filler that the policy is free to choose, and a noun. In the first and the last state the verb may be
"open" or "close", and only the right one leads on. Reaching the end pays 1, five actions without it pay -1.
All episodes are enumerated and weighted by their probability, and the critic is exact, so nothing here is noise.
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


def exact_values(verb_logits: torch.Tensor) -> torch.Tensor:
    """The value before each token under the current policy: V(state) before the verb, Q(state, verb) after it."""
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
            return q(state, step, 0)
        return sum(probability[state][verb] * q(state, step, verb) for verb in (0, 1))

    per_kind = [v(t.state, t.step) if t.kind == VERB else q(t.state, t.step, t.verb) for t in episodes().kinds]
    return torch.tensor(per_kind)[episodes().index]


def mean_absolute_credit(advantages: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Mean |E[A | what was seen and chosen]| over deciding tokens, and over the others."""
    everything = episodes()
    mass = torch.zeros(len(everything.kinds)).index_add(0, everything.index, weights)
    total = torch.zeros(len(everything.kinds)).index_add(0, everything.index, weights * advantages)
    decides = torch.tensor([t.decides for t in everything.kinds])
    deciding, other = (float(total[which].abs().sum() / mass[which].sum()) for which in (decides, ~decides))
    return deciding, other


def train(name: str, steps: int) -> tuple[list[float], float]:
    """Ratio of the credit on deciding tokens to that on others at each step, and the final probability of success."""
    everything = episodes()
    streams = everything.streams
    algorithm = get_algorithm(name)
    lambdas = {"lambda_token": 0.95, "lambda_action": 0.95, "behaviour_cap": None, "value_coef": 0.0}
    settings = algorithm.settings({"gamma_action": GAMMA, "gamma_token": 1.0 if name == "poad" else GAMMA, **lambdas})
    assert isinstance(settings, TokenCriticSettings)
    verb_logits = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)  # at first wrong more often than right
    filler_logits = torch.zeros(3, 2, requires_grad=True)
    ratios, index = [], torch.arange(streams.n_tokens)
    for _ in range(steps):
        logprobs = token_logprobs(verb_logits, filler_logits)
        probability = logprobs.detach().new_zeros(streams.n_trajectories).index_add(0, streams.trajectory_index, logprobs.detach()).exp()
        assert probability.sum().item() == pytest.approx(1.0, abs=1e-4)
        weights = probability[streams.trajectory_index]
        current = replace(streams, values=exact_values(verb_logits.detach()))
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


def test_poad_puts_the_credit_on_the_token_that_decides_and_ntpo_spreads_it() -> None:
    poad, success = train("poad", 25)
    ntpo, _ = train("ntpo", 25)
    assert min(poad) > 10  # exactly 0 on the others, but for rounding
    assert max(ntpo) < 10  # between 1.4 and 5.4
    assert success > 0.9
