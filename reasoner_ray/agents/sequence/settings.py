"""Settings of sequence models that learn to act (``kind: sequence``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from reasoner_ray.agents import SCRATCH
from reasoner_ray.section import Section
from reasoner_ray.sync.backends import rank_gpus

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class WorldConfig(Section):
    """The single-agent Gymnasium environment that a sequence model acts in."""

    id: str = Field("CartPole-v1", description="a Gymnasium id whose actions are choices or bounded numbers")
    args: dict[str, Any] = Field(default_factory=dict, description="passed to it")
    max_steps: int | None = Field(None, ge=1, description="steps after which an episode ends; null: the environment's own limit")
    envs: int = Field(50, ge=1, description="environments that a worker steps at once")


class OnlineConfig(Section):
    """Online Decision Transformer: after the offline steps, each step plays episodes with sampled actions and learns from a buffer."""

    offline_steps: int = Field(17, ge=0, description="training steps on the data sets alone, before the first episode is played")
    episodes: int = Field(1, ge=1, description="episodes a step")
    buffer: int = Field(1000, ge=1, description="trajectories kept: at first the best of the data sets, which new ones push out")
    target: float = Field(description="return asked of the episodes played: the paper asks twice what an expert gets")
    entropy_floor: float | None = Field(
        None,
        description="nats a step below which entropy is held up; null: minus the number of action dimensions, or 0 for choices",
    )
    temperature: float = Field(0.1, gt=0, description="weight of the entropy at the beginning (the dual variable)")
    temperature_lr: float = Field(1e-4, gt=0)


class CollectConfig(Section):
    """`reasoner collect`: episodes of a policy, written as a Minari data set."""

    policy: str = Field(
        "random",
        description="random; the folder model/ of a run of kind sequence or mat; module:function of your own; or replay: nothing is "
        "played, the episodes are those that a run with sequence.online learns from",
    )
    run: str | None = Field(None, description="policy replay: the folder of that run, finished or not")
    episodes: int = Field(1000, ge=1, description="how many; of replay the newest, at most those that the run keeps")
    noise: float = Field(0.0, ge=0, le=1, description="share of the steps at which a random action is taken instead")
    out: str | None = Field(None, description="folder of the data set, its name ending in -v0 or the like")
    target: float | None = Field(None, description="return asked of a model of kind sequence; null: the first of sequence.targets")


class SequenceConfig(Section):
    """The network, its data and its evaluation. Optimiser, learning rate and clipping are the learner's own settings."""

    variant: Literal["dt", "bc"] = Field("dt", description="dt: actions given the return still to come; bc: the same without returns")
    world: WorldConfig = WorldConfig()
    data: tuple[str, ...] = Field((), description="folders of Minari data sets")
    keep_top: float | None = Field(
        None, gt=0, le=1, description="share of the steps that is learnt from, those of the trajectories of highest return (%BC); null: all"
    )
    delayed: bool = Field(False, description="all of an episode's reward at its last step, and a constant return asked for in evaluation")
    targets: tuple[float, ...] = Field((1.0,), min_length=1, description="returns asked for in evaluation; eval/return is of the first")
    sample: bool = Field(False, description="evaluation: draw actions instead of taking the likeliest (or mean) one")
    context: int = Field(20, ge=1, description="steps that the network sees")
    eval_context: int | None = Field(None, ge=1, description="steps that it sees when it acts; null: as in training")
    width: int = Field(128, ge=1)
    blocks: int = Field(3, ge=1)
    heads: int = Field(1, ge=1, description="attention heads; divides width")
    activation: str = Field("relu", description="of the blocks, by its name in transformers")
    dropout: float = Field(0.1, ge=0, lt=1)
    init_std: float = Field(0.02, gt=0, description="deviation of the blocks' first weights")
    time_embedding: bool = Field(True, description="add a learnt vector for the time step to the tokens of the step")
    return_scale: float = Field(1.0, gt=0, description="returns are divided by it before the network sees them (hopper: 1000)")
    batch: int = Field(64, ge=1, description="windows an optimiser step")
    online: OnlineConfig | None = None
    collect: CollectConfig = CollectConfig()


def sequence_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A job's plain tree with the optimiser of the paper's code and new weights, where the job says nothing of them."""
    learner = {"lr": 1e-4, "weight_decay": 1e-4, "max_grad_norm": 0.25, "betas": (0.9, 0.999)}
    defaults: dict[str, dict[str, Any]] = {"model": {"path": SCRATCH}, "learner": learner}
    given = {key: tree.get(key, {}) for key in defaults}
    return {**tree, **{key: {**value, **given[key]} for key, value in defaults.items() if isinstance(given[key], dict)}}


def sequence_problems(config: JobConfig) -> list[str]:
    """Every combination of keys that kind sequence cannot work with, each as one sentence."""
    sequence, learner, problems = config.sequence, config.learner, []
    if not sequence.data:
        problems.append("sequence.data: kind sequence learns from Minari data sets; name their folders (`reasoner collect` writes one)")
    if sequence.collect.run is not None and sequence.collect.policy != "replay":
        problems.append(f"sequence.collect.run: policy {sequence.collect.policy} has no run; set sequence.collect.policy=replay")
    if sequence.width % sequence.heads:
        problems.append(f"sequence.heads: {sequence.heads} does not divide sequence.width={sequence.width}")
    if (sequence.eval_context or 0) > sequence.context:
        problems.append(f"sequence.eval_context: more than sequence.context={sequence.context}")
    if learner.zero_stage == 3:
        problems.append("learner.zero_stage: the network of kind sequence is small, and stage 3 would split it; take 2 or below")
    if learner.lora is not None:
        problems.append("learner.lora: kind sequence trains a network of its own; set learner.lora=null")
    if learner.epochs != 1:
        problems.append("learner.epochs: windows are drawn at random; set learner.epochs=1 and raise learner.updates_per_step")
    if sequence.batch < learner.ranks:
        problems.append(f"sequence.batch: {sequence.batch} windows cannot be shared by learner.ranks={learner.ranks}")
    if sequence.online is not None:
        problems += _online_problems(config)
    return problems


def _online_problems(config: JobConfig) -> list[str]:
    sequence, problems = config.sequence, []
    if sequence.variant == "bc" or sequence.keep_top is not None:
        problems.append("sequence.online: it learns from returns of all it plays; set sequence.variant=dt and sequence.keep_top=null")
    if config.sync.backend not in ("auto", "object_store"):
        problems.append(f"sync.backend: {config.sync.backend} moves weights between GPUs, and workers act on CPUs; set it to auto")
    return problems


def sequence_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from a job of kind sequence, for ``--dry-run``."""
    sequence, learner, trainer = config.sequence, config.learner, config.trainer
    online = sequence.online
    return {
        "tokens a window": sequence.context * (3 if sequence.variant == "dt" else 2),
        "windows a step": sequence.batch * learner.updates_per_step,
        "optimiser steps in all": learner.updates_per_step * trainer.steps,
        "episodes played in training": 0 if online is None else online.episodes * max(0, trainer.steps - online.offline_steps),
        "episodes of an evaluation": trainer.eval_tasks * len(sequence.targets),
        "learner GPUs where there are GPUs": learner.ranks * rank_gpus(config),
        "run folder": str(config.run_dir),
    }
