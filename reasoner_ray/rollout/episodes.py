"""Episodes: coroutines that turn one item into a group of trajectories.

An episode calls ``context.generate`` as often as it likes and builds its trajectories from the token ids that come
back; tokens once sampled are never decoded and encoded again. Users add their own with ``register_episode`` or name
``module:function`` in ``rollout.episode``.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.registry import Registry
from reasoner_ray.rollout.engine import Engine, Generation, Sampling
from reasoner_ray.tokens import beginning, continuation, opening
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import AgentConfig, JobConfig
    from reasoner_ray.envs.host import HostPool
    from reasoner_ray.labels.grading import WorkerGrader
    from reasoner_ray.rollout.admissible import CandidateScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeContext:
    """What an episode may use."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sampling: Sampling
    max_context: int
    max_turns: int
    group_id: str
    samples: int  # trajectories the group must have
    agent: AgentConfig
    candidates: CandidateScorer
    hosts: HostPool
    seed: int = 0
    grader: WorkerGrader | None = None  # judges answers where an episode must know whether they are right
    config: JobConfig | None = None  # the whole job, for episodes with a section of their own
    on_request: Callable[[], None] = field(default=lambda: None)  # called before each: the worker counts and drops groups by it

    async def generate(self, tokens: Sequence[int], n: int = 1) -> list[Generation]:
        """``n`` actions after ``tokens``, under the job's sampling."""
        self.on_request()
        return await self.engine.generate(tokens, self.sampling, n, order=self.group_id)

    def builder(self, sample: int, item: Item) -> TrajectoryBuilder:
        """An empty trajectory: number ``sample`` of the group."""
        return TrajectoryBuilder(
            id=f"{self.group_id}/{sample}", group_id=self.group_id, task=self.task.name, info={"item": item.id, "sample": sample}
        )

    def prompt(self, item: Item) -> list[int]:
        """The item's prompt as token ids. Raises ``DataError`` where it leaves no room for an answer."""
        tokens = self.task.render(item, self.tokenizer)
        if not tokens:
            raise DataError(f"item {item.id} of task {self.task.name} has an empty prompt")
        if len(tokens) >= self.max_context:
            raise DataError(
                f"item {item.id} of task {self.task.name}: its prompt has {len(tokens)} tokens, "
                f"which leaves no room for an answer within rollout.max_context={self.max_context}"
            )
        return tokens

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """What every context begins with: what the tokenizer writes before any text (a token, or nothing), and the control text."""
        return (*opening(self.tokenizer), *beginning(self.tokenizer, self.task.control))

    def begin(self, text: str) -> tuple[int, ...]:
        """Token ids of the first text of a context, behind ``first_tokens``; a control text there changes nothing (``with_control``)."""
        return beginning(self.tokenizer, text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text that goes on from what a context holds, without special tokens."""
        return continuation(self.tokenizer, text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text an environment or scorer reads; end-of-text and other special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


Episode = Callable[[EpisodeContext, Item], Awaitable[list[Trajectory]]]
EPISODES: Registry[Episode] = Registry("episode", "rollout.episode")
register_episode = EPISODES.register


@register_episode("single_turn")
async def single_turn(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """One prompt, one answer, ``context.samples`` times; the prompt is computed once."""
    prompt = context.prompt(item)
    trajectories = []
    for sample, generation in enumerate(await context.generate(prompt, context.samples)):
        builder = context.builder(sample, item)
        builder.add_env(prompt)
        builder.add_model(generation.tokens, generation.logprobs, generation.versions)
        cut = generation.finish_reason == "length"
        trajectories.append(builder.build(Status.TRUNCATED if cut else Status.FINISHED, text=context.decode(generation.tokens)))
    return trajectories


class Environment(Protocol):
    """What ``multi_turn`` plays with, one object an episode. Texts are appended as they are.

    Methods may be coroutines; others are called in a thread, one call an episode at a time, so that a slow one does not hold up
    the engine. A task offers it by a method ``environment(item) -> Environment``, called in a thread as well.
    """

    def reset(self, item: Item) -> str | Awaitable[str]:
        """Begin; the returned text follows the item's prompt ('' for nothing)."""
        ...

    def step(self, action: str) -> tuple[str, float, bool] | Awaitable[tuple[str, float, bool]]:
        """Answer one action with (observation, reward, done)."""
        ...


class EnvironmentFailed(Exception):
    """A user's environment raised; carries what it raised as ``__cause__``."""


@register_episode("multi_turn")
async def multi_turn(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """Observation, action, observation, ... until the environment is done or a limit is met.

    The observation's tokens are appended as an env span; only that new text is tokenised. A limit of tokens or turns
    gives TRUNCATED, an exception in the environment FAILED with ``info["error"]``.
    """
    make = getattr(context.task, "environment", None)
    if make is None:
        raise ConfigError(f"rollout.episode: multi_turn needs a task with a method environment(item); {context.task.name} has none")
    prompt = context.prompt(item)
    return list(await asyncio.gather(*(_play(context, item, make, prompt, sample) for sample in range(context.samples))))


async def _play(context: EpisodeContext, item: Item, make: Callable[[Item], Environment], prompt: list[int], sample: int) -> Trajectory:
    """One episode of ``multi_turn``."""
    builder = context.builder(sample, item)
    builder.add_env(prompt)
    texts: list[str] = []
    try:
        environment = await _ask(make, item)
        observation = await _ask(environment.reset, item)
        for turn in range(context.max_turns):
            new = context.encode(observation)
            if len(builder.tokens) + len(new) >= context.max_context:
                return builder.build(Status.TRUNCATED, text="".join(texts), turns=turn)
            if new:
                builder.add_env(new, turn=turn)
            (generation,) = await context.generate(builder.tokens)
            builder.add_model(generation.tokens, generation.logprobs, generation.versions, turn=turn)
            action = context.decode(generation.tokens)
            texts.append(action)
            if generation.finish_reason == "length":
                return builder.build(Status.TRUNCATED, text="".join(texts), turns=turn + 1)
            observation, reward, done = await _ask(environment.step, action)
            builder.add_reward(float(reward))
            if done:
                return builder.build(Status.FINISHED, text="".join(texts), turns=turn + 1)
        return builder.build(Status.TRUNCATED, text="".join(texts), turns=context.max_turns)
    except EnvironmentFailed as error:
        cause = error.__cause__
        return builder.build(Status.FAILED, text="".join(texts), error=f"{type(cause).__name__}: {cause}", error_type="environment")


async def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function, in a thread unless it is a coroutine's; whatever it raises becomes ``EnvironmentFailed``."""

    def call() -> Any:
        with _as_failure():
            return function(*arguments)

    answer = call() if inspect.iscoroutinefunction(function) else await asyncio.to_thread(call)
    if not inspect.isawaitable(answer):
        return answer
    with _as_failure():
        return await answer


@contextmanager
def _as_failure() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # someone else's code may raise anything; the group is counted as failed, with what was raised
        raise EnvironmentFailed from error
