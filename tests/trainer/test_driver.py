"""The driver's own behaviour, with parts that sleep: order, staleness, failures, recovery, resume."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import DataOrder, Item
from reasoner_ray.errors import CheckpointError, DataError, EnvironmentProblem, SyncError
from reasoner_ray.trainer.buffer import Stage
from reasoner_ray.trainer.checkpoint import list_checkpoints
from reasoner_ray.trainer.driver import Parts, TrainerDriver
from reasoner_ray.trainer.launch import run_with_signals
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


async def stop_when(driver: TrainerDriver, moment: Callable[[], bool]) -> dict[str, float]:
    """Run ``driver`` and ask it to stop at ``moment``."""
    running = asyncio.create_task(driver.run())
    while not moment():
        await asyncio.sleep(0.001)
    driver.request_stop()
    return await asyncio.wait_for(running, 10)


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


def test_failures_of_environments_are_counted_by_kind_and_stop_nothing(tmp_path: Path) -> None:
    found = {"g0": {"died": 1}, "g2": {"died": 2, "timeout": 1}}
    driver = make_driver(make_config(tmp_path), scorers=FakeScorers(environment=lambda g: found.get(g, {})))
    run(driver)
    last = driver.parts.tracker.steps[5]
    assert (last["faults/environment_died"], last["faults/environment_timeout"], last["faults/groups_failed"]) == (3, 1, 0)
    told = [text for text in map(str, driver.parts.tracker.events) if "its environment failed" in text]
    assert len(told) == 2 and "(died): the world: it died" in told[0], "each is named once"


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
    first = make_driver(config, rollouts=FakeRollouts(seconds=long_tailed(0.01)), learners=FakeLearners(seconds=0.005))
    asyncio.run(stop_when(first, lambda: first.step >= 3))
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


def test_the_file_workers_changes_the_number_of_engines_between_steps(tmp_path: Path) -> None:
    """What cannot be done is reported and never ends the run; the same number again asks for nothing."""
    config = make_config(tmp_path, steps=7)
    written = {1: "3\n", 2: "many", 3: "0", 4: "99", 5: "3", 6: "1"}

    class Writing(FakeLearners):
        async def train_step(self, groups: Any) -> dict[str, float]:
            learned = await super().train_step(groups)
            (config.run_dir / "workers").write_text(written.get(self.steps, "1"))
            return learned

    config.run_dir.mkdir(parents=True)
    driver = make_driver(config, learners=Writing())
    run(driver)
    assert driver.parts.rollouts.scaled == [3, 99, 1]
    events = driver.parts.tracker.events
    assert [e for e in events if e.startswith("rollout engines")] == ["rollout engines: 1 -> 3", "rollout engines: 3 -> 1"]
    refused = [e for e in events if "could not be changed" in e]
    assert [word in event for word, event in zip(("'many'", "'0'", "no room for 99"), refused, strict=True)] == [True] * 3


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


def test_a_batch_that_was_half_sampled_is_sampled_again_as_a_whole(tmp_path: Path) -> None:
    """Its sampler is seeded for the batch: without the groups that are ready the others would get other tokens."""
    config = make_config(tmp_path, steps=3, tasks_per_step=4)
    first = make_driver(config, rollouts=FakeRollouts(seconds=lambda index: 3600.0 if index == 5 else 0.0))
    asyncio.run(stop_when(first, lambda: first.buffer.count(Stage.READY) == 3))
    second = make_driver(config)
    run(second, list_checkpoints(config.run_dir)[-1])
    assert second.parts.rollouts.submitted[:4] == ["g4", "g5", "g6", "g7"] == first.parts.rollouts.submitted[4:]
    assert second.parts.rollouts.seeds[1] == first.parts.rollouts.seeds[-1]
    assert second.parts.tracker.trained == [(2, 4), (2, 5), (2, 6), (2, 7), (3, 8), (3, 9), (3, 10), (3, 11)]


@pytest.mark.parametrize("where", ["start", "evaluate"])
def test_a_stop_before_the_first_step_ends_at_once_and_leaves_no_checkpoint(tmp_path: Path, where: str) -> None:
    config = make_config(tmp_path)
    driver = make_driver(config, rollouts=FakeRollouts(hangs_at=where))
    started = iter([False] * 20)
    assert asyncio.run(stop_when(driver, lambda: next(started, True))) == {}
    assert not driver.finished
    assert not list_checkpoints(config.run_dir)


@pytest.mark.parametrize("step", [2, 5])
def test_a_stop_during_an_evaluation_keeps_the_step_and_evaluates_on_resume(tmp_path: Path, step: int) -> None:
    class LateHang(FakeRollouts):
        async def evaluate(self, items: Any) -> Any:
            self.hangs_at = "evaluate" if self.version == step else ""
            return await super().evaluate(items)

    config = make_config(tmp_path, checkpoint_every=0)
    first = make_driver(config, rollouts=LateHang())
    asyncio.run(stop_when(first, lambda: first.parts.rollouts.hangs_at == "evaluate"))
    assert (first.step, first.finished, max(first.parts.tracker.steps)) == (step, False, step)
    second = make_driver(config)
    run(second, list_checkpoints(config.run_dir)[-1])
    assert [s for s, _ in second.parts.tracker.evals] == ([2, 4, 5] if step == 2 else [5])
    assert second.finished
    assert second.parts.learners.trained == [f"g{i}" for i in range(10)]


@pytest.mark.parametrize("lost_at", [["publish_weights"], ["export"], ["save", "save", "save"]])
def test_a_learner_lost_before_the_first_or_after_the_last_step(tmp_path: Path, lost_at: list[str]) -> None:
    learners = FakeLearners(lost_at=list(lost_at))
    driver = make_driver(make_config(tmp_path, checkpoint_every=4), learners=learners)
    run(driver)
    assert learners.restarts == len(lost_at)
    assert learners.trained == [f"g{i}" for i in range(10)]
    assert [group for _, group in driver.parts.tracker.trained] == list(range(10))
    assert (tmp_path / "t/model").is_dir()


def test_a_disk_that_is_full_at_the_end_is_one_error_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(CheckpointError, match="model was not written: No space left.*--resume"):
        run(make_driver(config, learners=FakeLearners(export_error=OSError(errno.ENOSPC, "No space left on device"))))
    second = make_driver(config)
    run(second, list_checkpoints(config.run_dir)[-1])
    assert second.parts.rollouts.submitted == []
    assert (tmp_path / "t/model").is_dir()


@pytest.mark.parametrize("smaller", [{"max_staleness": 0}, {"max_staleness": 2, "tasks_per_step": 1}])
def test_resuming_with_less_room_for_groups_is_refused(tmp_path: Path, smaller: dict[str, int]) -> None:
    config = make_config(tmp_path, max_staleness=2)
    first = make_driver(config, rollouts=FakeRollouts(seconds=lambda index: 3600.0 if index == 4 else 0.0))
    asyncio.run(stop_when(first, lambda: first.step == 2 and first.buffer.count(Stage.READY) == 5))
    with pytest.raises(CheckpointError, match="6 groups under way.*trainer.max_staleness=.*trainer.tasks_per_step="):
        run(make_driver(make_config(tmp_path, **smaller)), list_checkpoints(config.run_dir)[-1])


def test_a_steps_figures_are_of_all_the_time_since_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and checkpoint count; what was done before the first step does not. These engines work in evaluations alone."""
    clock = SimpleNamespace(now=0.0, busy=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    class Evaluating(FakeRollouts):
        async def evaluate(self, items: Any) -> Any:
            clock.now += 5
            clock.busy += 5
            return await super().evaluate(items)

        async def stats(self) -> dict[str, float]:
            busy, clock.busy = clock.busy, 0.0
            return {"tokens": 1.0, "busy_s": busy, "restarts": 0.0}

    class Slow(FakeLearners):
        async def train_step(self, groups: Any) -> dict[str, float]:
            clock.now += 2
            return await super().train_step(groups)

        async def save(self, folder: Path) -> None:
            clock.now += 4
            await super().save(folder)

    driver = make_driver(make_config(tmp_path, steps=4), rollouts=Evaluating(), learners=Slow())
    run(driver)
    steps = driver.parts.tracker.steps
    assert [m["time/step_s"] for m in steps.values()] == [2, 2 + 5, 4 + 2, 2 + 5]
    assert [m["idle/rollout"] for m in steps.values()] == pytest.approx([1, 2 / 7, 1, 2 / 7])
    assert [m["idle/learner"] for m in steps.values()] == pytest.approx([0, 5 / 7, 4 / 6, 5 / 7])
    assert (steps[2]["time/eval_s"], steps[3]["time/checkpoint_s"]) == (5, 4)


@pytest.mark.parametrize("times", [0, 1, 2])
def test_what_a_run_ends_as(tmp_path: Path, times: int) -> None:
    """Finished; stopped by Ctrl-C with a checkpoint; by a second one without."""

    class Interrupted(FakeLearners):
        async def train_step(self, groups: Any) -> dict[str, float]:
            if self.steps == 1:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.sleep(0.05)
            return await super().train_step(groups)

    config = make_config(tmp_path, checkpoint_every=0)
    driver = make_driver(config, learners=Interrupted())
    result = asyncio.run(asyncio.wait_for(run_with_signals(driver, None), 20))
    assert (result is not None, driver.parts.tracker.status) == (times == 0, "interrupted" if times else "finished")
    assert [p.name for p in list_checkpoints(config.run_dir)] == [["step-000005"], ["step-000002"], []][times]
    assert driver.parts.rollouts.stopped


def test_actors_and_tracker_are_ended_at_once(tmp_path: Path) -> None:
    """Each may wait for someone who does not answer; one after the other they would take longer than Ctrl-C may."""
    both = threading.Barrier(2)

    class LateRollouts(FakeRollouts):
        async def stop(self) -> None:
            await asyncio.to_thread(both.wait, 10)

    class LateTracker(FakeTracker):
        def finish(self, status: str) -> None:
            both.wait(10)

    driver = make_driver(make_config(tmp_path), rollouts=LateRollouts(), tracker=LateTracker())
    assert asyncio.run(asyncio.wait_for(run_with_signals(driver, None), 30)) is not None
