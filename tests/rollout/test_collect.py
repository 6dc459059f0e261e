"""Scored episodes as records: returns by hand, groups that survive an interruption, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import CheckpointError, ConfigError, EnvironmentProblem
from reasoner_ray.journal import Journal
from reasoner_ray.models import load_tokenizer
from reasoner_ray.prm.examples import read_examples
from reasoner_ray.prm.settings import SupervisedConfig
from reasoner_ray.rollout.collect import collect, header_of, play_all, records_of, write
from reasoner_ray.trainer.parts import GroupResult
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder
from tests.labels.test_launch import Counted

GROUPS = {f"collect-{i}": Item(id=str(i), prompt="p", answer="") for i in range(6)}


def episode(name: str, *, status: Status = Status.FINISHED) -> Trajectory:
    """Two actions, each in a context of its own: the first earns 1 and takes three steps, the second earns 2."""
    builder = TrajectoryBuilder(id=name, group_id="g", task="t", info={"item": "0"})
    builder.add_env([1, 2, 3])
    builder.add_model([4, 5], [-0.1, -0.2], [0, 0])
    builder.set_duration(3)
    builder.add_reward(1.0)
    builder.add_env([6, 7], turn=1, new_context=True)
    builder.add_model([8], [-0.3], [0], turn=1)
    builder.add_reward(2.0)
    return builder.build(status)


def job(folder: Path, **tree: Any) -> JobConfig:
    out = str(folder / "episodes.jsonl")
    rollout = {"collect": {"out": out, "tasks": 6, "gamma": 0.5}, "max_groups_per_worker": 2}
    return parse_config({"rollout": rollout, "trainer": {"samples_per_task": 2}, **tree})


class Parts:
    """Rollouts and scorers at once: two episodes a group, the second of group 3 failed; ``broken`` ends the run."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.asked = broken, list[str]()

    def submit(self, item: Item, group_id: str, n: int) -> str:
        assert n == 2
        self.asked.append(group_id)
        return group_id

    async def finish(self, call: str) -> GroupResult:
        await asyncio.sleep(0.01 * self.asked.index(call))
        if call == self.broken:
            raise EnvironmentProblem("engine-0 died too often")
        second = Status.FAILED if call == "collect-3" else Status.TRUNCATED

        async def trajectories() -> list[Trajectory]:
            return [episode(f"{call}/0"), episode(f"{call}/1", status=second)]

        answer: Awaitable[list[Trajectory]] = trajectories()
        return GroupResult(trajectories=answer, summary={})

    async def score(self, result: GroupResult, item: Item) -> GroupResult:
        return result

    async def fetch(self, result: GroupResult) -> tuple[list[Trajectory], dict[str, Any]]:
        return await result.trajectories, result.summary


def play(parts: Parts, folder: Path) -> Counted:
    progress = Counted()
    with Journal(folder / "part", {"a": 1}) as journal:
        todo = {name: item for name, item in GROUPS.items() if name not in journal.done}
        asyncio.run(play_all(parts, parts, todo, job(folder), journal, progress))
    return progress


def test_each_action_is_a_record_with_the_return_from_there_on() -> None:
    first, second = records_of(episode("e"), gamma=0.5)
    assert first == {"id": "e/0", "tokens": [1, 2, 3, 4, 5], "start": 3, "ends": [5], "reward": 1.0 + 0.5**3 * 2.0}
    assert second == {"id": "e/1", "tokens": [6, 7, 8], "start": 2, "ends": [3], "reward": 2.0}, "its context alone"
    assert [record["reward"] for record in records_of(episode("e"))] == [3.0, 2.0]


def test_an_outcome_counts_from_every_action_on() -> None:
    assert [record["reward"] for record in records_of(episode("e").with_outcome(10.0))] == [13.0, 12.0]


def test_what_was_played_is_kept_and_the_rest_is_played_later(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="died too often"):
        play(Parts(broken="collect-4"), tmp_path)
    again = Parts()
    assert play(again, tmp_path).notes[-1] == "reward 3.000"
    assert "collect-0" not in again.asked and {"collect-4", "collect-5"} <= set(again.asked)
    out = tmp_path / "out.jsonl"
    figures = write(tmp_path / "part", out, set(GROUPS))
    assert figures == {"episodes": 11.0, "failed": 1.0, "records": 22.0, "tokens": 33.0, "reward": 3.0}
    assert write(tmp_path / "part", out, {"collect-3"})["episodes"] == 1, "of the groups that are asked for alone"
    examples, left_out = read_examples([str(out)], "sft", SupervisedConfig(), load_tokenizer(tiny_model_dir))
    assert [example.reward for example in examples] == [1.25, 2.0] and not left_out
    assert examples[1].partial.tokens == (6, 7, 8) and json.loads(out.read_text().splitlines()[0])["item"] == "3"


def test_what_cannot_be_collected_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.collect\.out: name the file"):
        collect(parse_config({}))
    (tmp_path / "episodes.jsonl").touch()
    with pytest.raises(ConfigError, match="exists; delete it, or name another"):
        collect(job(tmp_path))
    config = job(tmp_path)
    with Journal(tmp_path / "part", header_of(config, "items")):
        pass
    other = job(tmp_path, seed=1, task={"name": "arithmetic", "control": "Quality 1 of 1.\n"})
    with pytest.raises(CheckpointError, match="begun with another seed, task; go on with its own settings"):
        Journal(tmp_path / "part", header_of(other, "items"))
    judged = job(tmp_path, scoring={"process": {"scorer": "prm", "args": {"model": "runs/prm/model"}}})
    with pytest.raises(CheckpointError, match="begun with another process;"):
        Journal(tmp_path / "part", header_of(judged, "items"))
    more = job(tmp_path, rollout={"collect": {"tasks": 9, "gamma": 0.5}, "workers": 2, "agent": {"max_processes": 3}})
    Journal(tmp_path / "part", header_of(more, "items"))  # more of the same, on more workers
