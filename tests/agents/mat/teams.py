"""Small teams for the tests."""

from __future__ import annotations

from typing import Any

import torch

from reasoner_ray.agents.mat.network import MultiAgentTransformer
from reasoner_ray.agents.mat.settings import MatConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamSpec

LAYOUTS = {
    "discrete": ActionLayout(choices=(3, 3, 3, 3), dims=(0, 0, 0, 0)),
    "unequal": ActionLayout(choices=(3, 2, 4, 2), dims=(0, 0, 0, 0)),
    "continuous": ActionLayout(choices=(0, 0, 0, 0), dims=(2, 1, 2, 2)),
    "semi_discrete": ActionLayout(choices=(3, 3, 3, 0), dims=(0, 0, 0, 1)),
    "both": ActionLayout(choices=(3, 3, 3, 3), dims=(2, 2, 2, 2)),
}
OBSERVATION = 6


def team(layout: str) -> TeamSpec:
    actions = LAYOUTS[layout]
    return TeamSpec(agents=tuple(f"agent_{i}" for i in range(actions.n_agents)), observation=OBSERVATION, actions=actions)


def network(layout: str = "discrete", seed: int = 0, gain: float = 1.0, **settings: Any) -> MultiAgentTransformer:
    """A network whose every weight matters: the vetted initialisation makes outputs almost equal, which would hide errors."""
    torch.manual_seed(seed)
    net = MultiAgentTransformer(team(layout), MatConfig(**{"width": 8, "heads": 2, "blocks": 2} | settings))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(gain * 0.4 * torch.randn_like(parameter))
    return net


def situation(layout: str = "discrete", rows: int = 5, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations [rows, n, OBSERVATION] and a random mask with at least one legal choice an agent."""
    generator = torch.Generator().manual_seed(seed)
    spec = LAYOUTS[layout]
    observations = torch.randn(rows, spec.n_agents, OBSERVATION, generator=generator)
    legal = torch.from_numpy(spec.legal).expand(rows, -1, -1).clone()
    if spec.n_choices:
        free = torch.rand(legal.shape, generator=generator) < 0.7
        free[..., 0] = True
        legal &= free
    return observations, legal
