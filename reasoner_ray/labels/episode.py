"""Labelling one question as an episode: it runs in a rollout worker, next to the engine, many questions at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reasoner_ray.child_process import ChildDied
from reasoner_ray.data.tasks import Item
from reasoner_ray.labels import math_shepherd, omega_prm
from reasoner_ray.labels.estimates import Estimator, Grade
from reasoner_ray.labels.exact import Lines, labels_of_steps
from reasoner_ray.rollout.engine import Sampling
from reasoner_ray.rollout.episodes import EpisodeContext, register_episode
from reasoner_ray.scoring.base import Answer
from reasoner_ray.scoring.calls import CallRaised, failure_name
from reasoner_ray.search.policy import StepPolicy
from reasoner_ray.steps import Partial, read_cut
from reasoner_ray.trajectory import Trajectory

if TYPE_CHECKING:
    from reasoner_ray.labels.grading import WorkerGrader
    from reasoner_ray.labels.records import QuestionLabels
    from reasoner_ray.labels.settings import LabelConfig


@register_episode("label")
async def label_episode(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """The labels of one question, as plain data in ``info["labels"]`` of a trajectory that holds the prompt alone.

    Nothing of it is to be trained on by RL, so there is no trajectory for each solution.
    """
    if context.config is None or context.grader is None:
        raise ValueError("labelling needs the job's configuration and a grader in its context")
    config, prompt, began = context.config.labels, context.prompt(item), time.perf_counter()
    policy = make_policy(context, config)
    estimator = Estimator(policy, make_grade(context.grader, policy, item, config.right_from), config.completions)
    root = Partial.root(prompt)
    if config.method == "math_shepherd":
        found = await math_shepherd.label_question(estimator, root, config.solutions)
    else:
        found = await omega_prm.label_question(estimator, root, config.omega)
    policy.cost.seconds = time.perf_counter() - began
    builder = context.builder(0, item)
    builder.add_env(prompt)
    record = as_data(item, found, policy, config)
    if hasattr(context.task, "check_steps"):  # a task that knows which lines are right: the labels can be measured
        failures = await asyncio.gather(*(_check(context.grader, item, solution) for solution in record["solutions"]))
        record["check_failures"] = dict(Counter(name for name in failures if name))
    return [builder.build(labels=record)]


async def _check(grader: WorkerGrader, item: Item, solution: dict[str, Any]) -> str | None:
    """Put the task's own word on the steps into ``solution["exact"]``; why there is none where the check fails, for that is no label."""
    lines = Lines.of(solution["steps"], whole=solution["right"] is not None)
    try:
        solution["exact"] = labels_of_steps(solution["steps"], lines, await grader.check_lines(item, lines.texts))
    except (TimeoutError, ChildDied, CallRaised, ValueError) as error:
        solution["exact"] = [None] * len(solution["steps"])
        return failure_name(error)
    return None


def make_policy(context: EpisodeContext, config: LabelConfig) -> StepPolicy:
    """What samples completions: whole solutions of at most ``rollout.max_new_tokens``, under the section's own sampling."""
    sampling = Sampling(
        max_new_tokens=context.sampling.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=context.sampling.stop,
    )
    return StepPolicy(
        context.engine,
        context.tokenizer,
        sampling=sampling,
        separator=read_cut(config.separator),
        step_tokens=context.sampling.max_new_tokens,
        max_context=context.max_context,
        order=context.group_id,
        on_request=context.on_request,
        remembers=False,
    )


def make_grade(grader: WorkerGrader, policy: StepPolicy, item: Item, right_from: float) -> Grade:
    """Whether a solution's answer is right by the job's scorers; None where it could not be scored."""

    async def grade(partial: Partial, cut: bool) -> bool | None:
        answer = Answer(text=policy.text(partial), n_tokens=len(partial.solution), truncated=cut)
        score = await grader.score(answer, item)
        return score.value >= right_from if score.status == "ok" else None

    return grade


def as_data(item: Item, found: QuestionLabels, policy: StepPolicy, config: LabelConfig) -> dict[str, Any]:
    """One question as a line of the journal."""
    texts = [[_text_of(step, policy) for step in s.partial.steps] for s in found.solutions]
    return {
        "id": item.id,
        "prompt": item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"],
        **{k: v for k, v in asdict(found).items() if k not in ("solutions", "states")},
        "cost": policy.cost.as_dict(),
        "solutions": [solution.as_record(config.target, steps) for solution, steps in zip(found.solutions, texts, strict=True)],
        "states": list(found.states),
    }


def _text_of(step: Sequence[int], policy: StepPolicy) -> str:
    return str(policy.tokenizer.decode(list(step), skip_special_tokens=True, clean_up_tokenization_spaces=False))
