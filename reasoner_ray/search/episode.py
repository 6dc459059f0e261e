"""A search as an episode: it runs in a rollout worker, next to the engine, so that hundreds of trees fill one batch.

``search`` is for RL: a search a trajectory, of its chosen path. ``search_solutions`` is one search, all of whose solutions come
back (what `reasoner search` runs), the chosen one first.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from reasoner_ray.data.tasks import Item, stable_hash
from reasoner_ray.errors import ScorerGaveUp
from reasoner_ray.rollout.engine import Sampling
from reasoner_ray.rollout.episodes import EpisodeContext, register_episode
from reasoner_ray.scoring.step_scorers import StepScorerContext
from reasoner_ray.search.answers import answer_grouper, answer_reader
from reasoner_ray.search.core import Search, SearchResult, Solution, run_search
from reasoner_ray.search.cost import Meter
from reasoner_ray.search.methods import get_method, make_step_scorer
from reasoner_ray.search.policy import StepPolicy
from reasoner_ray.search.tree import Node, to_json
from reasoner_ray.steps import Partial, decode_piece, read_cut
from reasoner_ray.trajectory import Status, Trajectory

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


@register_episode("search")
async def search_episode(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """``context.samples`` independent searches, the chosen path of each as a trajectory with the policy's log-probs.

    The log-probs are those the steps were sampled with: that a search then chose among them is not part of them, so an importance
    ratio sees the policy, not the search. A search without a solution gives its most valuable way, or where no step ever came to an end a
    plain sample, TRUNCATED either way unless that sample ended; ``info["metrics"]["unsolved"]`` counts both.
    """
    prompt = context.prompt(item)
    names = [f"{context.group_id}/{sample}" for sample in range(context.samples)]
    searches = [make_search(context, prompt, name) for name in names]
    results = await asyncio.gather(*(run_search(s, get_method(s.config)) for s in searches))
    return list(
        await asyncio.gather(*(_chosen_path(context, item, i, s, r) for i, (s, r) in enumerate(zip(searches, results, strict=True))))
    )


async def _chosen_path(context: EpisodeContext, item: Item, sample: int, search: Search[Any], result: SearchResult) -> Trajectory:
    if result.failure is not None:
        return _failed(context, item, sample, result.failure, search)
    node = result.chosen
    if node is None:
        (plain,) = await search.policy.complete(search.root.partial, 1)
        node = Node(plain.partial, logprobs=plain.logprobs, versions=plain.versions, terminal=plain.end == "solution", parent=search.root)
    metrics = {"unsolved": float(result.choice is None), "confidence": result.confidence, **search.meter.cost.as_dict()}
    return as_trajectory(context, item, sample, node, metrics=metrics)


@register_episode("search_solutions")
async def search_solutions(context: EpisodeContext, item: Item) -> list[Trajectory]:
    """One search; a trajectory for each solution that is a node of its own, the chosen one first.

    ``info["solution"]`` says of each what ``SearchResult`` does, ``info["search"]`` of the first one what the whole cost. Without a
    solution the most valuable way comes back as TRUNCATED, or an empty trajectory where there is none.
    """
    prompt = context.prompt(item)
    search = make_search(context, prompt, context.group_id)
    result = await run_search(search, get_method(search.config))
    summary = describe(result)
    if search.config.save_trees:
        text = lambda partial, start: decode_piece(search.policy.tokenizer, partial.tokens, start, len(partial.tokens))  # noqa: E731
        summary["tree"] = to_json(result.root, result.chosen, text, item=item.id, method=search.config.method, answer=result.answer)
    if result.failure is not None:
        return [_failed(context, item, 0, result.failure, search, search=summary, solution=None)]
    if result.choice is None:
        node = result.unfinished or search.root
        return [as_trajectory(context, item, 0, node, search=summary, solution=None)]
    ways = _distinct(result)
    return [
        as_trajectory(context, item, i, solution.node, solution=_about(solution, times), **({} if i else {"search": summary}))
        for i, (solution, times) in enumerate(ways)
    ]


def _failed(context: EpisodeContext, item: Item, sample: int, failure: ScorerGaveUp, of: Search[Any], **info: Any) -> Trajectory:
    """A search whose scorer gave up, as a status that says why: never trained on, never a wrong answer."""
    builder = context.builder(sample, item)
    builder.add_env(of.prompt)
    return builder.build(Status.FAILED, text="", error=str(failure), error_type=failure.error_type, **info)


def make_search(context: EpisodeContext, prompt: list[int], name: str) -> Search[Any]:
    """A search for what ``context`` offers. Raises ``ConfigError`` where the job's ``search`` section cannot be met."""
    job: JobConfig | None = context.config
    if job is None:
        raise ValueError("a search needs the job's configuration in its context")
    config, method = job.search, get_method(job.search)
    policy = StepPolicy(
        context.engine,
        context.tokenizer,
        sampling=Sampling(
            max_new_tokens=context.sampling.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop=context.sampling.stop,
        ),
        separator=read_cut(config.separator),
        step_tokens=config.step_tokens,
        max_context=context.max_context,
        order=name,
        on_request=context.on_request,
        remembers=method.uses_scorer(config) and config.scorer.name not in ("prm", "judge", "function"),
    )
    scorer = make_step_scorer(
        config, StepScorerContext(config=job, engine=context.engine, tokenizer=context.tokenizer, known_logprobs=policy.known_logprobs)
    )
    return Search(
        prompt=tuple(prompt),
        policy=policy,
        scorer=scorer,
        meter=Meter(config.budget, policy.cost, scorer),
        config=config,
        options=method.settings(config.settings),
        read_answer=answer_reader(config.read_answer, context.task, job.scoring.scorers),
        group_answers=answer_grouper(config.same_answers, context.task, job.scoring.scorers),
        source=np.random.default_rng(stable_hash(f"{job.seed}/{name}")),
        scored=method.uses_scorer(config),
    )


