"""The typed configuration of a job: one YAML, ``a.b=c`` overrides, one place that validates.

Every section belongs to one part of the system and is the only thing that part reads. Combinations that
cannot work are refused here, before anything starts, with the key's path.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from reasoner_ray.agents.agdc.settings import AgdcConfig, agdc_numbers, agdc_problems
from reasoner_ray.agents.mat.settings import MatConfig, mat_numbers, mat_problems, unused_problems
from reasoner_ray.agents.sequence.settings import SequenceConfig, sequence_numbers, sequence_problems
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.errors import ConfigError
from reasoner_ray.labels.settings import LabelConfig
from reasoner_ray.learner.settings import LearnerConfig, critic_problems
from reasoner_ray.prm.settings import (
    ProcessRewardConfig,
    SupervisedConfig,
    kind_defaults,
    process_problems,
    supervised_numbers,
    supervised_problems,
)
from reasoner_ray.rounds.settings import RoundsConfig, rounds_numbers, rounds_problems
from reasoner_ray.search.settings import SearchConfig
from reasoner_ray.section import Section
from reasoner_ray.sync.backends import engine_gpus, rank_gpus
from reasoner_ray.yaml_text import read_yaml, write_yaml

Positive = Field(gt=0)


class ModelConfig(Section):
    """The policy's language model."""

    path: str = Field("builtin:smollm2-135m", description="Hugging Face id, local folder, or builtin:NAME")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware computes it natively (GPU, AVX-512 BF16, AMX), float32 elsewhere"
    )
    trust_remote_code: bool = False


class TaskConfig(Section):
    """Where the prompts and answers come from."""

    name: str = Field("arithmetic", description="a registered task, or module:function of your own")
    args: dict[str, Any] = Field(default_factory=dict, description="passed to the task")
    control: str = Field(
        "", description="text before every prompt, as supervised.condition taught it; `reasoner eval` of such a job takes the best bucket's"
    )


class AgentConfig(Section):
    """How a language agent acts in an environment (``rollout.episode``: admissible or free_text)."""

    history_tokens: int = Field(0, ge=0, description="tokens of earlier turns kept in the context; 0: each turn sees its observation alone")
    normalisation: Literal["word", "token", "sum"] = Field(
        "word", description="admissible: a candidate's log-prob is divided by its words, its tokens, or not at all"
    )
    invalid_penalty: float = Field(0.0, ge=0, description="reward taken away for an action that the environment does not understand")
    max_failures: int = Field(1, ge=0, description="times an episode is played again after its environment failed; past it its group fails")
    max_processes: int = Field(64, ge=1, description="environment processes an engine actor may have")


class CollectConfig(Section):
    """Scored episodes as records for kind sft (`reasoner collect` of kind rl)."""

    out: str | None = Field(None, description="the file of JSON lines to write, one record an action")
    tasks: int = Field(256, ge=1, description="training items, each with trainer.samples_per_task episodes")
    gamma: float = Field(
        1.0, gt=0, le=1, description="discount a step of the environment in a record's reward, the return from its action on"
    )


class RolloutConfig(Section):
    """vLLM workers."""

    workers: int = Field(1, ge=1, description="number of vLLM actors")
    tensor_parallel: int = Field(1, ge=1, description="GPUs an actor")
    engine: Literal["auto", "stepping", "async"] = Field(
        "auto", description="stepping: in-process LLMEngine (CPU); async: AsyncLLM (GPU); auto picks by hardware"
    )
    temperature: float = Field(1.0, gt=0, le=2, description="of sampling; vLLM takes no more than 2")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no truncation")
    min_p: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(64, ge=1, description="tokens an action (a turn) may have")
    max_context: int = Field(1024, ge=2, description="tokens of prompt and answer together")
    max_turns: int = Field(1, ge=1)
    stop: tuple[str, ...] = Field((), description="strings that end an action; kept in it")
    episode: str = Field("single_turn", description="single_turn, multi_turn, admissible, free_text, or module:function of your own")
    agent: AgentConfig = AgentConfig()
    collect: CollectConfig = CollectConfig()
    max_groups_per_worker: int = Field(64, ge=1, description="groups an actor works on at once")
    kv_cache_gb: float = Field(1.0, gt=0, description="CPU engines: memory for the KV cache, GB")
    gpus: float | None = Field(
        None, gt=0, le=1, description="GPU an actor reserves with Ray; None: tensor_parallel, or a part where there are too few GPUs"
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="part of its GPU's memory that an engine takes; None: 0.85, less where it shares the GPU"
    )
    cpus: float = Field(1, ge=0, description="Ray CPUs an actor reserves")
    torch_threads: int | None = Field(None, ge=1, description="CPU threads of an engine; None: all cores it may use")
    restart_limit: int = Field(3, ge=0, description="times an actor may be restarted before the job ends")
    probe_seconds: float = Field(30.0, gt=0, description="seconds between health probes")


