"""Searches on a real engine: token-exact paths, honest costs, many trees in one batch, an engine's death in between."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.rollout.episodes import EPISODES
from reasoner_ray.rollout.worker import RolloutWorker
from tests.engines import reference_logprobs

pytestmark = pytest.mark.slow


def job(folder: Path, **search: Any) -> JobConfig:
    """A random model closes no line; so steps are of two tokens, and a solution ends with a common letter."""
    return parse_config(
        {
            "name": "s",
            "model": {"path": str(folder), "dtype": "float32"},
            "rollout": {
                "episode": "search_solutions",
                "max_context": 256,
                "max_new_tokens": 24,
                "stop": ["a", "e", "i"],
                "kv_cache_gb": 0.05,
                "torch_threads": 1,
                "workers": 2,
            },
            "search": {"method": "mcts", "settings": {"paths": 3, "width": 4}, "separator": 2, **search},
        }
    )


def test_paths_are_the_policys_and_costs_are_the_engines(engine: Any, tiny_model: Any, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    config = job(tiny_model_dir, save_trees=True)
    worker = RolloutWorker(config, engine, AutoTokenizer.from_pretrained(tiny_model_dir))
    items = worker._task.train()[:24]

    async def story() -> list[Any]:
        before = engine.stats.new_tokens
        groups = await asyncio.gather(*(worker.run_group(item, f"g{item.id}", 1) for item in items))
        made = engine.stats.new_tokens - before
        assert sum(t[0].info["search"]["cost"]["generated"] for t, _ in groups) == made, "every token is somebody's"
        return [trajectories for trajectories, _ in groups]

    groups = asyncio.run(story())
    for trajectories in groups:
        first = trajectories[0]
        prompt, answer = first.tokens[~first.loss_mask].tolist(), first.tokens[first.loss_mask].tolist()
        expected = reference_logprobs(tiny_model, prompt, answer)
        np.testing.assert_allclose(first.behaviour_logprobs[first.loss_mask], expected, atol=5e-5)
        cost = first.info["search"]["cost"]
        assert 0 < cost["prompt_cached"] < cost["prompt"], "the few-shot header is shared"
        assert cost["scorer"] == 0, "the likelihoods of sampled steps are known"
        if (found := first.info["solution"]) is not None:
            steps = [s for s in first.spans if s.kind == "model"]
            by_hand = [np.exp(first.behaviour_logprobs[s.start : s.end].mean()) for s in steps]
            np.testing.assert_allclose(found["scores"], by_hand, rtol=1e-4)
    assert sum(t[0].info["solution"] is not None for t in groups) > 12
    shared = sum(t[0].info["search"]["cost"]["prompt_computed"] for t in groups)
    assert shared < 0.5 * sum(t[0].info["search"]["cost"]["prompt"] for t in groups), "at most half of the prompt tokens are computed"


def test_log_probs_of_other_steps_come_from_the_engine(engine: Any, tiny_model: Any, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from reasoner_ray.scoring.step_scorers import Likelihood, StepScorerContext, score_steps
    from reasoner_ray.steps import Partial

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    scorer = Likelihood(StepScorerContext(config=job(tiny_model_dir), engine=engine, tokenizer=tokenizer))
    partial = Partial(tuple(range(10, 30)), (14, 17, 20), 12)
    (scores,) = asyncio.run(score_steps(scorer, [partial]))
    logprobs = reference_logprobs(tiny_model, list(partial.prompt), list(partial.solution)).numpy()
    np.testing.assert_allclose(scores, [np.exp(logprobs[a:b].mean()) for a, b in ((0, 2), (2, 5), (5, 8))], rtol=1e-4)
    assert scorer.tokens == 20


def test_the_policy_judges_its_own_steps_in_its_chat(engine: Any, tiny_model: Any, tiny_model_dir: Path) -> None:
    """``search.scorer: judge`` from the job to the scores of a solution: each is what the model itself says in its chat template."""
    import torch
    from transformers import AutoTokenizer

    from reasoner_ray.prm.texts import judge_context, texts_of
    from reasoner_ray.steps import Partial

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    said = "{question}\n{steps}\nis {number} right? {so}"
    scorer = {"name": "judge", "args": {"yes": "a", "no": "b", "instruction": said}}
    config = job(tiny_model_dir, method="beam", settings={"paths": 3, "width": 4}, scorer=scorer)
    tree = config.model_dump(mode="json")
    tree["task"]["args"], tree["rollout"]["max_new_tokens"] = {"digits": 1, "shots": 1}, 8
    worker = RolloutWorker(parse_config(tree), engine, tokenizer)
    items = worker._task.train()[:6]

    async def story() -> list[Any]:
        return [t for t, _ in await asyncio.gather(*(worker.run_group(item, f"g{item.id}", 1) for item in items))]

    judged = 0
    for trajectories in asyncio.run(story()):
        assert trajectories[0].info["search"]["cost"]["scorer"] > 0
        for t in (t for t in trajectories if t.info["solution"] is not None):
            spans = [s for s in t.spans if s.kind == "model"]
            partial = Partial(tuple(t.tokens.tolist()), tuple(s.end for s in spans), spans[0].start)
            asked = [judge_context(tokenizer, *texts_of(partial.until(i + 1), tokenizer, None), said) for i in range(len(spans))]
            text = tokenizer.decode(asked[-1])
            assert text.startswith("user: ") and text.endswith(f"is {len(spans)} right? {{so}}\nassistant: ")
            answers = [tokenizer.encode(word)[0] for word in "ab"]
            with torch.no_grad():
                logits = [tiny_model(torch.tensor([ids])).logits[0, -1][answers] for ids in asked]
            expected = [float(torch.softmax(pair, 0)[0]) for pair in logits]
            np.testing.assert_allclose(t.info["solution"]["scores"], expected, atol=2e-4)
            judged += len(spans)
    assert judged > 4


def test_rl_trajectories_from_a_search_are_what_the_learner_takes(engine: Any, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from reasoner_ray.trajectory import flatten

    config = job(tiny_model_dir, method="beam", settings={"paths": 2, "width": 2})
    worker = RolloutWorker(config, engine, AutoTokenizer.from_pretrained(tiny_model_dir))
    worker._episode = EPISODES.get("search")
    trajectories, summary = asyncio.run(worker.run_group(worker._task.train()[0], "g", 3))
    assert summary["n"] == 3 and not summary["failed"]
    streams = flatten([replace(t) for t in trajectories])
    assert streams.n_tokens == sum(t.trainable_tokens for t in trajectories)
    assert int(streams.action_end.sum()) == sum(s.kind == "model" for t in trajectories for s in t.spans), "a step is an action"


@pytest.mark.long
def test_a_run_of_searches_survives_the_death_of_an_engine(ray_cluster: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    from reasoner_ray.data.tasks import get_task
    from reasoner_ray.rollout.pool import RolloutPool
    from reasoner_ray.scoring.pool import ScorerPool
    from reasoner_ray.search.results import ResultsFile, read_results, summarise_results
    from reasoner_ray.search.run import SearchRun

    config = job(tiny_model_dir)
    items = list(get_task(config.task, config.seed).train())[:60]
    file = ResultsFile(tmp_path / "results.jsonl")

    async def story() -> None:
        pool, scorers = RolloutPool(config), ScorerPool(config)
        await asyncio.gather(pool.start(), scorers.start())
        await pool.assume_synced(version=0)

        def kill_once(record: dict[str, Any]) -> None:
            if len(file.records) == 5:
                os.kill(pool.processes["engine-0"], signal.SIGKILL)

        await SearchRun(pool, scorers, file, in_flight=40, on_result=kill_once).run(items)
        assert pool.fleet.members["engine-0"].state.value != "healthy" or pool.fleet.restarts == 1
        await asyncio.gather(pool.stop(), scorers.stop())

    asyncio.run(asyncio.wait_for(story(), 240))
    records = read_results(file.path)
    assert sorted(r["id"] for r in records) == sorted(i.id for i in items), "every item once"
    summary = summarise_results(records)
    assert summary["accuracy"] < 0.2 and summary["unjudged"] == 0
    assert summary["cost"]["generated"] > 0 and summary["cost"]["seconds"] > 0
