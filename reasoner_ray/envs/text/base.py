"""What text environments share: their spaces, the limit on steps, the info dictionary, and the memory of finite ones."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import gymnasium
from gymnasium import spaces
from gymnasium.error import ResetNeeded

S = TypeVar("S")
A = TypeVar("A")

_TEXT = spaces.Text(4096, min_length=0, charset=string.printable)
_UNBOUNDED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What an environment answers to an action, or at the start of an episode."""

    observation: str
    admissible: tuple[str, ...]  # the actions legal now; empty where the episode is over
    reward: float = 0.0
    steps: int = 1  # how much of the environment's limit the action took
    success: bool = False  # the task is done, and the episode with it
    invalid: bool = False  # the text was no admissible action: the state was kept


class TextEnvironment(gymnasium.Env[str, str], ABC):
    """A Gymnasium environment over text that ends when its task is done, or truncated after ``limit`` steps.

    ``info`` has ``admissible`` (list of the actions legal now, [] when the task is done), ``success``, ``invalid`` (the
    text was no admissible action), ``steps_taken`` (how many of the limit's steps the action took) and ``metrics``: of the
    episode so far, its return (``discount`` for every step before an action). Any string may be an action.
    ``step`` raises ``gymnasium.error.ResetNeeded`` outside an episode.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form
    observation_space = _TEXT
    action_space = _TEXT
    limit: int
    discount: float
    reward_at_limit: float = 0.0
    """Comes on top of the last reward where the limit ends an episode."""

    _running = False
    _elapsed = 0  # steps taken in this episode
    _return = 0.0

    @abstractmethod
    def _begin(self) -> Turn:
        """Start an episode; what is random in it comes from ``self.np_random``."""

    @abstractmethod
    def _act(self, action: str, remaining: int) -> Turn:
        """Take an action that may use ``remaining`` steps (at least 1)."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode: its first observation and info."""
        super().reset(seed=seed)
        self._running, self._elapsed, self._return = True, 0, 0.0
        turn = self._begin()
        return turn.observation, self._info(turn)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act: observation, reward, terminated, truncated, info. Surrounding space in ``action`` does not matter."""
        if not self._running:
            raise ResetNeeded("the episode is over, or none was begun: call reset()")
        turn = self._act(action, self.limit - self._elapsed)
        truncated = self._elapsed + turn.steps >= self.limit and not turn.success
        reward = turn.reward + self.reward_at_limit if truncated else turn.reward
        self._return += self.discount**self._elapsed * reward
        self._elapsed += turn.steps
        self._running = not (turn.success or truncated)
        return turn.observation, reward, turn.success, truncated, self._info(turn)

    def _info(self, turn: Turn) -> dict[str, Any]:
        # Made anew each time: wrappers write into it.
        return {
            "admissible": list(turn.admissible),
            "success": turn.success,
            "invalid": turn.invalid,
            "steps_taken": turn.steps,
            "metrics": self._metrics(),
        }

    def _metrics(self) -> dict[str, float]:
        return {"discounted_return": self._return}


@dataclass(frozen=True, slots=True)
class Outcome(Generic[S]):
    """Where an action leads."""

    state: S
    reward: float = 0.0
    success: bool = False
    steps: int = 1


class Rules(ABC, Generic[S, A]):
    """A deterministic world: finitely many hashable states of type ``S``, and actions of type ``A``."""

    start: S

    @abstractmethod
    def actions(self, state: S) -> dict[str, A]:
        """The legal actions of a state in which the task is not done, by their text; never none."""

    @abstractmethod
    def outcome(self, state: S, action: A, budget: int) -> Outcome[S]:
        """Take an action, cut off after ``budget`` steps (at least 1)."""

    @abstractmethod
    def observe(self, state: S) -> str:
        """The text of a state, which an action continues."""

    def refusal(self, state: S) -> Outcome[S]:
        """What a text that is no action does: it takes a step, and no more."""
        return Outcome(state)


@dataclass(slots=True)
class _Place(Generic[S, A]):
    """What can be done in a state, and what it leads to as far as it was done before."""

    actions: dict[str, A]
    refusal: tuple[Turn, S]
    after: dict[str, tuple[Turn, S]]


class Machine(Generic[S, A]):
    """The memory of a finite world: texts, lists and outcomes are made when a state is first met.

    Environments over the same rules share one. Places name each other by their state, so that an environment can be
    copied and pickled without a deep recursion.
    """

    def __init__(self, rules: Rules[S, A]) -> None:
        """Nothing is worked out yet."""
        self.rules = rules
        self._places: dict[S, _Place[S, A]] = {}

    @cached_property
    def opening(self) -> Turn:
        """The turn that begins an episode, in ``rules.start``."""
        return self._turn(Outcome(self.rules.start, steps=0))

    def act(self, state: S, action: str, budget: int) -> tuple[Turn, S]:
        """What a text does in a state with ``budget`` steps left, and the state it leads to.

        Case and one full stop at the end do not matter where they leave one legal action; an exact text goes first.
        """
        place = self._places.get(state) or self._lay_out(state)
        found = place.after.get(action)
        if found is None:
            meant = _meant(action, place.actions)
            if meant is None:
                return place.refusal
            action = meant
            found = place.after.get(action) or self._follow(state, place.actions[action], _UNBOUNDED)
            place.after[action] = found
        if found[0].steps <= budget:
            return found
        return self._follow(state, place.actions[action], budget)

    def _lay_out(self, state: S) -> _Place[S, A]:
        refusal = self._turn(self.rules.refusal(state), invalid=True), state
        place = self._places[state] = _Place(self.rules.actions(state), refusal, {})
        return place

    def _follow(self, state: S, action: A, budget: int) -> tuple[Turn, S]:
        outcome = self.rules.outcome(state, action, budget)
        return self._turn(outcome), outcome.state

    def _turn(self, outcome: Outcome[S], *, invalid: bool = False) -> Turn:
        return Turn(
            observation=self.rules.observe(outcome.state),
            admissible=() if outcome.success else tuple(self.rules.actions(outcome.state)),
            reward=outcome.reward,
            steps=outcome.steps,
            success=outcome.success,
            invalid=invalid,
        )


def _meant(text: str, legal: Collection[str]) -> str | None:
    """The legal action that ``text`` is, but for surrounding space, case and a full stop at its end; None for none or several."""
    exact = text.strip()
    if exact in legal:
        return exact
    alike = [action for action in legal if _plain(action) == _plain(exact)]
    return alike[0] if len(alike) == 1 else None


def _plain(action: str) -> str:
    return action.removesuffix(".").lower()


class FiniteEnvironment(TextEnvironment, Generic[S, A]):
    """An environment over a finite world: after a state was met once, a step there is two look-ups."""

    def __init__(self, machine: Machine[S, A]) -> None:
        """``machine`` may be shared."""
        self._machine = machine
        self._state = machine.rules.start

    @property
    def rules(self) -> Rules[S, A]:
        """The world's rules, for whoever wants to search its states."""
        return self._machine.rules

    def _begin(self) -> Turn:
        self._state = self._machine.rules.start
        return self._machine.opening

    def _act(self, action: str, remaining: int) -> Turn:
        turn, self._state = self._machine.act(self._state, action, remaining)
        return turn
