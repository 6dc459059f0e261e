"""What a team of agents sees and does, as tensors of one shape for all of them (numpy only; no environment is imported here)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reasoner_ray.errors import EnvironmentFault


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
class TeamSpec:
    """A team: its agents, the length of their padded observations (agent's number included), their actions."""

    agents: tuple[str, ...]
    observation: int
    actions: ActionLayout
    number: int | None = None  # how many of the observation's last places are the agent's number; None: not known

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for files."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> TeamSpec:
        """Back from ``to_dict``, or from what JSON made of it. Raises ``KeyError``, ``TypeError`` where it is something else."""
        actions = tree["actions"]
        least = {name: int(actions.get(name, 0)) for name in ("least_choices", "least_dims")}  # files from before padding have none
        layout = ActionLayout(choices=tuple(actions["choices"]), dims=tuple(actions["dims"]), **least)
        number = tree.get("number")  # files from before it was kept have none
        return cls(
            agents=tuple(tree["agents"]),
            observation=int(tree["observation"]),
            actions=layout,
            number=None if number is None else int(number),
        )

    def difference(self, other: TeamSpec) -> str:
        """How ``other`` differs, in one sentence; empty where it does not."""
        if self.actions.n_agents != other.actions.n_agents:
            return f"{self.actions.n_agents} agents there, {other.actions.n_agents} here"
        if self._sees_otherwise(other):
            return f"observations of {self._seen()} there, {other._seen()} here"
        if self.actions != other.actions:
            return f"actions {self.actions} there, {other.actions} here"
        return ""

    def misfit(self, other: TeamSpec) -> str:
        """Why a network for this team cannot act for ``other``, whose agents may be fewer or more; empty where it can."""
        sizes = [(t.actions.n_choices, t.actions.n_dims) for t in (self, other)]
        if sizes[0] == sizes[1] and not self._sees_otherwise(other):
            return ""
        there, here = (
            f"observations of {team._seen()}, actions of {choices} choices and {dims} dimensions"
            for team, (choices, dims) in zip((self, other), sizes, strict=True)
        )
        return f"{there} there; {here} here"

    def _sees_otherwise(self, other: TeamSpec) -> bool:
        """Whether observations lie elsewhere: a sum of equal size may be made of other parts."""
        known = self.number is not None and other.number is not None
        return self.observation != other.observation or (known and self.number != other.number)

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
