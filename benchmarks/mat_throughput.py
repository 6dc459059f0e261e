"""Environment steps and optimiser steps a second of `kind: mat` on simple_spread, with 1, 2 and 4 rollout workers and one learner.

Real Ray actors, as a job has them; the first training steps are not counted. Workers share the machine's cores: more of them than there
are cores gain nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from benchmarks._record import record
from reasoner_ray.agents.mat.learner import MatLearners
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.trainer.launch import connect

JOB = Path(__file__).parent.parent / "jobs/mat/simple_spread.yaml"


async def measure(config: JobConfig, steps: int, warmup: int) -> dict[str, list[float]]:
    """Figures of each of ``steps`` training steps."""
    workers, learners = TeamPool(config), MatLearners(config)
    found: dict[str, list[float]] = {"rollout_steps_per_s": [], "updates_per_s": [], "steps_per_s_in_all": []}
    try:
        await workers.start()
        learners.of(workers.team)
        await learners.start()
        await workers.load(await learners.publish_weights())
        for step in range(-warmup, steps):
            began = time.perf_counter()
            collected = await workers.collect(step + warmup, fresh=step == -warmup)
            rolled_out = time.perf_counter()
            learned = await learners.train_step([c.segment for c in collected])
            await workers.load(await learners.publish_weights())
            if step >= 0:
                done = sum(c.summary["steps"] for c in collected)
                found["rollout_steps_per_s"].append(done / (rolled_out - began))
                found["updates_per_s"].append(learned["learner/updates_per_s"])
                found["steps_per_s_in_all"].append(done / (time.perf_counter() - began))
    finally:
        await asyncio.gather(workers.stop(), learners.stop())
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=10, help="training steps counted")
    parser.add_argument("--warmup", type=int, default=3, help="training steps before them")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            config = load_config(JOB, [f"rollout.workers={workers}", "rollout.cpus=0", "learner.cpus=0", f"out={folder}"])
            connect(config)
            try:
                found = asyncio.run(measure(config, args.steps, args.warmup))
            finally:
                ray.shutdown()
            figures |= {f"{workers}_workers_{name}": values for name, values in found.items()}
    settings = {"environment": config.multi_agent.name, "envs_a_worker": config.multi_agent.envs, "epochs": config.learner.epochs}
    record("mat_throughput", settings=settings | {"segment_steps": config.multi_agent.segment_steps}, figures=figures)


if __name__ == "__main__":
    main()
