"""Settings of supervised training (``kind: sft | prm | value``) and of process rewards in RL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from reasoner_ray.agents.mat.settings import mat_defaults
from reasoner_ray.agents.sequence.settings import sequence_defaults
from reasoner_ray.section import Section
from reasoner_ray.steps import CutSetting, cut_problems
from reasoner_ray.sync.backends import rank_gpus

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class ConditionConfig(Section):
    """Return-conditioned fine-tuning: a control text that says how good a solution is stands before its prompt."""

    text: str = Field(
        "Quality {bucket} of {top}.\n", description="{bucket}: how many of `above` the reward exceeds; {top}: how many there are"
    )
    above: tuple[float, ...] = Field((0.5,), min_length=1, description="rising thresholds of the reward")

    @model_validator(mode="after")
    def _usable(self) -> ConditionConfig:
        if list(self.above) != sorted(set(self.above)):
            raise ValueError("above: thresholds must rise")
        try:
            told = {self.text.format(bucket=bucket, top=len(self.above)) for bucket in range(len(self.above) + 1)}
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"text: cannot be filled in ({type(error).__name__}: {error}); it may hold {{bucket}} and {{top}}") from error
        if len(told) <= len(self.above):
            raise ValueError("text: must hold {bucket}, or it tells nothing apart")
        return self


class SupervisedConfig(Section):
    """What a policy, a process reward model or a value model is taught from, and what it is evaluated on."""

    data: tuple[str, ...] = Field((), description="files of records (JSON lines, or *.parquet); sft: `task` is the task's own solutions")
    held_out: tuple[str, ...] = Field(
        (), description="files for evaluation, whose questions are not learnt; none: held_out_fraction of the questions in data"
    )
    held_out_fraction: float = Field(0.05, ge=0, lt=1, description="share of the questions that is kept for evaluation")
    batch: int = Field(64, ge=1, description="solutions an optimiser step")
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps at most")
    max_tokens: int = Field(2048, ge=2, description="longer solutions are left out, and counted")
    chat: bool = Field(False, description="a prompt that is text becomes the user's message in the tokenizer's chat template")
    separator: str = Field("\n\n", min_length=1, description="written after each step of a text record but the last")
    end_of_text: bool = Field(True, description="whether a text record's solution ends with the tokenizer's end-of-text token")
    head: Literal["scalar", "judge"] = Field(
        "scalar",
        description="prm: scalar puts a head on the model; judge teaches the chat model itself to say Yes or No when it is asked whether "
        'a step is correct, as the scorers\' judge asks (scorer: {question: ..., "yes": ..., "no": ...}, with quotes in YAML)',
    )
    labels: Literal["soft", "hard"] = Field("soft", description="prm: soft takes a label as the step's probability, hard makes it 0 or 1")
    hard_above: float = Field(0.0, ge=0, lt=1, description="hard: labels above this are 1 (0: right if any completion was, Math-Shepherd)")
    learn_above: float | None = Field(
        0.0, description="sft: of records with a reward those above this are learnt, so that wrong ones are not; null: all"
    )
    condition: ConditionConfig | None = Field(None, description="sft: learn all solutions, each told how good it is; needs rewards")
    keep_top: float | None = Field(None, gt=0, le=1, description="sft: learn this share of the solutions, those of highest reward (%BC)")
    gamma: float = Field(1.0, ge=0, le=1, description="value: discount a step of the reward at the end")
    processbench: tuple[str, ...] = Field((), description="files in ProcessBench's format for `reasoner eval`")
    threshold: float = Field(0.5, description="a step that scores below it is taken for wrong")
    scorer: dict[str, Any] = Field(default_factory=dict, description="`reasoner eval`: arguments of the step scorer `prm` beside the model")


class ProcessRewardConfig(Section):
    """Rewards at the ends of steps: ``outcome_weight * outcome + weight * process``."""

    scorer: str = Field("prm", description="a registered step scorer, or module:factory of your own")
    args: dict[str, Any] = Field(default_factory=dict, description="passed to the scorer, for example model: runs/prm/model")
    separator: CutSetting | None = Field(
        "\n\n", description="text that ends a step, or as search.separator by tokens or structure; null: every turn is one step"
    )
    transform: Literal["raw", "difference", "shaping", "minimum"] = Field(
        "minimum",
        description="raw: each step earns its score; difference: what it changes; shaping: the same, and the end gives it back, so that "
        "the best policy stays the best; minimum: only what lowers the lowest score so far, which long answers cannot farm",
    )
    initial: float = Field(0.0, description="difference, shaping: score of the question without a step")
    normalise: Literal["none", "group"] = Field("none", description="group: step rewards of a prompt's samples get mean 0 and deviation 1")
    weight: float = Field(1.0, description="of the process reward")
    outcome_weight: float = Field(1.0, description="of the reward that scoring.scorers give; evaluations always show that alone")


def kind_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A job's plain tree with the critic (of kind mat and sequence: optimiser and model) that its kind needs, where it names none."""
    if tree.get("kind") == "mat":
        return mat_defaults(tree)
    if tree.get("kind") == "sequence":
        return sequence_defaults(tree)
    head = {"critic": "joint", "critic_hidden": ()}
    supervised, learner = tree.get("supervised"), tree.get("learner", {})
    judged = isinstance(supervised, dict) and supervised.get("head") == "judge"
    defaults: dict[Any, dict[str, Any]] = {"sft": {"critic": "none"}, "prm": {"critic": "none"} if judged else head, "value": head}
    kind = tree.get("kind", "rl")
    if not isinstance(kind, str) or kind not in defaults or not isinstance(learner, dict):
        return tree
    return {**tree, "learner": {**defaults[kind], **learner}}


