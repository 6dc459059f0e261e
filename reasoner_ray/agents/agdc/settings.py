"""Settings of agents that detect and cease their own goals (``kind: agdc``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from reasoner_ray.envs.object_search.settings import ObjectSearchConfig
from reasoner_ray.envs.source_term.settings import SensorConfig, SourceTermConfig
from reasoner_ray.errors import ConfigError
from reasoner_ray.section import Section

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class BeliefConfig(Section):
    """A particle filter over the source's parameters."""

    particles: int = Field(500, ge=2)
    resample_below: float = Field(
        0.5, gt=0, lt=1, description="effective sample size, as a share of the particles, that calls for resampling"
    )
    move: Literal["posterior", "reading", "none"] = Field(
        "posterior",
        description="Metropolis moves after resampling: by every reading so far, of which none is given full weight at once; by the newest "
        "reading alone, as in published code; or none",
    )
    move_steps: int = Field(3, ge=1, description="moves of each particle after resampling")
    sensor: SensorConfig | None = Field(None, description="what the filter takes the sensor for; null: the environment's")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the particles live; cuda: of env runners and of evaluation alike")
    gpu_share: float = Field(0.25, gt=0, le=1, description="cuda: what each env runner reserves of a GPU, of rollout.workers 2 and more")


def taken_sensor(belief: BeliefConfig, environment: SourceTermConfig) -> SensorConfig:
    """What a filter takes the sensor for. Raises ``ConfigError`` where that has no noise: no particle ever explains its readings."""
    sensor = belief.sensor or environment.sensor
    if sensor.noise == 0 and sensor.background == 0:
        raise ConfigError(
            "agdc.belief.sensor: a filter cannot work with a sensor of noise 0 and background 0, whose readings no particle hits exactly; "
            "give it one that has noise (agdc.belief.sensor.noise=0.5), whatever agdc.environment.sensor has"
        )
    return sensor


class FeedbackConfig(Section):
    """Self-feedback: what an agent adds to the environment's reward. It reads the belief alone, never the truth."""

    stop: float = Field(100.0, description="earned when the agent ends its episode")
    step: float = Field(0.0, description="paid each step, on top of what the environment takes")
    information: float = Field(0.0, ge=0, description="times the fall of log(spread) in a step: what was learnt")
    patience: int = Field(1, ge=1, description="steps in a row for which the rule must hold")
    min_steps: int = Field(0, ge=0, description="steps before which no agent ends its episode")

    @model_validator(mode="after")
    def _possible(self) -> FeedbackConfig:
        if not all(math.isfinite(value) for value in (self.stop, self.step, self.information)):
            raise ValueError("stop, step, information: must be finite")
        return self


