"""All built-in methods by name; importing this registers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasoner_ray.prm import step_scorer  # noqa: F401 - registers prm and judge
from reasoner_ray.registry import check_arguments
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, StepScorer, StepScorerContext
from reasoner_ray.search import beam, gumbel, mcts, rstar, sampling  # noqa: F401 - each registers its methods
from reasoner_ray.search.core import SEARCHES, Method
from reasoner_ray.search.settings import SearchConfig
from reasoner_ray.steps import cut_problems

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


def get_method(config: SearchConfig) -> Method:
    """The method a job names. Raises ``ConfigError`` where there is none, or where it does not take its settings."""
    method = SEARCHES.get(config.method)
    method.settings(config.settings)
    return method


def make_step_scorer(config: SearchConfig, context: StepScorerContext) -> StepScorer:
    """The scorer a job names, for one search. Raises ``ReasonerError`` where it cannot be had."""
    return STEP_SCORERS.get(config.scorer.name)(context, **config.scorer.args)


def search_problems(job: JobConfig) -> list[str]:
    """What cannot work of a job's ``search`` section, each as one sentence. Raises ``ConfigError`` for names that are unknown."""
    config = job.search
    problems = cut_problems("search.separator", config.separator)
    get_method(config)
    check_arguments(STEP_SCORERS.get(config.scorer.name), config.scorer.args, "search.scorer.args", reserved=("context",))
    if job.rollout.episode == "search" and (config.top_p < 1 or config.top_k > 0):
        problems.append(
            "search.top_p/top_k: truncated sampling puts a constant bias into every importance ratio; with rollout.episode=search take "
            "search.top_p=1, search.top_k=0"
        )
    if job.rollout.episode == "search" and job.kind in ("rl", "rounds") and config.temperature != job.rollout.temperature:
        problems.append(
            f"search.temperature={config.temperature:g} is not rollout.temperature={job.rollout.temperature:g}: the learner computes "
            "log-probs at the latter, so importance ratios would be biased; with rollout.episode=search set both to the same"
        )
    return problems


def describe_methods() -> str:
    """Every method's first lines and settings, for the command line."""
    lines = []
    for name in SEARCHES.names():
        method = SEARCHES.get(name)
        first = (method.run.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name}: {first}")
        lines += [f"    {key}={field.default!r}  {field.description or ''}" for key, field in method.options.model_fields.items()]
    return "\n".join(lines)
