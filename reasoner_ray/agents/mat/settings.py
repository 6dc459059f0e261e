"""Settings of the Multi-Agent Transformer (``kind: mat``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from reasoner_ray.agents import SCRATCH
from reasoner_ray.section import Section
from reasoner_ray.sync.backends import rank_gpus

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class MatConfig(Section):
    """The network and its PPO. Epochs, minibatches, learning rate and clipping of gradients are the learner's own settings."""

    variant: Literal["mat", "mat_dec", "encoder_only", "decoder_only"] = Field(
        "mat",
        description="mat_dec: the encoder is the critic alone, each agent acts by one shared MLP on its own observation; encoder_only: "
        "all agents act at once from the encoder; decoder_only: observations reach the decoder without attention among them",
    )
    blocks: int = Field(1, ge=1, description="blocks of the encoder, and of the decoder")
    width: int = Field(64, ge=1)
    heads: int = Field(1, ge=1, description="attention heads; divides width")
    expansion: int = Field(1, ge=1, description="hidden width of a block's MLP, in widths")
    order: Literal["fixed", "shuffled"] = Field("fixed", description="in which order agents act: the environment's, or a new one each time")
    std_init: float = Field(1.0, description="continuous actions: s of the deviation 0.5 sigmoid(s) at the beginning; 0 gives 0.25")
    gamma: float = Field(0.99, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.05, gt=0, description="of the ratio, and of the value's change (in units of normalised returns)")
    entropy: float = Field(0.01, ge=0, description="coefficient of the entropy bonus")
    value_coef: float = Field(1.0, ge=0)
    clip_value: bool = True
    huber: float = Field(10.0, gt=0, description="error from which the value's loss is linear, in units of normalised returns")
    advantage: Literal["joint", "per_agent"] = Field(
        "per_agent",
        description="joint: one for the team from the mean of the agents' values (the paper); per_agent: each its own (its code)",
    )
    normalise_advantage: bool = True
    value_norm: bool = Field(True, description="normalise returns by running moments")
    value_norm_beta: float = Field(0.99999, gt=0, lt=1, description="weight of the past in the moments, an update")
    mask_policy: bool = Field(True, description="agents that have died do not count in the policy's loss")
    mask_value: bool = Field(
        True, description="nor in the value's, where each earns its own reward (a team goes on earning for its dead, so their values count)"
    )


def mat_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A job's plain tree with the optimiser of the paper's code and new weights, where the job says nothing of them."""
    defaults: dict[str, dict[str, Any]] = {"model": {"path": SCRATCH}, "learner": {"adam_eps": 1e-5, "betas": (0.9, 0.999)}}
    given = {key: tree.get(key, {}) for key in defaults}
    return {**tree, **{key: {**value, **given[key]} for key, value in defaults.items() if isinstance(given[key], dict)}}


def mat_problems(config: JobConfig) -> list[str]:
    """Every combination of keys that kind mat cannot work with, each as one sentence."""
    mat, learner, problems = config.mat, config.learner, []
    if mat.width % mat.heads:
        problems.append(f"mat.heads: {mat.heads} does not divide mat.width={mat.width}")
    if learner.zero_stage == 3:
        problems.append("learner.zero_stage: the network of kind mat is small, and stage 3 would split it; take 2 or below")
    if learner.lora is not None:
        problems.append("learner.lora: kind mat trains a network of its own from scratch; set learner.lora=null")
    if mat.order == "shuffled" and mat.variant in ("mat_dec", "encoder_only"):
        problems.append(f"mat.order: agents of mat.variant={mat.variant} act all at once, so there is no order to shuffle; set it to fixed")
    if config.trainer.max_staleness:
        problems.append("trainer.max_staleness: kind mat learns from the segments just collected, never from older ones; set it to 0")
    if config.trainer.max_mismatch_k3 is not None:
        problems.append("trainer.max_mismatch_k3: kind mat checks every step against sync.probe_tolerance instead; set it to null")
    if config.sync.backend not in ("auto", "object_store"):
        problems.append(
            f"sync.backend: {config.sync.backend} moves weights between GPUs, and workers of kind mat act on CPUs; set it to auto"
        )
    tasks = max(1, len(config.multi_agent.tasks))
    if config.rollout.workers % tasks:
        problems.append(
            f"rollout.workers: {config.rollout.workers} cannot be shared evenly by the {tasks} tasks of multi_agent.tasks, which a worker "
            f"plays one of; set it to a multiple of {tasks}"
        )
    rows = config.multi_agent.envs * config.multi_agent.segment_steps * config.rollout.workers // tasks
    if rows < learner.updates_per_step * learner.ranks:
        each = " of each task" if tasks > 1 else ""
        problems.append(f"learner.updates_per_step: {rows} environment steps{each} cannot be shared by {learner.updates_per_step} updates")
    return problems


def unused_problems(config: JobConfig) -> list[str]:
    """What a job of any kind sets although its kind never looks at it, each as one sentence."""
    problems, kind = [], config.kind
    if kind != "mat" and config.multi_agent.tasks:
        problems.append(f"multi_agent.tasks: kind {kind} does not play several tasks at once, only kind mat does; leave them out")
    if kind != "mat" and config.tracking.video_every:
        problems.append(f"tracking.video_every: kind {kind} draws no episodes in training, only kind mat does; set it to 0")
    if kind in ("mat", "agdc", "sequence", "prm", "value") and config.trainer.eval_samples:
        problems.append(f"trainer.eval_samples: kind {kind} is not evaluated by sampled answers; set it to 0")
    return problems


def mat_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from a job of kind mat, for ``--dry-run``."""
    env, learner, workers = config.multi_agent, config.learner, config.rollout.workers
    per_step = workers * env.envs * env.segment_steps
    return {
        "environments": workers * env.envs,
        "tasks": max(1, len(env.tasks)),
        "environment steps per step": per_step,
        "environment steps in all": per_step * config.trainer.steps,
        "environment steps per update": per_step // learner.updates_per_step,
        "optimiser steps per step": learner.updates_per_step * learner.epochs,
        "optimiser steps in all": learner.updates_per_step * learner.epochs * config.trainer.steps,
        "learner GPUs where there are GPUs": learner.ranks * rank_gpus(config),
        "run folder": str(config.run_dir),
    }