class CalibrationConfig(Section):
    """A fitted probability of being right, by its numbers (``cessation.Calibration``)."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float


class CessationConfig(Section):
    """When an agent takes its goal for reached."""

    rule: str = Field("spread", description="spread, deviation, mass, calibrated, never, or module:Class of your own")
    threshold: float | tuple[float, ...] = Field(
        0.2,
        description="spread: m, of the position's root total variance; deviation: a standard deviation for each parameter, or one for all; "
        "mass: probability near the mean; calibrated: probability of being right",
    )
    calibration: str | CalibrationConfig | None = Field(
        None, description="calibrated: the file that `reasoner eval JOB agdc.calibrate=FILE` wrote, or its numbers"
    )


class AgdcConfig(Section):
    """A search that ends itself: problem, belief, rule, self-feedback, and what learns it (RLlib)."""

    problem: str = Field(
        "source_term",
        description="source_term, with `environment` and `belief`; object_search, with `objects`; or module:Class of your own "
        "(reasoner_ray/agents/agdc/problem.py), which is made from this section",
    )
    environment: SourceTermConfig = SourceTermConfig()
    belief: BeliefConfig = BeliefConfig()
    objects: ObjectSearchConfig = ObjectSearchConfig()
    cessation: CessationConfig = CessationConfig(threshold=0.5)
    feedback: FeedbackConfig = FeedbackConfig()
    detect: bool = Field(True, description="false: no belief; the policy sees observations alone and never ends an episode")
    tolerance: float = Field(
        1.0, gt=0, description="an estimate whose error is at most this is right; of source_term m, of object_search objects left"
    )
    policy: str = Field(
        "trained",
        description="`reasoner eval`: trained (model.path), random, or a planner: infotaxis, entrotaxis, dcee, oracle; of object_search "
        "coverage, greedy",
    )
    algorithm: Literal["ppo", "dqn", "ddpg"] = "ppo"
    settings: dict[str, Any] = Field(default_factory=dict, description="passed to the algorithm's `training()` of RLlib")
    hidden: tuple[int, ...] = Field((128, 128), description="widths of the networks' layers")
    episodes_at_once: int = Field(32, ge=1, description="environments of an env runner (rollout.workers says how many of these)")
    fragment: int | None = Field(None, ge=1, description="steps of each environment between learning; null: the algorithm's own")
    steps_per_iteration: int = Field(4000, ge=1, description="dqn, ddpg: environment steps of a training step (of ppo: its train batch)")
    learner: Literal["rllib", "deepspeed"] = Field(
        "rllib", description="who steps the optimiser; deepspeed takes learner.zero_stage 0 to 2"
    )
    calibrate: str | None = Field(None, description="`reasoner eval`: fit the rule `calibrated` to the episodes and write it here")
    gif: str | None = Field(None, description="`reasoner eval`: play the episode of the first seed and write it here as an animation")


def _source_term_problems(agdc: AgdcConfig) -> list[str]:
    problems = []
    if agdc.detect:
        try:
            taken_sensor(agdc.belief, agdc.environment)
        except ConfigError as error:
            problems.append(str(error))
    if agdc.algorithm == "dqn" and agdc.environment.moves != "discrete":
        problems.append("agdc.algorithm: dqn chooses among moves; set agdc.environment.moves=discrete, or take ppo or ddpg")
    if agdc.algorithm == "ddpg" and agdc.environment.moves != "heading":
        problems.append("agdc.algorithm: ddpg learns a heading; set agdc.environment.moves=heading, or take ppo or dqn")
    return problems


def _object_search_problems(agdc: AgdcConfig) -> list[str]:
    problems = []
    if agdc.algorithm == "ddpg":
        problems.append("agdc.algorithm: ddpg learns a heading, and object_search has moves; take ppo or dqn")
    if agdc.belief.device != "cpu":
        problems.append("agdc.belief.device: the particle filter is source_term's, and object_search has none; set agdc.belief.device=cpu")
    if agdc.tolerance >= 1:
        problems.append(f"agdc.tolerance: with {agdc.tolerance:g} an end with an object left would count as right; set agdc.tolerance=0.5")
    return problems


def _cessation_problems(agdc: AgdcConfig) -> list[str]:
    """An agent that could never end an episode, or a fit that nothing reads."""
    problems = []
    steps = {"source_term": agdc.environment.max_steps, "object_search": agdc.objects.max_steps}.get(agdc.problem)
    for key in ("patience", "min_steps"):
        wanted = getattr(agdc.feedback, key)
        if agdc.detect and steps is not None and wanted > steps:
            problems.append(f"agdc.feedback.{key}: {wanted} steps are more than an episode has ({steps}), so no agent could ever end one")
    if agdc.cessation.calibration is not None and agdc.cessation.rule != "calibrated":
        problems.append(f"agdc.cessation.calibration: rule {agdc.cessation.rule} reads none; set agdc.cessation.rule=calibrated")
    return problems


_OF_PROBLEM: dict[str, Callable[[AgdcConfig], list[str]]] = {
    "source_term": _source_term_problems,
    "object_search": _object_search_problems,
}


def agdc_problems(config: JobConfig) -> list[str]:
    """Every combination of keys that kind agdc cannot work with, each as one sentence."""
    agdc = config.agdc
    problems = [*_OF_PROBLEM.get(agdc.problem, lambda _: [])(agdc), *_cessation_problems(agdc)]
    if agdc.learner == "rllib" and config.learner.zero_stage:
        problems.append("learner.zero_stage: RLlib's own learner has none; set agdc.learner=deepspeed")
    if config.learner.zero_stage == 3:
        problems.append("learner.zero_stage: RLlib reads whole parameters, which stage 3 splits; take 2 or below")
    return problems


def agdc_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from a job of kind agdc, for ``--dry-run``."""
    agdc = config.agdc
    return {
        "episodes at once": config.rollout.workers * agdc.episodes_at_once,
        "particles at once": "none"
        if agdc.problem != "source_term"
        else config.rollout.workers * agdc.episodes_at_once * agdc.belief.particles * agdc.detect,
        "learner actors": config.learner.ranks if config.learner.ranks > 1 else "none, the driver learns",
        "run folder": str(config.run_dir),
    }
