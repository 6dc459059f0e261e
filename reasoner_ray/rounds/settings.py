"""The ``rounds`` section of a job (``kind: rounds``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from reasoner_ray.section import Section

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

Recipe = Literal["search", "process_rewards"]


class RoundsConfig(Section):
    """What a round is made of. Each phase is a job of its own that takes this job's settings, and lays its part of ``phases`` over them."""

    recipe: Recipe = Field(
        "search",
        description="search: search on training questions, learn the right paths, retrain the value model (TS-LLM); "
        "process_rewards: RL with process rewards, then new rollouts are labelled and the process reward model goes on learning",
    )
    n: int = Field(2, ge=0, description="rounds; a finished job goes on with more of them; 0: only what comes before the first")
    questions: int = Field(200, ge=1, description="search: training questions of a round, the first so many")
    samples: int = Field(
        8,
        ge=1,
        description="search: plain samples of a question that the first value model learns from; "
        "process_rewards: of a held-out question, judged to see whether its scores still tell right from wrong",
    )
    keep: int | None = Field(4, ge=1, description="search: different right paths of a question to learn, the newest first; null: all")
    right_from: float = Field(1.0, description="search: the score (of scoring.scorers) from which on an answer counts as right")
    refresh: bool = Field(True, description="process_rewards: false keeps the process reward model as it is")
    phases: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="by phase (policy, value, search, ...), settings that it alone has, such as {policy: {learner: {lr: 1e-5}}}; "
        "supervised.data there is learnt beside what was found",
    )


def rounds_problems(config: JobConfig) -> list[str]:
    """What cannot work of a job of rounds, each as one sentence. Raises ``ConfigError`` naming the phase whose own job is refused."""
    from reasoner_ray.registry import suggest
    from reasoner_ray.rounds.plan import plan

    rounds, problems = config.rounds, []
    if config.supervised.data:
        problems.append("supervised.data: in rounds each phase has its own; name files under rounds.phases.PHASE.supervised.data")
    if config.search.split != "held_out":
        problems.append("search.split: in rounds the search section says how held-out questions are searched; leave it at held_out")
    if rounds.recipe == "search" and config.search.scorer.name != "prm":
        problems.append("search.scorer.name: the value model that rounds retrain guides the search; set it to prm")
    process = config.scoring.process
    if rounds.recipe == "process_rewards" and (process is None or process.scorer != "prm" or "model" not in process.args):
        problems.append("scoring.process: recipe process_rewards begins with a process reward model; give scorer prm and args.model")
    if problems:
        return problems
    names = {phase.name for number in (0, 1) for phase in plan(config, number)}
    return [f"rounds.phases.{name}: unknown phase; {suggest(name, sorted(names))}" for name in rounds.phases if name not in names]


def rounds_numbers(config: JobConfig) -> dict[str, int | float | str]:
    """Every number that follows from a job of rounds, for ``--dry-run``."""
    from reasoner_ray.rounds.plan import plan

    return {
        "phases before the first round": ", ".join(phase.name for phase in plan(config, 0)),
        "phases of a round": ", ".join(phase.name for phase in plan(config, 1)),
        "held-out questions at most": config.search.items,
        "run folder": str(config.run_dir),
    }
