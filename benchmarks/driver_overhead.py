"""What the driver itself costs, and what asynchrony brings, with engines and learner replaced by sleeping Ray actors.

Overhead: groups that take no time at all, 10,000 trajectories; milliseconds a trajectory, first against last tenth.
Asynchrony: log-normal group durations (sigma 1), max_staleness 0 against 4, alternating. An engine works on ``--slots`` groups at
once and the others wait, as they do for a real engine's memory, so that more groups under way are no more engines. Group durations
are such that all slots together generate a step's groups in ``--share`` of the learner's step (1: as fast as it learns). Without
the tail of the durations asynchrony could then bring no more than ``1 + share`` (share <= 1); what it brings beyond that is the tail.
The more slots, the longer a group takes in steps of the learner; once groups of the tail outlast ``max_staleness`` steps the learner
has to wait for them, whatever the engines do. Several values of ``--slots`` show both.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from benchmarks._record import record
from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import DataOrder, Item
from reasoner_ray.trainer.driver import Parts, TrainerDriver
from reasoner_ray.trainer.parts import GroupResult

ENGINES, GROUPS = 8, 25
"""Engine actors; groups a step."""


class SleepingActor:
    """Stands for an engine, a scorer or a learner: sleeps, then answers."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = asyncio.Semaphore(slots)

    async def group(self, group_id: str, n: int, version: int, seconds: float) -> dict[str, Any]:
        async with self.slots:
            await asyncio.sleep(seconds)
        rows = {"rewards": [float(i % 2) for i in range(n)], "lengths": [8] * n, "oldest_versions": [version] * n}
        return {**rows, "statuses": ["finished"] * n, "unscored": {}, "failed": False}

    async def learn(self, seconds: float) -> dict[str, float]:
        await asyncio.sleep(seconds)
        return {}


class SleepingRollouts:
    """Submits every group at once, to the actor with the fewest, as the real pool does."""

    def __init__(self, n_engines: int, slots: int, mean_seconds: float) -> None:
        self.n_engines, self.slots, self.mean, self.version = n_engines, slots, mean_seconds, 0
        self.actors: list[Any] = []
        self.in_flight = [0] * n_engines

    async def start(self) -> None:
        self.actors = [
            ray.remote(SleepingActor).options(num_cpus=0, max_concurrency=1000).remote(self.slots) for _ in range(self.n_engines)
        ]

    def submit(self, item: Item, group_id: str, n: int) -> Any:
        engine = min(range(self.n_engines), key=self.in_flight.__getitem__)
        self.in_flight[engine] += 1
        seconds = self.mean * random.Random(group_id).lognormvariate(-0.5, 1.0) if self.mean else 0.0
        return engine, self.actors[engine].group.remote(group_id, n, self.version, seconds)

    async def finish(self, call: Any) -> GroupResult:
        engine, answer = call
        summary = await answer
        self.in_flight[engine] -= 1
        return GroupResult(trajectories=answer, summary=summary)

    async def update_weights(self, published: Any, version: int) -> None:
        self.version = version

    async def evaluate(self, items: Any) -> list[GroupResult]:
        return []

    async def probe(self, items: Any) -> None: ...

    async def pause(self) -> None: ...

    async def resume(self, seed: int | None = None) -> None: ...

    async def abort(self) -> None: ...

    async def stats(self) -> dict[str, float]:
        return {"tokens": 0.0, "busy_s": 0.0, "restarts": 0.0}

    async def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class SleepingScorers:
    """A round trip to an actor for every group."""

    async def start(self) -> None:
        self.actor = ray.remote(SleepingActor).options(num_cpus=0, max_concurrency=1000).remote()

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        await self.actor.learn.remote(0.0)
        return result

    async def stop(self) -> None:
        ray.kill(self.actor)


