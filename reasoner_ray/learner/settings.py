"""Settings of the DeepSpeed learners, and which critic goes with which algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from reasoner_ray.section import Section

if TYPE_CHECKING:
    from reasoner_ray.algorithms import Algorithm
    from reasoner_ray.config import JobConfig


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


CriticKind = Literal["none", "shared", "frozen", "separate", "soft_q", "soft_q_frozen", "joint"]
SOFT_CRITICS = ("soft_q", "soft_q_frozen")


class LearnerConfig(Section):
    """DeepSpeed learners."""

    ranks: int = Field(1, ge=1, description="learner actors, one DeepSpeed rank each")
    gpus: float | None = Field(
        None, gt=0, le=1, description="GPU a rank reserves with Ray; None: a whole one, or a part where there are too few GPUs"
    )
    zero_stage: Literal[0, 1, 2, 3] = 0
    lr: float = Field(1e-6, gt=0)
    critic_lr: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0, description="optimiser steps over which the learning rates rise linearly")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="after the warm-up; cosine and linear fall to 0 over the optimiser steps of trainer.steps"
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = Field(1e-8, gt=0, description="in Adam's divisor: gradients far below it, such as rounding errors, move nothing")
    max_grad_norm: float = Field(1.0, gt=0)
    max_kl: float | None = Field(
        None, gt=0, description="nats; an update whose policy is further (k3) from the one that the step began with moves the critic alone"
    )
    updates_per_step: int = Field(1, ge=1, description="optimiser steps a training step; divides tasks_per_step")
    epochs: int = Field(1, ge=1, description="passes over a step's trajectories")
    tokens_per_microbatch: int = Field(4096, ge=1, description="packed tokens of one forward and backward pass")
    share_prefixes: bool = Field(True, description="compute tokens that trajectories share once (prefix-tree packing)")
    gradient_checkpointing: bool = False
    logprob_chunk: int = Field(1024, ge=1, description="positions whose logits exist at once")
    critic: CriticKind = Field(
        "shared",
        description="value head: on the policy's (detached) hidden states, on the frozen initial model (POAD), or a model of its own; "
        "soft_q: a Q network and its target, two more models (ETPO), soft_q_frozen: the same as two LM heads on the initial model; "
        "joint: a head that trains the model with it (kind prm, value)",
    )
    critic_hidden: tuple[int, ...] = (1024, 512)
    critic_warmup: int = Field(0, ge=0, description="first training steps in which the critic alone learns, and the policy stays as it is")
    lora: LoraConfig | None = None
    cpus: float = Field(1, ge=0)
    torch_threads: int | None = Field(None, ge=1, description="CPU threads a rank; None: an even share of its node's cores")
    collective_timeout_s: float = Field(600.0, gt=0, description="a collective that takes longer raises")
    restart_limit: int = Field(3, ge=0)


def critic_problems(config: JobConfig, algorithm: Algorithm[Any]) -> list[str]:
    """Every combination of keys round the critic that cannot work, each as one sentence."""
    problems = _timing_problems(config, algorithm)
    if config.kind != "rl":
        return problems
    learner = config.learner
    problems += _soft_problems(learner, algorithm)
    if algorithm.needs_critic and learner.critic == "none":
        problems.append(f"learner.critic: {algorithm.name} needs a critic; set learner.critic=shared, or take algorithm.name=grpo")
    if not algorithm.needs_critic and learner.critic in ("frozen", "separate"):
        problems.append(
            f"learner.critic: {algorithm.name} has no critic, so {learner.critic!r} would only take memory; set learner.critic=none"
        )
    if learner.critic == "joint":
        problems.append("learner.critic: 'joint' is the head of kind prm and value; a policy learns beside learner.critic=shared")
    if learner.critic == "separate" and learner.lora is not None:
        problems.append("learner.critic: 'separate' trains a second full model; with learner.lora take 'frozen' or 'shared'")
    return problems


def _timing_problems(config: JobConfig, algorithm: Algorithm[Any]) -> list[str]:
    """Of the settings that let the critic learn while the policy stays as it is."""
    learner, problems = config.learner, []
    apart = config.kind in ("rl", "rounds") and (algorithm.needs_critic or algorithm.needs_soft_critic)
    for name in ("critic_warmup", "max_kl"):
        if getattr(learner, name) and not apart:
            who = algorithm.name if config.kind == "rl" else f"kind {config.kind}"
            neutral = type(learner).model_fields[name].default
            problems.append(
                f"learner.{name}: {who} has no critic beside a policy; set learner.{name}={'null' if neutral is None else neutral}"
            )
    if learner.critic_warmup >= config.trainer.steps:
        problems.append(f"learner.critic_warmup: the policy would never learn in trainer.steps={config.trainer.steps} steps; set it below")
    return problems


def _soft_problems(learner: LearnerConfig, algorithm: Algorithm[Any]) -> list[str]:
    """Of a soft critic."""
    soft = learner.critic in SOFT_CRITICS
    if algorithm.needs_soft_critic and not soft:
        return [f"learner.critic: {algorithm.name} learns a Q of tokens, not a value; set learner.critic=soft_q (or soft_q_frozen)"]
    if not soft:
        return []
    problems = []
    if not algorithm.needs_soft_critic:
        problems.append(
            f"learner.critic: {learner.critic!r} is the critic of etpo, which {algorithm.name} does not read; "
            f"set learner.critic={'shared' if algorithm.needs_critic else 'none'}"
        )
    if learner.lora is not None and learner.critic == "soft_q":
        problems.append("learner.lora: 'soft_q' trains a second full model; set learner.critic=soft_q_frozen, or learner.lora=null")
    if learner.zero_stage == 3:
        problems.append(
            f"learner.zero_stage: the target of {learner.critic!r} averages whole parameters, which stage 3 splits; take 2 or below"
        )
    return problems