def supervised_problems(config: JobConfig) -> list[str]:
    """Every combination of keys that a supervised kind cannot work with, each as one sentence."""
    learner, kind, problems = config.learner, config.kind, []
    if kind == "sft" and learner.critic != "none":
        problems.append(f"learner.critic: kind sft trains no value head; set learner.critic=none (got {learner.critic!r})")
    if config.supervised.head == "judge":
        problems += _judge_problems(config)
    elif kind != "sft" and learner.critic != "joint":
        problems.append(f"learner.critic: kind {kind} is a head that trains the model with it; set learner.critic=joint")
    for key in ("updates_per_step", "epochs"):
        if getattr(learner, key) != 1:
            problems.append(f"learner.{key}: a step of kind {kind} is one update on supervised.batch solutions; set learner.{key}=1")
    if kind != "sft" and (config.supervised.condition is not None or config.supervised.keep_top is not None):
        problems.append(f"supervised.condition, supervised.keep_top: a policy's examples (kind sft); kind {kind} learns all of them")
    if config.supervised.condition is not None and config.supervised.learn_above is not None:
        problems.append("supervised.learn_above: supervised.condition learns from low rewards too; set supervised.learn_above=null")
    if kind == "sft" and config.rollout.temperature != 1:
        problems.append("rollout.temperature: kind sft learns the distribution at temperature 1; leave it at 1")
    names = [Path(file).name.split(".")[0] for file in config.supervised.processbench]
    if len({*names, "eval"}) <= len(names):  # figures are named for their file
        problems.append(f"supervised.processbench: files need names of their own, other than eval (got {', '.join(names)})")
    if kind != "sft" and "task" in config.supervised.data:
        problems.append(f"supervised.data: a task has solutions without labels, which kind {kind} needs; name files of labelled records")
    return problems


def _judge_problems(config: JobConfig) -> list[str]:
    """Of a job whose model is to judge with its own words."""
    settings, problems = config.supervised, []
    if config.kind != "prm":
        return [
            f"supervised.head: a judge is taught by labels of steps; take kind: prm, or supervised.head=scalar (got kind {config.kind})"
        ]
    if config.learner.critic != "none":
        problems.append(f"learner.critic: a judge answers with its LM head; set learner.critic=none (got {config.learner.critic!r})")
    if config.rollout.temperature != 1:
        problems.append("rollout.temperature: a judge is asked at temperature 1; leave it at 1")
    if settings.scorer.get("format", "judge") != "judge":
        problems.append(
            f"supervised.scorer.format: supervised.head=judge is scored as a judge (got {settings.scorer['format']!r}); leave it out"
        )
    if settings.scorer.get("yes", "Yes") == settings.scorer.get("no", "No"):
        problems.append("supervised.scorer.yes, supervised.scorer.no: the verdicts must differ")
    return problems


