"""What a team of agents sees and does, as tensors of one shape for all of them (numpy only; no environment is imported here)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reasoner_ray.errors import EnvironmentFault

if TYPE_CHECKING:
    from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionLayout:
    """One action of every agent as ``[n, parts]``: the number of its choice first (where any agent has one), then its dimensions.

    Agents may choose, move continuously, or both; those with fewer choices or dimensions than others leave the rest unused.
    """

    choices: tuple[int, ...]  # [n]; how many things an agent chooses from; 0: it does not choose
    dims: tuple[int, ...]  # [n]; how many continuous dimensions its action has
    least_choices: int = 0  # choices and dimensions that nobody has, so that teams of several kinds have one size
    least_dims: int = 0

    @property
    def n_agents(self) -> int:
        """Agents of the team."""
        return len(self.choices)

    @property
    def n_choices(self) -> int:
        """Most choices that an agent has, padding included."""
        return max(self.least_choices, *self.choices)

    @property
    def n_dims(self) -> int:
        """Most dimensions that an agent has, padding included."""
        return max(self.least_dims, *self.dims)

    @property
    def n_parts(self) -> int:
        """Numbers that make an action: its choice and its dimensions."""
        return int(self.n_choices > 0) + self.n_dims

    @property
    def parts(self) -> np.ndarray:
        """bool [n, parts]: which numbers an agent's action has."""
        chooses = [np.asarray(self.choices)[:, None] > 0] if self.n_choices else []
        return np.concatenate([*chooses, np.arange(self.n_dims) < np.asarray(self.dims)[:, None]], axis=1)

    @property
    def legal(self) -> np.ndarray:
        """bool [n, choices]: what each agent may choose where the environment masks nothing. All True where it does not choose."""
        counts = np.asarray(self.choices)[:, None]
        return (np.arange(self.n_choices) < counts) | (counts == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How what an agent observes itself is put before the network: a network that learnt from one way is blind to another."""

    own: tuple[int, ...]  # [n]; how many numbers each agent observes
    standardise: bool = False
    features: tuple[tuple[int, int], ...] | None = None  # numbers and padded length of each part; None: all padding comes last

    @classmethod
    def of(cls, own: Sequence[int], config: MultiAgentConfig) -> Sight:
        """As a job says it for agents that observe ``own`` numbers."""
        features = None if config.features is None else tuple((int(size), int(to)) for size, to in config.features)
        return cls(own=tuple(map(int, own)), standardise=config.standardise, features=features)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Sight:
        """Back from what ``TeamSpec.to_dict`` or JSON made of it. Raises ``KeyError``, ``TypeError`` where it is something else."""
        given = tree["features"]
        features = None if given is None else tuple((int(size), int(to)) for size, to in given)
        return cls(own=tuple(map(int, tree["own"])), standardise=bool(tree["standardise"]), features=features)

    @property
    def padded_to(self) -> list[int] | None:
        """The padded length of each part; None where there are no parts."""
        return None if self.features is None else [to for _, to in self.features]

    @property
    def gaps(self) -> bool:
        """Whether padding lies between the parts."""
        return any(size < to for size, to in (self.features or ())[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamSpec:
    """A team: its agents, the length of their padded observations (agent's number included), their actions."""

    agents: tuple[str, ...]
    observation: int
    actions: ActionLayout
    number: int | None = None  # how many of the observation's last places are the agent's number; None: not known
    sight: Sight | None = None  # None: not known

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> TeamSpec:
        """Back from ``to_dict``, or from what JSON made of it. Raises ``KeyError``, ``TypeError`` where it is something else."""
        actions = tree["actions"]
        least = {name: int(actions.get(name, 0)) for name in ("least_choices", "least_dims")}  # files from before padding have none
        layout = ActionLayout(choices=tuple(actions["choices"]), dims=tuple(actions["dims"]), **least)
        number, sight = tree.get("number"), tree.get("sight")  # files from before they were kept have none
        return cls(
            agents=tuple(tree["agents"]),
            observation=int(tree["observation"]),
            actions=layout,
            number=None if number is None else int(number),
            sight=None if sight is None else Sight.from_dict(sight),
        )

    def difference(self, other: TeamSpec) -> str:
        """How ``other`` differs, in one sentence; empty where it does not."""
        if self.actions.n_agents != other.actions.n_agents:
            return f"{self.actions.n_agents} agents there, {other.actions.n_agents} here"
        if self._sees_otherwise(other):
            return f"observations of {self._seen()} there, {other._seen()} here"
        if self.actions != other.actions:
            return f"actions {self.actions} there, {other.actions} here"
        return self._shown_otherwise(other)

    def misfit(self, other: TeamSpec) -> str:
        """Why a network for this team cannot act for ``other``, whose agents may be fewer or more; empty where it can."""
        sizes = [(t.actions.n_choices, t.actions.n_dims) for t in (self, other)]
        if sizes[0] == sizes[1] and not self._sees_otherwise(other):
            return self._shown_otherwise(other)
        there, here = (
            f"observations of {team._seen()}, actions of {choices} choices and {dims} dimensions"
            for team, (choices, dims) in zip((self, other), sizes, strict=True)
        )
        return f"{there} there; {here} here"

    def _sees_otherwise(self, other: TeamSpec) -> bool:
        """Whether observations lie elsewhere: a sum of equal size may be made of other parts."""
        known = self.number is not None and other.number is not None
        return self.observation != other.observation or (known and self.number != other.number)

    def _shown_otherwise(self, other: TeamSpec) -> str:
        """How equally long observations mean something else, in one sentence; empty where they do not, or where it is not known."""
        if self.sight is None or other.sight is None:
            return ""
        if self.sight.standardise != other.sight.standardise:
            was, now = (str(team.sight.standardise).lower() for team in (self, other) if team.sight)
            return f"multi_agent.standardise={was} there, {now} here"
        parts = self.sight.padded_to, other.sight.padded_to
        # The numbers of a team that needs no padding may be the parts of any.
        if parts[0] == parts[1] or not (self.sight.gaps or other.sight.gaps) or self._fills() or other._fills():
            return ""
        was, now = (f"padded to {to}" if to is not None else "none" for to in parts)
        return f"multi_agent.features {was} there, {now} here"

    def _fills(self) -> bool:
        """Whether every place of an observation is an agent's own, although no parts of it are known."""
        if self.sight is None or self.sight.features is not None or self.number is None:
            return False
        return min(self.sight.own) == self.observation - self.number

    def _seen(self) -> str:
        parts = "" if self.number is None else f" ({self.observation - self.number} seen, {self.number} for the agent's number)"
        return f"{self.observation} numbers{parts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamView:
    """What the agents of E environments see. An agent that has died sees zeros and may choose anything."""

    observations: np.ndarray  # float32 [E, n, observation]
    legal: np.ndarray  # bool [E, n, choices]
    active: np.ndarray  # bool [E, n]; False for an agent that has died

    def check(self, name: str, agents: tuple[str, ...]) -> None:
        """Raise ``EnvironmentFault`` for an observation that is not finite, or an agent that may choose nothing."""
        if not np.isfinite(self.observations).all():
            env, agent = np.argwhere(~np.isfinite(self.observations).all(-1))[0]
            raise EnvironmentFault(f"{name}: the observation of {agents[agent]} (environment {env}) holds NaN or an infinity")
        if self.legal.shape[-1] and not self.legal.any(-1).all():
            env, agent = np.argwhere(~self.legal.any(-1))[0]
            raise EnvironmentFault(
                f"{name}: the action mask of {agents[agent]} (environment {env}) allows nothing; mask at most all but one"
            )
