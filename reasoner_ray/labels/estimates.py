"""Monte Carlo estimates of states (a question and the first steps of a solution), each made once and shared."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reasoner_ray.actor_calls import together
from reasoner_ray.steps import Partial

if TYPE_CHECKING:
    from reasoner_ray.search.policy import Continuation

Grade = Callable[[Partial, bool], Awaitable[bool | None]]
"""``grade(solution, cut)``: whether its answer is right; None where the grader failed, which is never taken for wrong."""


class Policy(Protocol):
    """What samples completions (``search.policy.StepPolicy`` is one)."""

    async def complete(self, partial: Partial, n: int) -> Sequence[Continuation]:
        """``n`` whole continuations of ``partial``; none where it has no room left."""
        ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """A whole solution that was sampled from a state."""

    partial: Partial
    length: int  # tokens after the state
    cut: bool  # a limit of tokens ended it, so its last step is not whole
    right: bool | None  # None: the grader failed


@dataclass(frozen=True, slots=True)
class State:
    """A prefix and what was sampled from it."""

    partial: Partial
    rollouts: tuple[Rollout, ...]

    @property
    def mc(self) -> float | None:
        """MC(s): the share of right ones among the graded rollouts; None where none could be graded."""
        graded = [rollout.right for rollout in self.rollouts if rollout.right is not None]
        return sum(graded) / len(graded) if graded else None


class Estimator:
    """Samples ``completions`` rollouts from a state, the first time it is asked for; later calls share what was found."""

    def __init__(self, policy: Policy, grade: Grade, completions: int) -> None:
        self._policy, self._grade, self._k = policy, grade, completions
        self._states: dict[tuple[int, ...], asyncio.Task[State]] = {}
        self.graded = 0
        self.grader_failures = 0

    @property
    def estimates(self) -> int:
        """States that were estimated, or are being."""
        return len(self._states)

    @property
    def states(self) -> list[State]:
        """Every state whose estimate is finished, in the order in which they were asked for."""
        return [task.result() for task in self._states.values() if task.done() and not task.cancelled() and task.exception() is None]

    def led_right(self, partial: Partial) -> bool:
        """Whether some right rollout begins with ``partial``: no error lies in it, whatever its own estimate says."""
        n = len(partial.tokens)
        rollouts = (rollout for state in self.states for rollout in state.rollouts if rollout.right and not rollout.cut)
        return any(rollout.partial.tokens[:n] == partial.tokens for rollout in rollouts)

    def found(self, partial: Partial) -> float | None:
        """MC of a state whose estimate is finished; None for any other."""
        task = self._states.get(partial.tokens)
        return task.result().mc if task is not None and task.done() else None

    async def estimate(self, partial: Partial) -> State:
        """The state of ``partial``."""
        if partial.tokens not in self._states:
            self._states[partial.tokens] = asyncio.create_task(self._sample(partial))
        return await self._states[partial.tokens]

    async def sample(self, partial: Partial, n: int) -> list[Rollout]:
        """``n`` graded rollouts from ``partial`` that count for no estimate."""
        found = await self._policy.complete(partial, n)
        return await together(self._as_rollout(c) for c in found)

    async def _sample(self, partial: Partial) -> State:
        return State(partial, tuple(await self.sample(partial, self._k)))

    async def _as_rollout(self, continuation: Continuation) -> Rollout:
        cut = continuation.end == "cut"
        right = await self._grade(continuation.partial, cut)
        self.graded += 1
        self.grader_failures += right is None
        return Rollout(continuation.partial, len(continuation.tokens), cut, right)
