"""The rollout worker: environments, and a copy of the network that acts for all agents of all of them at once. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.spec import TeamSpec, TeamView
from reasoner_ray.envs.multi_agent.tasks import task_settings
from reasoner_ray.envs.multi_agent.teams import Episode, Teams
from reasoner_ray.errors import EnvironmentFault
from reasoner_ray.pictures import MAX_FRAMES

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """T steps of E environments, agents in the environment's order. Values are in units of normalised returns."""

    observations: torch.Tensor  # float32 [T, E, n, observation]
    legal: torch.Tensor  # bool [T, E, n, choices]
    active: torch.Tensor  # bool [T, E, n]; False for an agent that had died before the step
    next_active: torch.Tensor  # bool [T, E, n]; the same after the step, before any reset
    actions: torch.Tensor  # float32 [T, E, n, parts]
    logprobs: torch.Tensor  # float32 [T, E, n, parts]
    values: torch.Tensor  # float32 [T, E, n]
    next_values: torch.Tensor  # float32 [T, E, n]; of the state the step led to, before any reset
    rewards: torch.Tensor  # float32 [T, E, n]
    terminated: torch.Tensor  # bool [T, E, n]
    truncated: torch.Tensor  # bool [T, E, n]
    order: torch.Tensor  # int64 [T, E, n]; in which agents acted, or [T, E, 0] for the environment's own

    @property
    def rows(self) -> int:
        """Environment steps."""
        return self.rewards.shape[0] * self.rewards.shape[1]


def join(segments: Sequence[Segment]) -> Segment:
    """Segments of several workers as one of all their environments. They must be equally long."""
    return Segment(**{f.name: torch.cat([getattr(s, f.name) for s in segments], 1) for f in fields(Segment)})


