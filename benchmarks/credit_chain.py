"""Where do POAD and NTPO put the credit? The case study of POAD (CreditChain) with a real language model and learned critics.

The policy is the language model as it is, choosing from the environment's lists; only the critic learns, a head on its hidden
states, through the learner that trains (`learner.lr` next to nothing). All episodes that differ are enumerated and weighted by
their probability, so what is left of noise is the critics' own. Recorded, for each algorithm with the critic that it learned
itself and with the one that the other learned: mean |E[A | state, token, choice]| of the tokens that decide (the verb where two
are offered) over that of all others.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._agents import Encoder
from benchmarks._record import record
from reasoner_ray.choices import Choice
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.credit import Credit
from reasoner_ray.envs.text.credit_chain import CreditChain, CreditChainRules
from reasoner_ray.learner.learner import Learner
from reasoner_ray.learner.predict import predict
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder, flatten

JOB = Path(__file__).parent.parent / "jobs" / "agents" / "credit_chain.yaml"
ALGORITHMS = ("poad", "ntpo")


@dataclass(frozen=True)
class Kind:
    """What a token is: two tokens that are alike in this have the same expected advantage."""

    state: int
    action: str
    place: int
    decides: bool


@dataclass(frozen=True)
class Episodes:
    """Every episode that differs, and what each of their trainable tokens is."""

    trajectories: list[Trajectory]
    kinds: list[Kind]


def paths(state: int = 0, steps: int = 0) -> Iterator[list[tuple[int, str, int]]]:
    """Every way through the chain: (state, action, state after it) of each step."""
    rules = CreditChainRules()
    if state == 3 or steps == CreditChain.limit:
        yield []
        return
    for action in rules.actions(state):
        after = rules.outcome(state, action, 1).state
        for rest in paths(after, steps + 1):
            yield [(state, action, after), *rest]


def enumerate_episodes(encoder: Encoder) -> Episodes:
    """The episodes as the rollout workers would emit them, each turn in a context of its own."""
    rules, trajectories, kinds = CreditChainRules(), [], []
    for number, path in enumerate(paths()):
        builder = TrajectoryBuilder(id=str(number), group_id=str(number), task="credit-chain")
        for turn, (state, action, _) in enumerate(path):
            offered = list(rules.actions(state))
            candidates, divisors = encoder.candidates(offered)
            choice = Choice(candidates=candidates, divisors=divisors, chosen=offered.index(action))
            builder.add_env(encoder.prompt(rules.observe(state)), turn=turn, new_context=turn > 0)
            builder.add_model(choice.tokens, [0.0] * len(choice.tokens), [0] * len(choice.tokens), turn=turn, choice=choice)
            kinds += [Kind(state, action, j, j == 0 and len(offered) > 1) for j in range(len(choice.tokens))]
        builder.add_reward(1.0 if path[-1][2] == 3 else CreditChain.reward_at_limit)
        trajectories.append(builder.build())
    return Episodes(trajectories, kinds)


def job(algorithm: str, args: argparse.Namespace, seed: int) -> JobConfig:
    """The laptop's job, with a policy that stands still."""
    settings = "gamma_action: 0.95, lambda_action: 0.95, lambda_token: 0.95, normalize_advantages: false, behaviour_cap: null"
    own = ", gamma_token: 0.95" if algorithm == "ntpo" else ""
    overrides = [f"model.path={args.model}", "model.dtype=float32", f"seed={seed}", "learner.lr=1e-20", "learner.lora={rank: 1, alpha: 1}"]
    overrides += [f"algorithm={{name: {algorithm}, settings: {{{settings}{own}}}}}", f"learner.critic_lr={args.critic_lr}"]
    return load_config(JOB, overrides)


def probabilities(learner: Learner, episodes: Episodes) -> np.ndarray:
    """How likely the policy is to play each episode, [n]."""
    streams = flatten(episodes.trajectories)
    summed = torch.zeros(streams.n_trajectories).index_add(0, streams.trajectory_index, learner.logprobs(episodes.trajectories))
    p = summed.double().exp().numpy()
    if abs(p.sum() - 1) > 1e-3:
        raise SystemExit(f"the probabilities of all episodes add up to {p.sum():.4f}, not 1")
    return p / p.sum()