class SleepingLearners:
    """A training step of fixed length."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def start(self) -> None:
        self.actor = ray.remote(SleepingActor).options(num_cpus=0).remote()

    async def train_step(self, groups: Any) -> dict[str, float]:
        return await self.actor.learn.remote(self.seconds)

    async def publish_weights(self) -> None: ...

    async def mismatch(self, probe: Any) -> dict[str, float]:
        return {"mean_abs": 0.0, "tokens": 1.0}

    async def save(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None: ...

    async def stop(self) -> None:
        ray.kill(self.actor)


class StepTimes:
    """A tracker that keeps when each step ended, and the learner's idle share."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.idle: list[float] = []

    def start(self, total_steps: int, first_step: int) -> None:
        self.began = time.perf_counter()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.ended.append(time.perf_counter() - self.began)
        self.idle.append(metrics["idle/learner"])

    def samples(self, step: int, rows: Any) -> None: ...

    def groups(self, step: int, rows: Any) -> None: ...

    def event(self, text: str, level: str = "info") -> None:
        print(level, text)


def run(config: JobConfig, slots: int, group_s: float, learn_s: float) -> StepTimes:
    """One run of the real driver; returns its step times."""
    items = [Item(id=str(i), prompt="p", answer=i) for i in range(1000)]
    tracker = StepTimes()
    parts: dict[str, Any] = {
        "rollouts": SleepingRollouts(ENGINES, slots, group_s),
        "scorers": SleepingScorers(),
        "learners": SleepingLearners(learn_s),
        "tracker": tracker,
    }
    driver = TrainerDriver(config, Parts(**parts, train_items=DataOrder(items, 0), eval_items=[], probe_tolerance=1.0))

    async def go() -> None:
        await driver.run()
        await driver.stop()

    asyncio.run(go())
    return tracker


def job(out: str, steps: int, **trainer: Any) -> JobConfig:
    """A job for sleeping parts."""
    settings = {"steps": steps, "tasks_per_step": GROUPS, "samples_per_task": 8, "eval_tasks": 0, "eval_every": 0, "checkpoint_every": 0}
    return parse_config({"name": "driver", "out": out, "algorithm": {"name": "grpo"}, "trainer": {**settings, **trainer}})


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=60, help="steps of each asynchronous run")
    parser.add_argument("--step-s", type=float, default=1.0, help="seconds of a learner's step")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 3], help="groups an engine works on at once; 3: all of a step but one")
    parser.add_argument("--share", type=float, default=0.8, help="a step's generation with all slots busy, in steps of the learner")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as out:
        overhead = measure_overhead(out, args.trajectories // 200)
        asynchrony: dict[str, Any] = {}
        for slots in args.slots:
            asynchrony |= measure_asynchrony(out, slots, args)
    ray.shutdown()
    record(
        "driver_overhead",
        settings={
            "trajectories": args.trajectories,
            "steps": args.steps,
            "learn_s": args.step_s,
            "generation_over_learning": args.share,
            "engines": ENGINES,
            "groups_per_step": GROUPS,
        },
        figures=overhead | asynchrony,
    )


def measure_overhead(out: str, steps: int) -> dict[str, Any]:
    """Groups that take no time."""
    times = run(job(out, steps), GROUPS, 0.0, 0.0)
    tenth = max(1, steps // 10)
    durations = [b - a for a, b in zip([0.0, *times.ended], times.ended, strict=False)]
    per_trajectory = [1000 * d / 200 for d in durations]
    return {
        "ms_per_trajectory": statistics.fmean(per_trajectory),
        "ms_per_trajectory_first_tenth": statistics.fmean(per_trajectory[:tenth]),
        "ms_per_trajectory_last_tenth": statistics.fmean(per_trajectory[-tenth:]),
    }


def measure_asynchrony(out: str, slots: int, args: argparse.Namespace) -> dict[str, Any]:
    """On-policy and asynchronous runs in turns, engines with ``slots`` slots each."""
    group_s = args.share * args.step_s * ENGINES * slots / GROUPS
    ratios, idle = [], []
    for repeat in range(args.repeats):
        sides = {}
        for staleness in (0, 4):
            name = f"async-{slots}-{repeat}-{staleness}"
            config = job(out, args.steps, max_staleness=staleness).model_copy(update={"name": name})
            sides[staleness] = run(config, slots, group_s, args.step_s)
        ratios.append(sides[0].ended[-1] / sides[4].ended[-1])
        idle.append(statistics.fmean(sides[4].idle[5:]))
    return {
        f"slots_{slots}_group_mean_s": group_s,
        f"slots_{slots}_throughput_ratio_staleness_4_to_0": ratios,
        f"slots_{slots}_learner_idle_share_staleness_4": idle,
    }


if __name__ == "__main__":
    main()
