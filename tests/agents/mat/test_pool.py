"""The workers' pool over actors that answer from here: deadlines, replacements, lost weights. No Ray cluster."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

from reasoner_ray import pictures
from reasoner_ray.agents import pool as pool_module
from reasoner_ray.agents.mat.learner import MatLearners
from reasoner_ray.agents.mat.pool import TeamActor, TeamPool
from reasoner_ray.errors import ConfigError, EnvironmentFault, EnvironmentProblem, LearnerLost
from reasoner_ray.learner.group import LearnerGroup
from tests.agents.mat.teams import team
from tests.agents.mat.test_learner import job
from tests.agents.mat.worlds import Crowd

HANGS = object()


def raised_there(cause: Exception) -> RayTaskError:
    """What the caller gets where an actor's method raised ``cause``."""
    error: RayTaskError = RayTaskError("f", "a trace", cause).as_instanceof_cause()
    return error


LOST = OwnerDiedError("00" * 28, "", "")


class Answer:
    """A reference to a call's result, an exception or nothing ever."""

    def __init__(self, value: Any) -> None:
        self._future: Future[Any] = Future()
        if isinstance(value, Exception):
            self._future.set_exception(value)
        elif value is not HANGS:
            self._future.set_result(value)

    def future(self) -> Future[Any]:
        return self._future


class Method:
    """An actor's method. ``collect`` has two results."""

    def __init__(self, value: Any, results: int = 1) -> None:
        self._value, self._results = value, results

    def options(self, num_returns: int) -> Method:
        return Method(self._value, num_returns)

    def remote(self, *_: Any) -> Any:
        return Answer(self._value) if self._results == 1 else ("segment", Answer(self._value))


class Actor:
    """An actor by what its methods answer."""

    def __init__(self, **answers: Any) -> None:
        for name, value in ({"begin": team("discrete"), "load": None, "collect": {"steps": 1}} | answers).items():
            setattr(self, name, Method(value))


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *actors: Actor, deadline_s: float = 3600.0) -> TeamPool:
    """A pool of one worker, the first of ``actors``; the others replace it in turn."""
    pool, waiting = TeamPool(job(tmp_path, multi_agent={"deadline_s": deadline_s})), list(actors)
    monkeypatch.setattr(pool, "_new", lambda _: waiting.pop(0))
    asyncio.run(pool.start())
    return pool


DIES = ActorDiedError()


def test_a_worker_that_dies_is_replaced_and_one_that_does_not_answer_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(collect=DIES), Actor())
    assert asyncio.run(pool.collect(0, fresh=False))[0].summary == {"steps": 1}
    assert pool.restarts == 1
    hangs = started(tmp_path, monkeypatch, Actor(collect=HANGS), deadline_s=0.05)
    with pytest.raises(EnvironmentFault, match=r"make_island: rollout worker 0 did not answer collect within 0\.05 s: an env"):
        asyncio.run(hangs.collect(0, fresh=False))


def test_a_replacement_that_does_not_come_up_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(collect=DIES), Actor(begin=HANGS))
    monkeypatch.setattr(pool_module, "START_S", 0.05)
    with pytest.raises(EnvironmentProblem, match=r"did not start within 0\.05 s; lower rollout\.workers"):
        asyncio.run(pool.collect(0, fresh=False))


def test_weights_that_died_with_their_learner_are_a_lost_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(load=raised_there(LOST)))
    with pytest.raises(LearnerLost, match="lost with the learner that published them"):
        asyncio.run(pool.load(["weights"]))
    late = started(tmp_path, monkeypatch, Actor(collect=DIES), Actor(load=raised_there(LOST)))
    asyncio.run(late.load(["weights"]))
    with pytest.raises(LearnerLost):
        asyncio.run(late.collect(0, fresh=False))