def as_trajectory(context: EpisodeContext, item: Item, sample: int, node: Node, **info: Any) -> Trajectory:
    """The way from the root to ``node``; each step is a span, so that a step is an action.

    What the search wrote at the beginning of a step is the environment's, as an observation is.
    """
    builder = context.builder(sample, item)
    partial: Partial = node.partial
    logprobs = [logprob for step in node.path for logprob in step.logprobs]
    versions = [version for step in node.path for version in step.versions]
    given = {len(n.partial.tokens) - len(n.own_tokens): n.given for n in node.path if n.given}  # by the place where they begin
    builder.add_env(partial.prompt)
    at, place = 0, partial.start
    for number, step in enumerate(partial.steps):
        written = given.get(place, 0)
        if written:
            builder.add_env(step[:written])
        sampled = len(step) - written
        builder.add_model(step[written:], logprobs[at : at + sampled], versions[at : at + sampled], step=number)
        at, place = at + sampled, place + len(step)
    text = context.decode(partial.solution)
    return builder.build(Status.FINISHED if node.terminal else Status.TRUNCATED, text=text, **info)


def describe(result: SearchResult) -> dict[str, Any]:
    """A result as plain data, without its solutions."""
    return {
        "answer": result.answer,
        "confidence": result.confidence,
        "ended": result.ended,
        "found": len(result.solutions),
        "nodes": sum(1 for _ in result.root.walk()) - 1,
        "cost": result.cost.as_dict(),
        "answers": [s.group for s in result.solutions],  # in the order they came
        "cut_samples": [list(sample) for sample in result.cut_samples],
    }


def _distinct(result: SearchResult) -> list[tuple[Solution, list[int]]]:
    """Each node once, with the places at which it was found; the chosen one first."""
    assert result.choice is not None
    places: dict[int, list[int]] = {}
    for i, solution in enumerate(result.solutions):
        places.setdefault(id(solution.node), []).append(i)
    chosen = id(result.solutions[result.choice.index].node)
    ordered = sorted(places.values(), key=lambda found: id(result.solutions[found[0]].node) != chosen)
    return [(result.solutions[found[0]], found) for found in ordered]


def _about(solution: Solution, places: list[int]) -> dict[str, Any]:
    return {
        "answer": solution.answer,
        "group": solution.group,
        "value": solution.value,
        "scores": list(solution.node.scores),
        "steps": len(solution.node.partial.ends),
        "found_at": places,
    }
