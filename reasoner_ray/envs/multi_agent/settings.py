"""Settings of environments for teams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reasoner_ray.section import Section


class MultiAgentConfig(Section):
    """The environments of ``kind: mat``. How many workers step them is ``rollout.workers``."""

    name: str = Field("simple_spread", description="a registered environment, or module:function of your own that makes a ParallelEnv")
    args: dict[str, Any] = Field(default_factory=dict, description="passed to it")
    envs: int = Field(16, ge=1, description="environments a worker steps at once")
    segment_steps: int = Field(25, ge=1, description="steps of each environment a training step")
    deadline_s: float = Field(
        3600.0, gt=0, description="seconds a worker may take for a segment or its part of an evaluation before the job ends"
    )
    max_steps: int | None = Field(
        None, ge=1, description="steps after which an episode ends by time, where the environment has no such end"
    )
    reward: Literal["mean", "sum", "own"] = Field(
        "mean", description="what each agent earns: the mean or the sum of all agents' rewards (a team), or its own"
    )
    agent_id: bool = Field(True, description="append the agent's number, one-hot, to its observation; the network knows agents by it alone")
    standardise: bool = Field(False, description="every observation minus its own mean, divided by its own deviation (multi-agent MuJoCo)")