class ScorerSpec(Section):
    """One term of the reward."""

    name: str = Field(description="a registered scorer, task (the task's own), environment (what the episode earned), or module:function")
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict)


class ScoringConfig(Section):
    """Scorer actors."""

    scorers: tuple[ScorerSpec, ...] = Field((ScorerSpec(name="task"),), min_length=1)
    workers: int = Field(1, ge=1)
    processes: int = Field(1, ge=1, description="grader processes an actor")
    timeout_s: float = Field(10.0, gt=0, description="seconds an answer's grading may take before its process is killed")
    cpus: float = Field(0.0, ge=0)
    process: ProcessRewardConfig | None = Field(None, description="rewards at the ends of steps, beside the scorers'")


class AlgorithmConfig(Section):
    """The estimator. Every setting left out takes the algorithm's own vetted default."""

    name: str = "poad"
    settings: dict[str, Any] = Field(default_factory=dict, description="see `reasoner algorithm NAME`")


class SyncConfig(Section):
    """How weights reach the rollout engines."""

    backend: Literal["auto", "object_store", "nccl", "ipc"] = Field(
        "auto",
        description="auto: nccl between GPUs, ipc where engine i shares the GPU of learner rank i, object_store elsewhere",
    )
    bucket_mb: int = Field(256, ge=1)
    probe_every: int = Field(10, ge=1, description="syncs between checks that rollout and learner log-probs agree")
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats, mean |difference| on the probe (kind mat: the greatest of a step's actions); None: 1e-3 in float32, "
        "0.1 in bfloat16",
    )


class TrainerConfig(Section):
    """The loop."""

    steps: int = Field(20, ge=1, description="training steps")
    tasks_per_step: int = Field(16, ge=1, description="prompts (or episodes' starts) a training step")
    samples_per_task: int = Field(8, ge=1, description="trajectories a prompt: the group size")
    max_staleness: int = Field(0, ge=0, description="policy versions a trajectory may be behind when trained on; 0: on-policy")
    eval_every: int = Field(10, ge=0, description="steps between evaluations; 0: only at start and end")
    eval_tasks: int = Field(128, ge=0, description="held-out prompts; 0: no evaluation")
    eval_samples: int = Field(0, ge=0, description="answers sampled as in training for each held-out prompt; 0: one greedy answer")
    checkpoint_every: int = Field(10, ge=0, description="steps between checkpoints; 0: only at the end and on Ctrl-C")
    keep_checkpoints: int = Field(2, ge=1)
    max_failed_groups: int = Field(8, ge=0, description="groups that may fail in a row (each is replaced) before the job ends")
    max_mismatch_k3: float | None = Field(None, gt=0, description="stop where the k3 mismatch of rollout and learner exceeds this")