def learn_critic(learner: Learner, episodes: Episodes, p: np.ndarray, args: argparse.Namespace, seed: int) -> torch.Tensor:
    """The critic's values [K] of all episodes' tokens, averaged over the last third of its training (its targets are noisy)."""
    source, total, counted = np.random.default_rng(seed), torch.zeros(len(episodes.kinds)), 0
    for step in range(args.steps):
        drawn = source.multinomial(args.batch, p)
        learner.train_step([[episodes.trajectories[i]] * int(n) for i, n in enumerate(drawn) if n])
        if step >= args.steps * 2 // 3:
            places, said = predict(learner, episodes.trajectories)
            total[places] += said
            counted += 1
        if step % 20 == 0:
            print(f"{learner.algorithm.name}: {step} of {args.steps} steps", flush=True)
    return total / counted


def credit_of(learner: Learner, episodes: Episodes, values: torch.Tensor) -> Credit:
    """What the learner's algorithm makes of ``values`` [K]."""
    streams = flatten(episodes.trajectories)
    streams.values, streams.bootstrap = values, torch.zeros(streams.n_trajectories)
    streams.old_logprobs = streams.behaviour_logprobs
    return learner.algorithm.credit(streams, learner.settings)


def concentration(credit: Credit, episodes: Episodes, p: np.ndarray) -> tuple[float, float]:
    """Mean |E[A | kind]| of the tokens that decide, and of the others."""
    weights = torch.from_numpy(p)[flatten(episodes.trajectories).trajectory_index].tolist()
    mass, total = Counter[Kind](), Counter[Kind]()
    for kind, weight, advantage in zip(episodes.kinds, weights, credit.advantages.tolist(), strict=True):
        mass[kind] += weight
        total[kind] += weight * advantage
    means = []
    for decides in (True, False):
        of = [kind for kind in mass if kind.decides == decides]
        means.append(sum(abs(total[kind]) for kind in of) / sum(mass[kind] for kind in of))
    return means[0], means[1]


def main() -> None:
    """Learn both critics, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256, help="episodes a step")
    parser.add_argument("--critic-lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    encoder = Encoder(load_tokenizer(resolve_model(args.model)))
    episodes = enumerate_episodes(encoder)
    figures: dict[str, Any] = {"episodes": len(episodes.trajectories), "tokens": len(episodes.kinds)}
    for seed in range(args.seeds):
        for key, value in compare(episodes, args, seed).items():
            figures.setdefault(key, []).append(value)
    record("credit_chain", settings=vars(args), figures=figures)


def compare(episodes: Episodes, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One seed's figures."""
    learners = {name: Learner(job(name, args, seed)) for name in ALGORITHMS}
    p = probabilities(learners["poad"], episodes)
    values = {name: learn_critic(learner, episodes, p, args, seed) for name, learner in learners.items()}
    figures = {"success_probability": float(sum(q for q, t in zip(p, episodes.trajectories, strict=True) if t.total_reward > 0))}
    for name, learner in learners.items():
        for critic in ALGORITHMS:
            deciding, other = concentration(credit_of(learner, episodes, values[critic]), episodes, p)
            key = f"{name}_own_critic" if critic == name else f"{name}_critic_of_{critic}"
            figures |= {f"{key}_deciding": deciding, f"{key}_other": other, f"{key}_ratio": deciding / other}
    return figures | _first_values(episodes, values)


def _first_values(episodes: Episodes, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """What each critic says of the state after the first right word, where the task is to open the microwave."""
    place = next(i for i, kind in enumerate(episodes.kinds) if kind.state == 0 and kind.place == 1 and kind.action.startswith("open"))
    return {f"{name}_value_after_the_right_word": float(v[place]) for name, v in values.items()}


if __name__ == "__main__":
    main()
