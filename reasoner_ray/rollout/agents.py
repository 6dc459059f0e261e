"""Episodes of language agents in Gymnasium environments: actions chosen from a list, or written freely.

Both play an item of the ``environment`` task and emit the same trajectory: observations are env spans, each action is a
model span with the reward it earned. Earlier turns stay in the context as long as ``rollout.agent.history_tokens``
allows; their token ids are carried over, never written anew.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from reasoner_ray.choices import Choice, divisor
from reasoner_ray.data.tasks import Item, stable_hash
from reasoner_ray.envs.host import Host
from reasoner_ray.envs.player import EnvironmentFailure, StepResult
from reasoner_ray.errors import ConfigError
from reasoner_ray.rollout.episodes import EpisodeContext, register_episode
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder


@dataclass(frozen=True)
class _Policy:
    """How actions are found: ``act`` appends the one that answers an observation to the trajectory and returns its text."""

    act: Callable[[_Episode, StepResult], Awaitable[str]]
    room: Callable[[_Episode, StepResult], int]  # tokens that an action needs after the observation


@register_episode("admissible")
async def admissible(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """Choose each action from the environment's list, scored by the language model (see ``choices``)."""
    return await _play_group(context, item, _Policy(_choose, _longest))


@register_episode("free_text")
async def free_text(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """Write each action as text, sampled without truncation; one that the environment does not understand costs
    ``rollout.agent.invalid_penalty`` and is counted."""
    return await _play_group(context, item, _Policy(_write, lambda _episode, _result: 1))


async def _play_group(context: EpisodeContext, item: Item, policy: _Policy) -> list[Trajectory]:
    if "environment" not in item.info:
        raise ConfigError(f"rollout.episode: this episode plays environments; task.name={context.task.name} has none, take environment")
    return list(await asyncio.gather(*(_play(context, item, sample, policy) for sample in range(context.samples))))


async def _play(context: EpisodeContext, item: Item, sample: int, policy: _Policy) -> Trajectory:
    """One episode; where the environment fails it is played again, at most ``rollout.agent.max_failures`` times."""
    failures: Counter[str] = Counter()
    said: dict[str, str] = {}  # the newest text of each kind
    while True:
        host = await context.hosts.acquire(item.info["environment"])
        episode = _Episode(context, item, sample, host, attempt=failures.total())
        try:
            trajectory = await episode.play(policy)
            return trajectory.with_status(trajectory.status, environment_failures=dict(failures), environment_errors=said)
        except EnvironmentFailure as error:
            failures[error.error_type] += 1
            said[error.error_type] = str(error)
            if failures.total() > context.agent.max_failures:
                broken: dict[str, Any] = {"error": str(error), "error_type": error.error_type, "environment_failures": dict(failures)}
                return episode.builder.build(Status.FAILED, **broken)
        finally:
            await host.release()


@dataclass
class _Episode:
    """One attempt at an episode."""

    context: EpisodeContext
    item: Item
    sample: int
    host: Host
    attempt: int
    builder: TrajectoryBuilder = field(init=False)
    source: np.random.Generator = field(init=False)
    turn: int = 0
    turns: list[list[int]] = field(default_factory=list)  # token ids of each turn so far, observation and action

    def __post_init__(self) -> None:
        self.builder = self.context.builder(self.sample, self.item)
        name = f"{self.context.seed}/{self.context.group_id}/{self.sample}/{self.attempt}"
        self.source = np.random.default_rng(stable_hash(name))

    async def play(self, policy: _Policy) -> Trajectory:
        """To the environment's end or a limit. Raises ``EnvironmentFailure``."""
        context, texts = self.context, list[str]()
        total, invalid, error_types = 0.0, 0, Counter[str]()
        result = await self.host.reset(int(self.item.info["seed"]))
        while self.turn < context.max_turns and not (result.terminated or result.truncated):
            if not self._observe(result.observation, policy.room(self, result)):
                if not self.turn:
                    return self._without_room(policy.room(self, result), result)
                break
            before = len(self.builder.tokens)
            texts.append(await policy.act(self, result))
            self.turns[-1] += self.builder.tokens[before:]
            result = await self.host.step(texts[-1])
            self.builder.set_duration(result.duration)
            reward = result.reward - (context.agent.invalid_penalty if result.invalid else 0.0)
            if reward:
                self.builder.add_reward(reward)
            total, invalid = total + result.reward, invalid + int(result.invalid)
            error_types.update([result.error_type] if result.error_type else [])
            self.turn += 1
        if not result.terminated:
            self._observe(result.observation, 1)  # the state after the last action, for a critic that looks beyond the cut
        unended = not (result.terminated or result.truncated)
        metrics = {
            "return": total,
            "success": float(result.success),
            "turns": float(self.turn),
            "invalid": invalid / max(self.turn, 1),
            "unended": float(unended),  # cut by our limits, not by the environment's
            **result.metrics,
        }
        status = Status.FINISHED if result.terminated else Status.TRUNCATED
        said = {"error_types": dict(error_types), "transcript": " | ".join(text.strip() for text in texts)}
        return self.builder.build(status, unended=unended, metrics=metrics, **said)

    def _without_room(self, room: int, result: StepResult) -> Trajectory:
        """What becomes of an episode whose first observation is too long."""
        needed = len(self.context.first_tokens) + len(self.context.begin(result.observation)) + room
        text = f"{self.host.name}: its first observation and an action take {needed} tokens; set rollout.max_context above {needed - 1}"
        return self.builder.build(Status.FAILED, error=f"{text} (it is {self.context.max_context})", error_type="no_room")

    def _observe(self, observation: str, room: int) -> bool:
        """Append an observation, after as much of the earlier turns as the budget allows. False where ``room`` tokens would not be left."""
        context, kept = self.context, list[list[int]]()
        for turn in reversed(self.turns):
            if sum(map(len, kept)) + len(turn) > context.agent.history_tokens:
                break
            kept.insert(0, turn)
        goes_on = bool(self.turns) and len(kept) == len(self.turns)
        new = context.encode(f"\n{observation}") if kept else context.begin(observation)
        old = self.builder.tokens if goes_on else [*context.first_tokens, *chain.from_iterable(kept)]
        if len(old) + len(new) + room > context.max_context:
            return False
        self.builder.add_env(new if goes_on else [*old, *new], turn=self.turn, new_context=not goes_on and self.turn > 0)
        self.turns = [*kept, list(new)]
        return True


def _listed(episode: _Episode, result: StepResult) -> list[str]:
    """The actions to choose from. Raises ``EnvironmentFailure`` where there are none."""
    if not result.admissible:
        raise EnvironmentFailure("bad_result", f"{episode.host.name} gave no admissible actions; rollout.episode=admissible needs them")
    return [f" {text}" for text in result.admissible]


def _longest(episode: _Episode, result: StepResult) -> int:
    return max(len(episode.context.encode(text)) for text in _listed(episode, result))


async def _choose(episode: _Episode, result: StepResult) -> str:
    context, texts = episode.context, _listed(episode, result)
    candidates = tuple(context.encode(text) for text in texts)
    if len(set(candidates)) < len(candidates):
        alike = [text.strip() for text, c in zip(texts, candidates, strict=True) if candidates.count(c) > 1]
        raise EnvironmentFailure("bad_result", f"{episode.host.name} lists actions that are the same tokens to this model: {alike}")
    divisors = tuple(divisor(text, c, context.agent.normalisation) for text, c in zip(texts, candidates, strict=True))
    context.on_request()
    scored = await context.candidates.score(episode.builder.tokens, candidates, divisors)
    chosen = scored.best() if context.sampling.temperature == 0 else scored.draw(episode.source)
    choice = Choice(candidates=candidates, divisors=divisors, chosen=chosen)
    versions = [scored.version] * len(choice.tokens)
    episode.builder.add_model(choice.tokens, scored.token_logprobs[chosen], versions, turn=episode.turn, choice=choice)
    return texts[chosen][1:]


async def _write(episode: _Episode, result: StepResult) -> str:
    (generation,) = await episode.context.generate(episode.builder.tokens)
    episode.builder.add_model(generation.tokens, generation.logprobs, generation.versions, turn=episode.turn)
    return episode.context.decode(generation.tokens)


def failures_of(trajectory: Trajectory) -> dict[str, int]:
    """Environment failures that a trajectory cost, by kind."""
    found: dict[str, Any] = trajectory.info.get("environment_failures", {})
    return {kind: int(n) for kind, n in found.items()}
