"""The driver of kind mat: resume, faults, stops with parts in this process; and one whole run through Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reasoner_ray.agents.mat.driver import MatDriver, Parts, evaluation, rollout_metrics
from reasoner_ray.agents.mat.launch import evaluate
from reasoner_ray.agents.mat.learner import MatLearner, MatLearners, load_network
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.pool import Collected
from reasoner_ray.agents.stepwise import check_room
from reasoner_ray.config import JobConfig, to_yaml
from reasoner_ray.envs.multi_agent.spec import TeamSpec
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.errors import CheckpointError, ConfigError, EnvironmentProblem, LearnerLost, ModelError, SyncError
from reasoner_ray.pictures import FPS, LAST_MS, encoded
from reasoner_ray.trainer.checkpoint import list_checkpoints
from tests.agents.mat.test_learner import job, weights
from tests.trainer.fakes import FakeTracker
from tests.trainer.local import LocalLearner


class LocalWorkers:
    """The pool's interface over workers in this process."""

    def __init__(self, config: JobConfig) -> None:
        self._workers = [RolloutWorker(config, i) for i in range(config.rollout.workers)]
        self._tasks = max(1, len(config.multi_agent.tasks))
        self.restarts, self.deaf, self.fresh = 0, False, []
        self.filmed: list[tuple[int, int, str]] = []

    @property
    def teams(self) -> list[TeamSpec]:
        return [worker.team for worker in self._workers[: self._tasks]]

    async def start(self) -> None: ...

    async def load(self, published: Any) -> None:
        if not self.deaf:
            for worker in self._workers:
                worker.load(published)

    async def collect(self, step: int, *, fresh: bool) -> list[Collected]:
        self.fresh.append((step, fresh))
        return [Collected(segment=s, summary=said) for s, said in (w.collect(step, fresh=fresh) for w in self._workers)]

    async def evaluate_tasks(self, seeds: Sequence[int]) -> list[list[Episode]]:
        return [worker.evaluate(seeds) for worker in self._workers[: self._tasks]]

    async def film(self, task: int, seed: int, ending: str) -> bytes:
        self.filmed.append((task, seed, ending))
        return encoded(self._workers[task].frames(seed), ending)

    async def stop(self) -> None: ...


class LocalLearners(LocalLearner):
    """The ranks' interface over a learner in this process; dies at the steps it is told to."""

    def __init__(self, config: JobConfig, dies_at: tuple[int, ...] = ()) -> None:
        self._config, self._dies_at = config, list(dies_at)
        self.calls = 0

    def of(self, team: TeamSpec, others: Sequence[TeamSpec] = ()) -> None:
        self._team, self._others = team, others

    async def start(self) -> None:
        self.learner = MatLearner(self._config, team=self._team, others=self._others)

    async def restart(self) -> None:
        await self.start()

    async def train_step(self, segments: Any) -> dict[str, float]:
        self.calls += 1
        if self.calls in self._dies_at:
            raise LearnerLost("rank 0 was killed")
        return self.learner.train_step(segments)

    async def publish_weights(self) -> Any:
        return list(weights(self.learner).items())


def driver(config: JobConfig, **learners: Any) -> MatDriver:
    parts: Any = Parts(workers=LocalWorkers(config), learners=LocalLearners(config, **learners), tracker=FakeTracker())  # type: ignore[arg-type]
    return MatDriver(config, parts)


