"""Several tasks for one network: their observations, agent numbers and actions are padded to the greatest of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig, PadConfig
from reasoner_ray.errors import ReasonerError


def task_settings(config: MultiAgentConfig) -> dict[str, MultiAgentConfig]:
    """Each task's settings by its label, all padded to one size; without ``tasks`` the job's own under the empty label.

    Makes an environment of each, since an environment alone knows its sizes. Raises ``ConfigError``, ``EnvironmentProblem``,
    ``EnvironmentFault``.
    """
    if not config.tasks:
        return {"": config}
    settings = {label: config.task(label) for label in config.tasks}
    sizes = []
    for label, one in settings.items():
        with of_task(label):
            sizes.append(_sizes(one))
    pad = PadConfig(**{name: max(getattr(size, name) for size in sizes) for name in PadConfig.model_fields})
    return {label: one.model_copy(update={"pad": pad}) for label, one in settings.items()}


@contextmanager
def of_task(label: str) -> Iterator[None]:
    """Errors of one of several tasks name it; of a job without ``tasks`` (the empty label) they stay as they are."""
    try:
        yield
    except ReasonerError as error:
        if not label:
            raise
        raise type(error)(f"multi_agent.tasks.{label}: {error}") from error


def _sizes(config: MultiAgentConfig) -> PadConfig:
    """What a task has, its own padding included."""
    teams = make_teams(config, 1)
    team = teams.spec
    teams.close()
    agents = max(config.pad.agents, len(team.agents))
    own = team.observation - (agents if config.agent_id else 0)
    return PadConfig(observation=own, agents=agents, choices=team.actions.n_choices, dims=team.actions.n_dims)
