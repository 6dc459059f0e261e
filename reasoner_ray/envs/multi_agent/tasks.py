"""Several tasks for one network: their observations, agent numbers and actions are padded to the greatest of them."""

from __future__ import annotations

from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig, PadConfig


def task_settings(config: MultiAgentConfig) -> dict[str, MultiAgentConfig]:
    """Each task's settings by its label, all padded to one size; without ``tasks`` the job's own under the empty label.

    Makes an environment of each, since an environment alone knows its sizes. Raises ``ConfigError``, ``EnvironmentProblem``,
    ``EnvironmentFault``.
    """
    if not config.tasks:
        return {"": config}
    settings = {label: config.task(label) for label in config.tasks}
    sizes = [_sizes(one) for one in settings.values()]
    pad = PadConfig(**{name: max(getattr(size, name) for size in sizes) for name in PadConfig.model_fields})
    return {label: one.model_copy(update={"pad": pad}) for label, one in settings.items()}


def _sizes(config: MultiAgentConfig) -> PadConfig:
    """What a task has, its own padding included."""
    teams = make_teams(config, 1)
    team = teams.spec
    teams.close()
    agents = max(config.pad.agents, len(team.agents))
    own = team.observation - (agents if config.agent_id else 0)
    return PadConfig(observation=own, agents=agents, choices=team.actions.n_choices, dims=team.actions.n_dims)