def without_clock(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    timed = ("time/", "rollout/steps_per_s", "learner/seconds", "learner/updates_per_s", "faults/")
    return {step: {k: v for k, v in metrics.items() if not k.startswith(timed)} for step, metrics in steps.items()}


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = driver(job(tmp_path / "whole", trainer={"steps": 4, "checkpoint_every": 2}))
    result = asyncio.run(whole.run())
    assert whole.finished and result["eval/episodes"] == 3
    assert [e[0] for e in whole.parts.tracker.evals] == [0, 2, 4]
    assert whole.parts.workers.fresh == [(0, True), (1, False), (2, True), (3, False)], "new episodes after each regular checkpoint"
    config = job(tmp_path / "halves", trainer={"steps": 4, "checkpoint_every": 2})
    first = driver(config)
    collect = first.parts.workers.collect

    async def stops_in_the_second_step(step: int, *, fresh: bool) -> list[Collected]:
        if step == 1:
            first.request_stop()
        return await collect(step, fresh=fresh)

    first.parts.workers.collect = stops_in_the_second_step  # type: ignore[method-assign]
    asyncio.run(first.run())
    assert first.step == 2 and not first.finished and not (config.run_dir / "model").exists()
    second = driver(config)
    asyncio.run(second.run(list_checkpoints(config.run_dir)[-1]))
    both = first.parts.tracker.steps | second.parts.tracker.steps
    assert without_clock(both) == without_clock(whole.parts.tracker.steps)
    for name, tensor in weights(whole.parts.learners.learner).items():
        assert torch.equal(weights(second.parts.learners.learner)[name], tensor), name
    assert both[4]["episode/actions_in_all"] == 4 * 24


def test_a_lost_learner_goes_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    run = driver(job(tmp_path, trainer={"steps": 3, "checkpoint_every": 2}), dies_at=(3,))
    asyncio.run(run.run())
    assert run.finished and run.parts.learners.calls == 4
    assert run.parts.tracker.steps[3]["faults/learner_restarts"] == 1.0
    assert any("rank 0 was killed" in text for text in run.parts.tracker.events)
    never = driver(job(tmp_path / "never", learner={"restart_limit": 1}), dies_at=(1, 2))
    with pytest.raises(EnvironmentProblem, match="the learner died 2 times"):
        asyncio.run(never.run())


def test_weights_that_do_not_arrive_stop_the_run(tmp_path: Path) -> None:
    run = driver(job(tmp_path, trainer={"eval_tasks": 0}))
    run.parts.workers.deaf = True
    with pytest.raises(SyncError, match="step 1: log-probs of workers and learner differ"):
        asyncio.run(run.run())


def test_the_clock_and_the_count_of_a_step_are_its_own(tmp_path: Path) -> None:
    """An evaluation after step k has seen k steps' environment steps, and its time is not the step's."""
    run = driver(job(tmp_path, trainer={"steps": 2, "eval_every": 1}))
    evaluate_ = run.parts.workers.evaluate_tasks

    async def slow(seeds: Sequence[int]) -> list[list[Episode]]:
        await asyncio.sleep(0.05)
        return await evaluate_(seeds)

    run.parts.workers.evaluate_tasks = slow  # type: ignore[method-assign]
    asyncio.run(run.run())
    assert [figures["episode/actions_in_all"] for _, figures in run.parts.tracker.evals] == [0.0, 24.0, 48.0]
    for metrics in run.parts.tracker.steps.values():
        parts = sum(metrics[f"time/{name}_s"] for name in ("rollout", "learn", "sync"))
        assert metrics["time/step_s"] == pytest.approx(parts, abs=1e-6)


def test_episodes_that_never_end_are_told_of(tmp_path: Path) -> None:
    def told(**world: Any) -> list[str]:
        run = driver(job(tmp_path, multi_agent={"envs": 1, "segment_steps": 4, **world}, trainer={"eval_tasks": 0, "steps": 3}))
        asyncio.run(run.run())
        return [text for text in run.parts.tracker.events if "anew" in text]

    (known,) = told(max_steps=6)
    assert "up to 6 steps begin anew every trainer.checkpoint_every * multi_agent.segment_steps = 4 steps" in known
    assert "set trainer.checkpoint_every=2 or more" in known
    (found,) = told()  # the world's own limit of 5, which the job does not say in a way that is known
    assert "no episode ended in the 4 steps between two checkpoints" in found
    assert told(max_steps=4) == []


def test_a_checkpoint_of_another_team_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("mpe2")
    config = job(tmp_path, trainer={"steps": 1, "eval_tasks": 0})
    asyncio.run(driver(config).run())
    other = job(tmp_path, multi_agent={"name": "simple_spread", "args": {}}, trainer={"steps": 2, "eval_tasks": 0})
    with pytest.raises(CheckpointError, match="the checkpoint is of another team .*observations of 6 numbers .* there, 21 numbers .* here"):
        asyncio.run(driver(other).run(list_checkpoints(config.run_dir)[-1]))
    fewer = job(tmp_path, multi_agent={"name": "simple_spread", "args": {"N": 2}}, trainer={"steps": 2, "eval_tasks": 0})
    with pytest.raises(CheckpointError, match="3 agents there, 2 here"):
        asyncio.run(driver(fewer).run(list_checkpoints(config.run_dir)[-1]))


def test_segments_of_vmas_do_not_depend_on_evaluations_between_them(tmp_path: Path) -> None:
    pytest.importorskip("vmas")
    balance = {"name": "vmas", "args": {"scenario": "balance", "n_agents": 2}, "max_steps": 3}
    config = job(tmp_path, multi_agent=balance)
    watched, alone = RolloutWorker(config, 0), RolloutWorker(config, 0)
    watched.load(alone.policy.state_dict().items())
    seeds = [5, 6, 7]
    alone_segments = [alone.collect(step, fresh=step == 0)[0] for step in range(2)]
    first, seen = watched.collect(0, fresh=True)[0], watched.evaluate(seeds)
    second = watched.collect(1, fresh=False)[0]
    for segment, same in zip(alone_segments, (first, second), strict=True):
        assert torch.equal(segment.observations, same.observations) and torch.equal(segment.rewards, same.rewards)
    assert alone.evaluate(seeds) == seen, "nor evaluations on what was played before them"


def test_figures_by_hand() -> None:
    episodes = [Episode(env=0, total=x, steps=5, truncated=x > 1) for x in (1.0, 3.0)]
    figures = evaluation(episodes)
    assert figures["eval/return"] == 2.0 and figures["eval/return_ci95"] == pytest.approx(1.96 * 2**0.5 / 2**0.5)
    assert figures["eval/truncated"] == 0.5
    none = {"reward": 1.0, "returns": [], "lengths": [], "truncated": [], "steps": 10}
    some = {"reward": 2.0, "returns": [4.0], "lengths": [5], "truncated": [False], "steps": 10}
    metrics = rollout_metrics([Collected(segment=None, summary=none), Collected(segment=None, summary=some)], seconds=2.0)
    assert metrics["rollout/steps_per_s"] == 10.0 and metrics["reward/mean"] == 1.5 and metrics["episode/return"] == 4.0
    assert "episode/return" not in rollout_metrics([Collected(segment=None, summary=none)], seconds=1.0), "no episode, no figure"


def test_a_job_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add up to 9 CPUs; the cluster has 2"):
        check_room(job(tmp_path, rollout={"workers": 2, "cpus": 4}, learner={"cpus": 1}), {"CPU": 2})
    with pytest.raises(ConfigError, match="learner.ranks=2 need a GPU each"):
        check_room(job(tmp_path, learner={"ranks": 2}), {"CPU": 8, "GPU": 1})


@pytest.mark.slow
def test_workers_and_ranks_as_actors(ray_cluster: Any, tmp_path: Path) -> None:
    """Two steps through Ray, with the worker killed between them: it is replaced, the replacement is counted, and the run ends well."""
    config = job(tmp_path, trainer={"steps": 2, "eval_every": 0, "checkpoint_every": 0})
    tracker: Any = FakeTracker()
    run = MatDriver(config, Parts(workers=TeamPool(config), learners=MatLearners(config), tracker=tracker))
    collect, killed = run.parts.workers.collect, []

    async def killed_before_the_second(step: int, *, fresh: bool) -> list[Collected]:
        if step == 1:
            killed.extend(await run.parts.workers.process_ids())
            os.kill(killed[0], signal.SIGKILL)
        return await collect(step, fresh=fresh)

    run.parts.workers.collect = killed_before_the_second  # type: ignore[method-assign]

    async def go() -> dict[str, float]:
        try:
            return await run.run()
        finally:
            await run.stop()

    result = asyncio.run(go())
    assert run.finished and result["eval/episodes"] == 3
    assert [tracker.steps[step]["faults/worker_restarts"] for step in (1, 2)] == [0.0, 1.0]
    assert tracker.steps[2]["mismatch/max_abs"] < 1e-4, "the replacement has the newest weights"
    assert load_network(config.run_dir / "model")[1] == run.parts.workers.team


def test_evaluation_draws_an_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mpe2")
    spread = {"name": "simple_spread", "args": {"max_cycles": 3}}
    config = job(tmp_path, multi_agent=spread)
    MatLearner(config, team=RolloutWorker(config, 0).team).export(config.run_dir / "model")
    figures = evaluate(config)
    assert figures["eval/episodes"] == 3 and figures["eval/length"] == 3 and figures["eval/return"] < 0
    assert "episode.gif" in capsys.readouterr().out
    with Image.open(config.run_dir / "episode.gif") as picture:
        shown = 0
        for frame in range(picture.n_frames):  # equal pictures in a row are one frame that stays longer
            picture.seek(frame)
            shown += picture.info["duration"]
        assert shown == 2 * 1000 / FPS + LAST_MS and picture.size[0] > 100
    tuned = job(tmp_path, multi_agent=spread, model={"path": str(tmp_path / "before")})
    assert evaluate(tuned) == figures, "what the run itself learnt, not what it began with"
    with pytest.raises(ModelError, match="before holds no network of kind mat"):
        evaluate(tuned, str(tmp_path / "before"))
    four = {"name": "simple_spread", "args": {"max_cycles": 3, "N": 4}}
    with pytest.raises(ModelError, match=r"observations of 21 numbers.* there; observations of 28 numbers.* here.*multi_agent\.pad"):
        evaluate(job(tmp_path / "new", multi_agent=four, model={"path": str(config.run_dir / "model")}))


def test_a_failed_drawing_loses_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    config = job(tmp_path)  # the tests' world draws nothing
    MatLearner(config, team=RolloutWorker(config, 0).team).export(config.run_dir / "model")
    assert evaluate(config)["eval/return"] == 5.0
    assert f"{config.run_dir / 'model'}: return 5 +- 0 (95 %) in 3 episodes" in capsys.readouterr().out
    assert "no episode was drawn" in caplog.text


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_and_two_workers_from_the_command_line(tmp_path: Path) -> None:
    """ZeRO 2 on two ranks learns what one rank learns; then the run goes on to its end, and is plotted."""
    ended = {}
    for name, learner in {"one": {}, "two": {"ranks": 2, "zero_stage": 2}}.items():
        config = job(tmp_path / name, rollout={"workers": 2}, learner=learner, trainer={"steps": 2})
        (tmp_path / name).mkdir(exist_ok=True)
        file = tmp_path / name / "job.yaml"
        file.write_text(to_yaml(config))
        done = subprocess.run([sys.executable, "-m", "reasoner_ray.cli", "train", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        ended[name] = load_network(config.run_dir / "model")[0].state_dict()
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    for key, tensor in ended["one"].items():
        torch.testing.assert_close(ended["two"][key], tensor, atol=1e-4, rtol=1e-3)
