"""The driver's own behaviour, with parts that sleep: order, staleness, failures, recovery, resume."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import DataOrder, Item
from reasoner_ray.errors import DataError, EnvironmentProblem, SyncError
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.driver import Parts, TrainerDriver
from tests.trainer.fakes import FakeLearners, FakeRollouts, FakeScorers, FakeTracker, long_tailed

ITEMS = [Item(id=f"i{n}", prompt=f"{n}", answer=n) for n in range(10)]


def make_config(out: Path, **trainer: Any) -> JobConfig:
    settings = {"steps": 5, "tasks_per_step": 2, "samples_per_task": 2, "eval_every": 2, "eval_tasks": 3, "checkpoint_every": 2}
    return parse_config({"name": "t", "out": str(out), "trainer": {**settings, **trainer}, "algorithm": {"name": "grpo"}})


def make_driver(config: JobConfig, **parts: Any) -> TrainerDriver:
    defaults: dict[str, Any] = {
        "rollouts": FakeRollouts(),
        "scorers": FakeScorers(),
        "learners": FakeLearners(),
        "tracker": FakeTracker(),
        "train_items": DataOrder(ITEMS, seed=0),
        "eval_items": ITEMS[:3],
        "probe_tolerance": 1e-3,
    }
    return TrainerDriver(config, Parts(**{**defaults, **parts}))


def run(driver: TrainerDriver, resume_from: Path | None = None) -> dict[str, float]:
    return asyncio.run(asyncio.wait_for(driver.run(resume_from), timeout=30))


def test_on_policy_trains_each_group_once_in_data_order(tmp_path: Path) -> None:
    driver = make_driver(make_config(tmp_path))
    evaluation = run(driver)
    assert driver.parts.learners.trained == [f"g{i}" for i in range(10)]
    tracker = driver.parts.tracker
    assert sorted(tracker.steps) == [1, 2, 3, 4, 5]
    assert all(m["staleness/max"] == 0 for m in tracker.steps.values())
    assert [step for step, _ in tracker.evals] == [0, 2, 4, 5]
    assert evaluation["eval/accuracy"] == 0.0
    assert (tmp_path / "t/model").is_dir()


def test_asynchronous_training_respects_the_staleness_bound_and_really_overlaps(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=20, max_staleness=2, eval_every=0, checkpoint_every=0)
    driver = make_driver(config, rollouts=FakeRollouts(seconds=long_tailed(0.01)), learners=FakeLearners(seconds=0.01))
    run(driver)
    assert sorted(driver.parts.learners.trained) == sorted(f"g{i}" for i in range(40))
    staleness = [m["staleness/max"] for m in driver.parts.tracker.steps.values()]
    assert max(staleness) <= 2 and max(staleness) > 0


def test_a_failed_group_is_replaced_and_counted(tmp_path: Path) -> None:
    driver = make_driver(make_config(tmp_path), scorers=FakeScorers(fails=lambda g: g in ("g1", "g4")))
    run(driver)
    assert driver.parts.learners.trained == [f"g{i}" for i in (0, 2, 3, 5, 6, 7, 8, 9, 10, 11)]
    assert driver.parts.tracker.steps[5]["faults/groups_failed"] == 2
    assert driver.parts.tracker.steps[5]["faults/answers_unscored"] == 6


def test_a_job_whose_every_group_fails_ends_with_the_reason(tmp_path: Path) -> None:
    driver = make_driver(make_config(tmp_path, max_failed_groups=3), scorers=FakeScorers(fails=lambda _: True))
    with pytest.raises(DataError, match="4 groups in a row failed.*the grader died"):
        run(driver)


def test_a_crash_in_a_group_ends_the_run_instead_of_hanging_it(tmp_path: Path) -> None:
    class Broken(FakeScorers):
        async def score(self, result: Any, item: Any) -> Any:
            if result.trajectories == "g3":
                raise RuntimeError("a bug in the scorer actor")
            return result

    with pytest.raises(RuntimeError, match="a bug in the scorer actor"):
        run(make_driver(make_config(tmp_path), scorers=Broken()))


def test_a_crash_of_the_last_group_while_the_learner_works_ends_the_run(tmp_path: Path) -> None:
    """Nothing else is running then, so nothing else would wake the loop."""

    class Broken(FakeScorers):
        async def score(self, result: Any, item: Any) -> Any:
            if result.trajectories == "g5":
                await asyncio.sleep(0.05)
                raise RuntimeError("a bug in the scorer actor")
            return result

    config = make_config(tmp_path, steps=3, max_staleness=4, eval_every=0, checkpoint_every=0)
    driver = make_driver(config, scorers=Broken(), learners=FakeLearners(seconds=0.3))
    with pytest.raises(RuntimeError, match="a bug in the scorer actor"):
        asyncio.run(asyncio.wait_for(driver.run(None), 20))


def test_weights_that_did_not_arrive_stop_the_job(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match="did not arrive"):
        run(make_driver(make_config(tmp_path), learners=FakeLearners(mismatch_value=0.5)))
    with pytest.raises(SyncError, match="nan"):
        run(make_driver(make_config(tmp_path), learners=FakeLearners(mismatch_value=float("nan"))))


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_lost_learner_continues_from_the_last_checkpoint(tmp_path: Path, checkpoint_every: int) -> None:
    learners = FakeLearners(dies_at={4, 6})
    driver = make_driver(make_config(tmp_path, checkpoint_every=checkpoint_every), learners=learners)
    run(driver)
    assert learners.restarts == 2
    assert learners.trained == [f"g{i}" for i in range(10)], "every group exactly once in the final weights"
    assert driver.parts.tracker.steps[5]["faults/learner_restarts"] == 2


def test_a_learner_that_keeps_dying_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="learner died 4 times"):
        run(make_driver(make_config(tmp_path), learners=FakeLearners(dies_at=set(range(1, 20)))))


def test_a_learner_lost_again_while_it_restarts(tmp_path: Path) -> None:
    driver = make_driver(make_config(tmp_path), learners=FakeLearners(dies_at={3}, fails_to_restart=2))
    run(driver)
    assert driver.parts.learners.trained == [f"g{i}" for i in range(10)]
    assert driver.parts.tracker.steps[5]["faults/learner_restarts"] == 3


def test_a_probe_that_no_engine_answered_is_due_again(tmp_path: Path) -> None:
    driver = make_driver(make_config(tmp_path), learners=FakeLearners(probed_tokens=[0.0, 0.0]))
    run(driver)
    assert driver.parts.learners.probes == 3


def test_a_stop_in_the_last_step_still_exports_the_model(tmp_path: Path) -> None:
    class Stopping(FakeLearners):
        async def train_step(self, groups: Any) -> dict[str, float]:
            if self.steps == 4:
                driver.request_stop()
            return await super().train_step(groups)

    driver = make_driver(make_config(tmp_path), learners=Stopping())
    run(driver)
    assert driver.step == 5
    assert (tmp_path / "t/model").is_dir()


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_stopping_and_resuming_trains_every_group_once(tmp_path: Path, max_staleness: int) -> None:
    config = make_config(tmp_path, steps=8, max_staleness=max_staleness)

    async def interrupted() -> TrainerDriver:
        driver = make_driver(config, rollouts=FakeRollouts(seconds=long_tailed(0.01)), learners=FakeLearners(seconds=0.005))
        running = asyncio.create_task(driver.run())
        while driver.step < 3:
            await asyncio.sleep(0.001)
        driver.request_stop()
        await asyncio.wait_for(running, 10)
        return driver

    first = asyncio.run(interrupted())
    assert 3 <= first.step < 8
    newest = list_checkpoints(config.run_dir)[-1]
    second = make_driver(config)
    run(second, newest)
    assert second.step == 8
    assert sorted(second.parts.learners.trained, key=lambda g: int(g[1:])) == [f"g{i}" for i in range(16)]
    if max_staleness == 0:
        straight = make_driver(make_config(tmp_path / "straight", steps=8))
        run(straight)
        assert second.parts.learners.trained == straight.parts.learners.trained
        assert first.parts.rollouts.seeds[-1] in straight.parts.rollouts.seeds, "the samplers' seeds depend on the step alone"


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    learners = FakeLearners(save_error=OSError(errno.ENOSPC, "No space left on device"))
    driver = make_driver(make_config(tmp_path), learners=learners)
    run(driver)
    assert driver.step == 5
    assert any("No space left" in e for e in driver.parts.tracker.events)
    assert driver.counters.checkpoints_failed == 3


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(make_driver(config))
    other = make_driver(config, train_items=DataOrder(ITEMS[:5], seed=0))
    with pytest.raises(Exception, match="other training data"):
        run(other, list_checkpoints(config.run_dir)[-1])