class RolloutWorker:
    """Steps ``multi_agent.envs`` environments of one task with the newest weights it was given."""

    def __init__(self, config: JobConfig, index: int) -> None:
        """Worker ``index`` of the job. Raises ``ConfigError``, ``EnvironmentProblem``, ``EnvironmentFault``."""
        self.config, self.index = config, index
        settings = list(task_settings(config.multi_agent).values())
        self.settings = settings[index % len(settings)]
        self._teams = make_teams(self.settings, self.settings.envs)
        self._watched: Teams | None = None  # environments of evaluations
        self.policy = MultiAgentTransformer(self._teams.spec, config.mat).eval()
        self._view: TeamView | None = None

    @property
    def team(self) -> TeamSpec:
        """What its agents see and do."""
        return self._teams.spec

    def load(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the learner's weights."""
        own = self.policy.state_dict()
        for name, tensor in state:
            own[name].copy_(tensor)

    @torch.inference_mode()
    def collect(self, step: int, *, fresh: bool) -> tuple[Segment, dict[str, Any]]:
        """Training step ``step``'s segment and what the driver is to know of it. ``fresh`` begins new episodes everywhere first.

        Episodes otherwise go on where the segment before left them. Everything random is drawn from the job's seed, the worker's
        number and ``step``. Raises ``EnvironmentFault``.
        """
        if fresh or self._view is None:
            self._view = self._teams.begin([self._seed(step, env) for env in range(self._teams.n_envs)])
        generator = torch.Generator().manual_seed(self._seed(step, -1))
        kept: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(Segment)}
        episodes: list[Episode] = []
        for _ in range(self.settings.segment_steps):
            self._view, ended = self._step(self._view, generator, kept)
            episodes += ended
        kept["next_values"].append(self._values(self._view))
        self._shift_next_values(kept)
        segment = Segment(**{name: torch.stack(parts) for name, parts in kept.items()})
        summary = {
            "reward": float(segment.rewards.mean()),
            "returns": [e.total for e in episodes],
            "lengths": [e.steps for e in episodes],
            "truncated": [e.truncated for e in episodes],
            "steps": segment.rows,
        }
        return segment, summary

    def _step(self, view: TeamView, generator: torch.Generator, kept: dict[str, list[torch.Tensor]]) -> tuple[TeamView, list[Episode]]:
        """One joint action everywhere; what it was and led to joins ``kept``."""
        observations, legal = _tensors(view)
        rows, n = observations.shape[:2]
        order = torch.rand(rows, n, generator=generator).argsort(1) if self.config.mat.order == "shuffled" else None
        acted = self.policy.act(observations, legal, generator=generator, order=order)
        done = self._teams.step(acted.actions.numpy())
        last_values, next_active = torch.full((rows, n), torch.nan), torch.from_numpy(done.view.active.copy())
        if done.last is not None:
            ended = torch.from_numpy(done.ended)
            last_values[ended], next_active[ended] = self._values(done.last), torch.from_numpy(done.last.active)
        row = {"observations": observations, "legal": legal, "actions": acted.actions, "logprobs": acted.logprobs, "values": acted.values}
        row |= {"active": torch.from_numpy(view.active), "rewards": torch.from_numpy(done.rewards)}
        row |= {"terminated": torch.from_numpy(done.terminated), "truncated": torch.from_numpy(done.truncated)}
        row |= {"next_values": last_values, "next_active": next_active}
        row |= {"order": torch.empty(rows, 0, dtype=torch.int64) if order is None else order}
        for name, value in row.items():
            kept[name].append(value)
        return done.view, done.episodes

    @staticmethod
    def _shift_next_values(kept: dict[str, list[torch.Tensor]]) -> None:
        """Where the episode went on (NaN so far), the next value is the one computed at the next step."""
        *ends, final = kept["next_values"]
        after = [*kept["values"][1:], final]
        kept["next_values"] = [torch.where(end.isnan(), value, end) for end, value in zip(ends, after, strict=True)]

    @torch.inference_mode()
    def evaluate(self, seeds: Sequence[int]) -> list[Episode]:
        """One greedy episode from each seed. Episodes of training are left alone."""
        return self.play(seeds, pictures=False, look=None)

    def play(self, seeds: Sequence[int], *, pictures: bool, look: Callable[[Teams, int], None] | None) -> list[Episode]:
        """Greedy episodes; ``look(environments, running)`` is called before every step while ``running`` of them are under way.

        Raises ``EnvironmentFault`` where an environment does not end.
        """
        n_envs = min(self.settings.envs, len(seeds))
        if self._watched is None or self._watched.n_envs != n_envs or pictures:
            if self._watched is not None:
                self._watched.close()
            self._watched = make_teams(self.settings, n_envs, pictures=pictures)
        teams, found = self._watched, []
        for first in range(0, len(seeds), n_envs):
            part = list(seeds[first : first + n_envs])
            found += self._play_batch(teams, part, look)
        return found

    def frames(self, seed: int) -> list[np.ndarray]:
        """The greedy episode of ``seed`` as at most ``MAX_FRAMES`` pictures, uint8 [H, W, 3].

        Raises ``EnvironmentProblem`` where the environment draws nothing.
        """
        found: list[np.ndarray] = []

        def look(teams: Teams, running: int) -> None:
            if running and len(found) < MAX_FRAMES:
                found.append(teams.render(0))

        self.play([seed], pictures=True, look=look)
        return found

    def _play_batch(self, teams: Teams, seeds: list[int], look: Callable[[Teams, int], None] | None) -> list[Episode]:
        """At most as many episodes as there are environments; those without a seed of their own play along unheard."""
        view = teams.begin([*seeds, *(seeds[:1] * (teams.n_envs - len(seeds)))])
        first: dict[int, Episode] = {}
        for _ in range(MAX_EPISODE):
            if look is not None:
                look(teams, len(seeds) - len(first))
            observations, legal = _tensors(view)
            done = teams.step(self.policy.act(observations, legal, greedy=True).actions.numpy())
            for episode in done.episodes:
                if episode.env < len(seeds):
                    first.setdefault(episode.env, episode)
            if len(first) == len(seeds):
                return [first[env] for env in range(len(seeds))]
            view = done.view
        raise EnvironmentFault(f"{self.settings.name}: an episode of evaluation went on for {MAX_EPISODE} steps; set multi_agent.max_steps")

    def _values(self, view: TeamView) -> torch.Tensor:
        return self.policy.values(*_tensors(view))

    def _seed(self, step: int, env: int) -> int:
        """Of this worker at ``step``: an environment's, or (-1) that of the sampled actions."""
        return int(np.random.SeedSequence([self.config.seed, self.index, step, env + 1]).generate_state(1)[0])


MAX_EPISODE = 100_000
"""Steps after which an episode of evaluation is taken for one that never ends."""


def _tensors(view: TeamView) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(view.observations), torch.from_numpy(view.legal)