def test_an_error_of_a_worker_s_own_is_not_taken_for_a_missed_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(collect=raised_there(TimeoutError("the simulator's port"))))
    with pytest.raises(RayTaskError) as caught:
        asyncio.run(pool.collect(0, fresh=False))
    assert str(caught.value.cause) == "the simulator's port"


def test_a_segment_that_went_down_with_its_node_is_a_lost_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> Any:
        raise raised_there(LOST)

    monkeypatch.setattr(LearnerGroup, "_call", fails)
    with pytest.raises(LearnerLost, match="a rollout worker's segment was lost with its node"):
        asyncio.run(MatLearners(job(tmp_path)).train_step(["segment"]))


def test_workers_share_the_seeds_of_their_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Player(Actor):
        """Answers with its number and the seed."""

        def __init__(self, index: int) -> None:
            super().__init__(begin=index)
            self.evaluate = self
            self._index = index

        def remote(self, seeds: list[int]) -> Any:
            return Answer([(self._index, seed) for seed in seeds])

    pool = TeamPool(job(tmp_path, multi_agent={"tasks": {"a": {}, "b": {}}}, rollout={"workers": 4}))
    monkeypatch.setattr(pool, "_new", Player)
    asyncio.run(pool.start())
    assert asyncio.run(pool.evaluate_tasks([10, 11, 12])) == [[(0, 10), (2, 11), (0, 12)], [(1, 10), (3, 11), (1, 12)]]
    assert pool.teams == [0, 1], "the first worker of each task says its team"


def test_a_worker_that_dies_of_drawing_is_replaced_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(film=b"GIF89a"))
    assert asyncio.run(pool.film(0, 7, ".gif")) == b"GIF89a"
    pool = started(tmp_path, monkeypatch, Actor(film=DIES), Actor(film=DIES))
    with pytest.raises(EnvironmentProblem, match=r"rollout worker 0 died of drawing an episode; set tracking\.video_every=0"):
        asyncio.run(pool.film(0, 7, ".gif"))
    assert pool.restarts == 1 and asyncio.run(pool.collect(0, fresh=False))[0].summary == {"steps": 1}


@pytest.mark.parametrize("fault", [EnvironmentFault("the easel fell over"), ConfigError("cannot be made with {}: ValueError")])
def test_a_worker_that_cannot_draw_goes_on_playing(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(tmp_path, monkeypatch, Actor(film=raised_there(fault)))
    with pytest.raises(EnvironmentProblem, match=re.escape(str(fault))):
        asyncio.run(pool.film(0, 7, ".gif"))
    assert pool.restarts == 0 and asyncio.run(pool.collect(0, fresh=False))[0].summary == {"steps": 1}


def test_a_worker_that_hangs_in_drawing_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, killed = Actor(film=HANGS), []
    monkeypatch.setattr(ray, "kill", killed.append)
    pool = started(tmp_path, monkeypatch, stuck, Actor(), deadline_s=0.05)
    with pytest.raises(EnvironmentProblem, match=r"did not answer film within 0\.05 s"):
        asyncio.run(pool.film(0, 7, ".gif"))
    assert killed == [stuck] and pool.restarts == 1 and asyncio.run(pool.collect(0, fresh=False))[0].summary == {"steps": 1}


def test_whatever_goes_wrong_in_drawing_is_a_fault_that_names_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    actor = TeamActor(job(tmp_path, multi_agent={"name": "tests.agents.mat.worlds:make_crowd", "args": {"length": 2}}), 0)
    actor.begin()
    assert actor.film(7, ".gif")[:6] == b"GIF89a"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "encoded", full)
        with pytest.raises(EnvironmentFault, match=r"make_crowd: drawing an episode as \.gif raised OSError: .*No space left"):
            actor.film(7, ".gif")
    monkeypatch.setattr(Crowd, "render", lambda _: np.zeros((2, 3, 7)))
    with pytest.raises(EnvironmentFault, match="raised TypeError"):
        actor.film(7, ".gif")
