"""Many episodes of FoodPreparation at once on one CPU engine: environment steps a second, and memory over 10,000 episodes.

The real worker and engine, without Ray: ``--at-once`` episodes run as coroutines, each finished one is followed by another.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import psutil

from benchmarks._record import record
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.worker import RolloutWorker, build_engine


async def run(config: JobConfig, episodes: int, at_once: int) -> dict[str, Any]:
    """Play; returns what was measured."""
    settings = EngineSettings.of(config, 0)
    worker = RolloutWorker(config, build_engine("stepping", settings), load_tokenizer(settings.model))
    items, memory, turns, done = get_task(config.task, config.seed).train(), list[float](), 0, 0
    waiting = iter(range(episodes))
    began = time.perf_counter()

    async def player() -> None:
        nonlocal turns, done
        for number in waiting:
            (trajectory,), _ = await worker.run_group(items[number % len(items)], f"g{number}", 1)
            turns += int(trajectory.info["metrics"]["turns"])
            done += 1
            if done % (episodes // 10) == 0:
                memory.append(psutil.Process().memory_info().rss / 2**20)

    await asyncio.gather(*(player() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    worker.close()
    return {
        "episodes": episodes,
        "episodes_at_once": at_once,
        "actions": turns,
        "actions_per_s": turns / seconds,
        "memory_mib_after_each_tenth": memory,
        "memory_growth_mib_last_nine_tenths": memory[-1] - memory[0],
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=256)
    parser.add_argument("--job", default="jobs/agents/food_preparation.yaml")
    args = parser.parse_args()
    config = load_config(args.job, [f"rollout.max_groups_per_worker={args.at_once}"])
    resolve_model(config.model.path)
    record("agent_episodes", settings=vars(args), figures=asyncio.run(run(config, args.episodes, args.at_once)))


if __name__ == "__main__":
    main()
