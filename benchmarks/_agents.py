"""What the measurements of language agents share: real observations and candidate lists of FoodPreparation."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import gymnasium

import reasoner_ray.envs  # noqa: F401 - registers the environments
from reasoner_ray.choices import Candidates, Choice, divisor
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder

ENVIRONMENT = "reasoner_ray/FoodPreparation-v0"


def play(steps: int, seed: int = 0) -> list[list[tuple[str, list[str]]]]:
    """Episodes of a uniformly random policy: (observation, admissible actions) of each turn, ``steps`` turns in all."""
    env, source, done = gymnasium.make(ENVIRONMENT), random.Random(seed), True
    episodes: list[list[tuple[str, list[str]]]] = []
    for _ in range(steps):
        if done:
            observation, info = env.reset(seed=source.randrange(2**31))
            episodes.append([])
        episodes[-1].append((observation, list(info["admissible"])))
        observation, _, terminated, truncated, info = env.step(source.choice(info["admissible"]))
        done = terminated or truncated
    return episodes


class Encoder:
    """Text to token ids and lists, as ``rollout.agents`` does it."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode = lru_cache(maxsize=None)(lambda text: tuple(int(t) for t in tokenizer.encode(text, add_special_tokens=False)))

    def prompt(self, observation: str) -> list[int]:
        return list(self._encode(observation))

    def candidates(self, actions: list[str]) -> tuple[Candidates, tuple[float, ...]]:
        found = tuple(self._encode(f" {a}") for a in actions)
        return found, tuple(divisor(f" {a}", c, "word") for a, c in zip(actions, found, strict=True))


def trajectories(encoder: Encoder, steps: int, seed: int = 0) -> list[Trajectory]:
    """The episodes of ``play`` as trajectories whose actions were chosen from lists, each turn in a context of its own."""
    source, made = random.Random(seed), []
    for number, episode in enumerate(play(steps, seed)):
        builder = TrajectoryBuilder(id=str(number), group_id=str(number), task="benchmark")
        for turn, (observation, actions) in enumerate(episode):
            candidates, divisors = encoder.candidates(actions)
            choice = Choice(candidates=candidates, divisors=divisors, chosen=source.randrange(len(candidates)))
            n = len(choice.tokens)
            builder.add_env(encoder.prompt(observation), turn=turn, new_context=turn > 0)
            builder.add_model(choice.tokens, [0.0] * n, [0] * n, turn=turn, choice=choice)
        made.append(builder.build())
    return made