def supervised_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from a supervised job before its data is read, for ``--dry-run``."""
    settings, ranks = config.supervised, config.learner.ranks
    return {
        "solutions per optimiser step": settings.batch,
        "solutions per rank and step at most": -(-settings.batch // ranks),
        "optimiser steps an epoch": f"solutions learnt from / {settings.batch}, rounded up over all {settings.epochs} epochs",
        "optimiser steps at most": settings.max_steps or "no limit",
        "learner GPUs where there are GPUs": ranks * rank_gpus(config),
        "run folder": str(config.run_dir),
    }


def process_problems(config: JobConfig) -> list[str]:
    """What cannot work of a job's process rewards, each as one sentence. Raises ``ConfigError`` for names that are unknown."""
    from reasoner_ray.algorithms import get_algorithm
    from reasoner_ray.algorithms.settings import GroupSettings
    from reasoner_ray.prm import step_scorer  # noqa: F401 - registers prm and judge
    from reasoner_ray.registry import check_arguments
    from reasoner_ray.scoring.step_scorers import STEP_SCORERS

    process = config.scoring.process
    if process is None:
        return []
    check_arguments(STEP_SCORERS.get(process.scorer), process.args, "scoring.process.args", reserved=("context",))
    if problems := cut_problems("scoring.process.separator", process.separator):
        return problems
    if process.scorer in ("likelihood", "judge"):
        return [f"scoring.process.scorer: {process.scorer} asks the policy's engine, which scorers of RL do not have; take prm"]
    algorithm = get_algorithm(config.algorithm.name)
    settings = algorithm.settings(config.algorithm.settings)
    if process.transform == "shaping" and isinstance(settings, GroupSettings) and settings.credit == "trajectory":
        return [
            f"scoring.process.transform: shaping adds up to the same for every answer, and {algorithm.name} compares sums; take "
            "transform=minimum, an algorithm with a critic, or, where episodes have several turns, algorithm.settings.credit=action"
        ]
    if process.transform in ("difference", "shaping") and algorithm.discounts(settings)[0] == 0:
        return [
            f"algorithm.settings.gamma_token: at 0 no step is worth anything to the one before; transform={process.transform} needs more"
        ]
    if process.normalise == "group" and process.transform in ("shaping", "minimum"):
        return [
            f"scoring.process.normalise: with a mean of 0 every step would earn or cost something for being there, which "
            f"transform={process.transform} promises not to; leave normalise at none, or take transform=raw or difference"
        ]
    return []


def step_model_gpus(config: JobConfig, *, training: bool) -> list[float]:
    """GPUs of each actor of a job's models of steps, where there are GPUs: those of process rewards, and those that guide its searches.

    Without ``training`` a job whose rollouts come from search evaluates the bare policy.
    """
    from reasoner_ray.search.methods import get_method

    process, search = config.scoring.process, config.search
    asked = [] if process is None or process.scorer != "prm" else [process.args]
    searches = config.rollout.episode == "search_solutions" or (config.rollout.episode == "search" and training)
    if searches and get_method(search).uses_scorer(search) and search.scorer.name == "prm" and search.scorer.args not in asked:
        asked.append(search.scorer.args)
    return [1.0 if args.get("gpus") is None else float(args["gpus"]) for args in asked for _ in range(int(args.get("workers", 1)))]


def with_step_model_gpus(config: JobConfig, gpus: float) -> JobConfig:
    """``config`` with ``gpus`` for each actor of a model of steps, where the job names no number itself."""

    def told(scorer: str, args: dict[str, Any]) -> dict[str, Any]:
        return args | {"gpus": gpus} if scorer == "prm" and args.get("gpus") is None else args

    process, scoring, search = config.scoring.process, config.scoring, config.search
    if process is not None:
        process = process.model_copy(update={"args": told(process.scorer, process.args)})
        scoring = scoring.model_copy(update={"process": process})
    scorer = search.scorer.model_copy(update={"args": told(search.scorer.name, search.scorer.args)})
    return config.model_copy(update={"scoring": scoring, "search": search.model_copy(update={"scorer": scorer})})