class TrackingConfig(Section):
    """Where a run is watched."""

    wandb: Literal["auto", "online", "offline", "off"] = Field("auto", description="auto: online where logged in, offline elsewhere")
    project: str = "reasoner-ray"
    sample_rows: int = Field(4, ge=0, description="sample rollouts shown a logged step")
    terminal: Literal["auto", "rich", "plain", "off"] = "auto"
    video: str = Field("episode.gif", pattern=r"^[^/]+\.(gif|mp4)$", description="of kinds mat, sequence: what `reasoner eval` draws")
    video_every: int = Field(0, ge=0, description="of kind mat: evaluations between drawn ones (RUN/videos, W&B); 0: none in training")

    @field_validator("wandb", "terminal", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare ``off`` as false."""
        return "off" if value is False else value


class ClusterConfig(Section):
    """Ray."""

    address: str | None = Field(None, description="Ray address; None: the job's own cluster, or a local one")
    rollout_resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources an engine actor needs")
    learner_resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources a learner rank needs")


class JobConfig(Section):
    """A whole job."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Literal["rl", "sft", "prm", "value", "rounds", "mat", "agdc", "sequence"] = Field(
        "rl",
        description="what is trained: a policy by rewards or by examples, a process reward model, a value model; "
        "rounds: a policy and its judge in turns; mat: a Multi-Agent Transformer in multi_agent's environments; agdc: a search that ends "
        "itself; sequence: a Decision Transformer or its kin, from recorded episodes",
    )
    seed: int = 0
    out: Path = Field(Path("runs"), description="folder that holds the run's folder")
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    search: SearchConfig = SearchConfig()
    labels: LabelConfig = LabelConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    rounds: RoundsConfig = RoundsConfig()
    agdc: AgdcConfig = AgdcConfig()
    multi_agent: MultiAgentConfig = MultiAgentConfig()
    mat: MatConfig = MatConfig()
    sequence: SequenceConfig = SequenceConfig()

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return self.out / self.name

    @model_validator(mode="before")
    @classmethod
    def _of_kind(cls, tree: Any) -> Any:
        return kind_defaults(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _combinations(self) -> JobConfig:
        for problem in _impossible(self):
            raise ValueError(problem)
        return self


PROBLEMS = {"rounds": rounds_problems, "mat": mat_problems, "agdc": agdc_problems, "sequence": sequence_problems}
NUMBERS = {"rounds": rounds_numbers, "mat": mat_numbers, "agdc": agdc_numbers, "sequence": sequence_numbers}


def _impossible(c: JobConfig) -> list[str]:
    """Every combination of keys that cannot work, each as one sentence."""
    from reasoner_ray.algorithms import get_algorithm
    from reasoner_ray.data.tasks import check_task
    from reasoner_ray.scoring.base import reward_terms
    from reasoner_ray.search.methods import search_problems
    from reasoner_ray.steps import cut_problems

    algorithm = get_algorithm(c.algorithm.name)
    algorithm.settings(c.algorithm.settings)
    check_task(c.task)
    reward_terms(c.scoring, c.task)
    if c.kind != "rl":
        return [*unused_problems(c), *critic_problems(c, algorithm), *PROBLEMS.get(c.kind, supervised_problems)(c)]
    t, problems = c.trainer, [*critic_problems(c, algorithm), *_rollout_problems(c.rollout), *search_problems(c), *process_problems(c)]
    problems += [*unused_problems(c), *cut_problems("labels.separator", c.labels.separator)]
    if algorithm.needs_group and t.samples_per_task < 2:
        problems.append(f"trainer.samples_per_task: {algorithm.name} compares the samples of a group, so it needs at least 2")
    if t.tasks_per_step % c.learner.updates_per_step:
        problems.append(
            f"learner.updates_per_step: {c.learner.updates_per_step} does not divide trainer.tasks_per_step={t.tasks_per_step}; "
            "a group is never split over updates"
        )
    if (t.tasks_per_step // c.learner.updates_per_step) % c.learner.ranks:
        problems.append(
            f"learner.ranks: {t.tasks_per_step // c.learner.updates_per_step} groups an update cannot be shared evenly by "
            f"{c.learner.ranks} ranks; make trainer.tasks_per_step a multiple of learner.ranks * learner.updates_per_step"
        )
    return problems


def _rollout_problems(rollout: RolloutConfig) -> list[str]:
    """What ``_impossible`` says of generation. Raises ``ConfigError`` for an unknown episode."""
    from reasoner_ray.labels import episode as label_episodes  # noqa: F401 - registers its episode
    from reasoner_ray.rollout import agents  # noqa: F401 - registers its episodes
    from reasoner_ray.rollout.episodes import EPISODES
    from reasoner_ray.search import episode as search_episodes  # noqa: F401 - registers its episodes

    EPISODES.get(rollout.episode)
    problems = []
    if rollout.gpus is not None and rollout.tensor_parallel > 1:
        problems.append(f"rollout.gpus: an engine of rollout.tensor_parallel={rollout.tensor_parallel} has whole GPUs; leave it out")
    if rollout.episode == "single_turn" and rollout.max_turns > 1:
        problems.append(f"rollout.max_turns: single_turn never has {rollout.max_turns} turns; set rollout.episode=multi_turn")
    if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0:
        problems.append(
            "rollout.top_p/top_k/min_p: truncated sampling puts a constant bias into every importance ratio; "
            "train with top_p=1, top_k=0, min_p=0"
        )
    if rollout.max_new_tokens >= rollout.max_context:
        problems.append("rollout.max_new_tokens: must be below rollout.max_context, or no room is left for a prompt")
    return problems


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> JobConfig:
    """Read a YAML job and apply ``a.b=c`` overrides (values are parsed as YAML).

    Raises ``ConfigError`` with the key's path and a suggestion.
    """
    tree = {} if path is None else load_tree(Path(path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree)


def load_tree(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML job as plain data, laid over the files that its ``extends`` names (one, or a list whose later ones win).

    Sections are merged key by key; lists and values are replaced. Raises ``ConfigError``.
    """
    if not file.is_file():
        raise ConfigError(f"no job file at {file}; jobs live in jobs/, for example jobs/quickstart.yaml")
    if file.resolve() in above:
        raise ConfigError(f"{file} extends itself, by way of {', '.join(p.name for p in above)}")
    try:
        tree = read_yaml(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of sections, not a {type(tree).__name__}")
    names = tree.pop("extends", [])
    merged: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        merged = merge_trees(merged, load_tree(file.parent / name, (*above, file.resolve())))
    return merge_trees(merged, tree)


def merge_trees(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``: mappings are merged key by key, lists and values replaced; an empty mapping clears a section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and value and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both else value
    return merged


def parse_config(tree: dict[str, Any]) -> JobConfig:
    """Validate a plain tree; raises ``ConfigError``."""
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def to_yaml(config: JobConfig) -> str:
    """The resolved configuration; loading it again gives the same job."""
    return write_yaml(config.model_dump(mode="json"))


def derived_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from the configuration, for ``--dry-run``."""
    if config.kind != "rl":
        return NUMBERS.get(config.kind, supervised_numbers)(config)
    t, learner = config.trainer, config.learner
    groups_per_update = t.tasks_per_step // learner.updates_per_step
    return {
        "trajectories per step": t.tasks_per_step * t.samples_per_task,
        "groups per update": groups_per_update,
        "trajectories per update": groups_per_update * t.samples_per_task,
        "groups per rank and update": groups_per_update // learner.ranks,
        "optimiser steps in all": t.steps * learner.updates_per_step * learner.epochs,
        "trajectories in all": t.steps * t.tasks_per_step * t.samples_per_task,
        "groups admitted at most at once": (t.max_staleness + 1) * t.tasks_per_step,
        "new tokens a step at most": t.tasks_per_step * t.samples_per_task * config.rollout.max_new_tokens * config.rollout.max_turns,
        "engine GPUs where there are GPUs": config.rollout.workers * engine_gpus(config),
        "learner GPUs where there are GPUs": learner.ranks * rank_gpus(config),
        "run folder": str(config.run_dir),
    }


def read_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """``a=b`` and ``a.b=c`` as plain data. Raises ``ConfigError``."""
    tree: dict[str, Any] = {}
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"argument {text!r} is not of the form a=b, for example wording=cheese")
        _apply_override(tree, text)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=c, for example trainer.steps=40")
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
        tree = child
    try:
        tree[leaf] = read_yaml(raw)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{key}: {raw!r} is not valid YAML ({why}); quote the whole override: 'rollout.stop=[\"a\"]'") from error


def _explain(error: Any) -> str:
    """One line for one pydantic error, with the nearest known key where a key is unknown."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(location) or "job"
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return message if not location else f"{path}: {message} (got {error['input']!r})"
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{path}: unknown key; {hint}"


def _known_keys(location: list[str]) -> list[str]:
    section: Any = JobConfig
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
