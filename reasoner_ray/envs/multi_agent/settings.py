"""Settings of environments for teams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from reasoner_ray.section import Section

Faulty = dict[str, Literal["all"] | list[int]]
Features = list[tuple[int, int]]


def _some_fault(faulty: Faulty | None) -> Faulty | None:
    """An agent with no dimension held has no fault."""
    if none := [agent for agent, dims in (faulty or {}).items() if not dims]:
        raise ValueError(f"{none[0]} has no dimension that is held; name some, take all, or leave the agent out")
    return faulty


class PadConfig(Section):
    """Least sizes of what a network sees and does, so that it fits other teams too: zeros that nobody sees, actions nobody may take."""

    observation: int = Field(0, ge=0, description="numbers of an agent's own observation")
    agents: int = Field(0, ge=0, description="length of an agent's number, one-hot")
    choices: int = Field(0, ge=0)
    dims: int = Field(0, ge=0, description="continuous dimensions of an action")


class TaskConfig(Section):
    """What one of several tasks has of its own; everything else is as the section multi_agent says. ``null`` undoes what that says."""

    name: str | None = Field(None, description="None: the section's")
    args: dict[str, Any] = Field(
        default_factory=dict, description="laid over the section's, key by key; all there are where the task has another name"
    )
    max_steps: int | None = Field(None, ge=1)
    faulty: Faulty | None = None
    features: Features | None = None
    _fault = field_validator("faulty")(_some_fault)

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was not given is not written, where it would be read as a null that was."""
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


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
    faulty: Faulty = Field(
        default_factory=dict,
        description="agents whose actions have no effect (all: 0 of a box, the first choice), or the dimensions of their boxes held at 0",
    )
    features: Features | None = Field(
        None,
        description="what an agent's observation consists of, as [numbers, padded to] each, so that what means the same lies at the same "
        "place in teams of several sizes; None: all padding comes last",
    )
    pad: PadConfig = PadConfig()
    tasks: dict[str, TaskConfig] = Field(
        default_factory=dict,
        description="several environments for one network, by labels of your own; worker i plays task i modulo their number, and all are "
        "padded to the greatest",
    )

    _fault = field_validator("faulty")(_some_fault)

    @field_validator("tasks")
    @classmethod
    def _labels(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        """A label ends the name of a metric."""
        if bad := [label for label in tasks if not label or "/" in label]:
            raise ValueError(f"multi_agent.tasks: {bad[0]!r} cannot end a metric's name; take a label without a slash")
        return tasks

    def task(self, label: str) -> MultiAgentConfig:
        """The settings of one of ``tasks``."""
        own = self.tasks[label]
        given: dict[str, Any] = {key: getattr(own, key) for key in own.model_fields_set - {"name", "args"}}
        name = own.name or self.name
        below = self.args if name == self.name else {}  # another environment does not know the section's
        given |= {"name": name, "args": {**below, **own.args}, "tasks": {}}
        return self.model_copy(update={**given, "faulty": given.get("faulty", self.faulty) or {}})
