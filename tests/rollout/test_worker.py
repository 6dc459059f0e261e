"""The worker: groups, modes, arrival counting."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.rollout.engine import RequestAborted
from reasoner_ray.rollout.worker import RolloutWorker
from tests.rollout.fakes import ScriptedEngine


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def job(folder: Path, **rollout: Any) -> JobConfig:
    return parse_config(
        {"model": {"path": str(folder)}, "rollout": {"max_context": 256, "max_new_tokens": 5, "kv_cache_gb": 0.05, **rollout}}
    )


def make(folder: Path, tokenizer: Any, **rollout: Any) -> tuple[RolloutWorker, ScriptedEngine, Any]:
    engine = ScriptedEngine(lambda _: ([30, 31, 1], "stop"))
    config = job(folder, **rollout)
    return RolloutWorker(config, engine, tokenizer), engine, get_task(config.task, config.seed).train()


def test_a_summary_says_what_the_driver_needs(tiny_model_dir: Path, tokenizer: Any) -> None:
    async def run() -> None:
        worker, engine, items = make(tiny_model_dir, tokenizer)
        trajectories, summary = await worker.run_group(items[0], "g0", 4)
        assert [t.group_id for t in trajectories] == ["g0"] * 4
        assert summary["lengths"] == [3] * 4
        assert summary["rewards"] == [0.0] * 4
        assert summary["oldest_versions"] == summary["newest_versions"] == [3] * 4
        assert summary["statuses"] == ["finished"] * 4
        assert (summary["n"], summary["failed"], summary["error"], summary["engine"]) == (4, False, "", "engine-0")
        assert engine.calls[0][1].temperature == 1.0
        assert engine.calls[0][1].stop == get_task(worker.config.task, 0).stop

    asyncio.run(run())


def test_evaluation_is_greedy_and_in_order(tiny_model_dir: Path, tokenizer: Any) -> None:
    async def run() -> None:
        worker, engine, items = make(tiny_model_dir, tokenizer)
        trajectories, summaries = await worker.evaluate(items[:5])
        assert [t.info["item"] for t in trajectories] == [item.id for item in items[:5]]
        assert len(summaries) == 5
        assert {call[1].temperature for call in engine.calls} == {0.0}

    asyncio.run(run())


def test_evaluation_with_several_sampled_answers(tiny_model_dir: Path, tokenizer: Any) -> None:
    async def run() -> None:
        worker, engine, items = make(tiny_model_dir, tokenizer)
        trainer = worker.config.trainer.model_copy(update={"eval_samples": 3})
        worker.config = worker.config.model_copy(update={"trainer": trainer})
        trajectories, summaries = await worker.evaluate(items[:2])
        assert [t.info["item"] for t in trajectories] == [item.id for item in items[:2] for _ in range(3)]
        assert [summary["n"] for summary in summaries] == [3, 3]
        assert {call[1].temperature for call in engine.calls} == {1.0}

    asyncio.run(run())


def test_resume_waits_for_the_groups_that_were_sent(tiny_model_dir: Path, tokenizer: Any) -> None:
    async def run() -> None:
        worker, engine, items = make(tiny_model_dir, tokenizer, max_groups_per_worker=2)
        await worker.pause()
        resumed = asyncio.ensure_future(worker.resume(seed=1, arrivals=4))
        await asyncio.sleep(0.01)
        groups = [asyncio.ensure_future(worker.run_group(items[i], f"g{i}", 2)) for i in range(3)]
        await asyncio.sleep(0.01)
        assert not resumed.done()
        assert len(engine.calls) == 2, "max_groups_per_worker groups at once"
        groups.append(asyncio.ensure_future(worker.run_group(items[3], "g3", 2)))
        await asyncio.wait_for(resumed, 1)
        assert len(await asyncio.gather(*groups)) == 4

    asyncio.run(run())


def test_abort_drops_the_groups_that_wait_for_a_slot(tiny_model_dir: Path, tokenizer: Any) -> None:
    async def run() -> None:
        worker, engine, items = make(tiny_model_dir, tokenizer, max_groups_per_worker=1)
        await worker.pause()
        first, waiting = (asyncio.ensure_future(worker.run_group(items[i], f"g{i}", 2)) for i in range(2))
        await asyncio.sleep(0.01)
        await worker.abort()
        await worker.resume()
        await first  # the engine without a model drops nothing
        with pytest.raises(RequestAborted, match="g1"):
            await waiting
        assert len(engine.calls) == 1, "nothing is generated for a group that was dropped"
        assert len((await worker.run_group(items[2], "g2", 2))[0]) == 2

    asyncio.run(run())
