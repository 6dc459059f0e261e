"""Many questions in flight, each in the journal once it is finished; reaction to questions that fail and to a pool that gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from reasoner_ray.journal import Journal, entries
from reasoner_ray.labels.launch import _label_all, _prepare, choose_items
from reasoner_ray.trainer.parts import GroupResult
from tests.data.test_tasks import Chat

ITEMS = [Item(id=str(i), prompt="p", answer="") for i in range(12)]


class Counted:
    """Progress that is only counted."""

    notes: list[str]

    def __init__(self) -> None:
        self.notes = []

    def advance(self, note: str = "") -> None:
        self.notes.append(note)


class FakePool:
    """Answers every question after a moment; ``failing`` says what some raise."""

    def __init__(self, failing: dict[str, Exception] | None = None) -> None:
        self.failing, self.running, self.most, self.stopped = failing or {}, 0, 0, False

    async def start(self) -> None: ...

    async def assume_synced(self, version: int) -> None: ...

    async def stop(self) -> None:
        self.stopped = True

    def submit(self, item: Item, group_id: str, n: int) -> Item:
        assert (group_id, n) == (f"label-{item.id}", 1)
        self.running += 1
        self.most = max(self.most, self.running)
        return item

    async def finish(self, item: Item) -> GroupResult:
        await asyncio.sleep(0.002 * (12 - int(item.id)))  # the last ones are quickest
        self.running -= 1
        if item.id in self.failing:
            raise self.failing[item.id]

        async def trajectories() -> list[Any]:
            record = {"id": item.id, "status": "labelled", "solutions": [{}]}
            return [type("T", (), {"info": {"labels": record}})]

        answer: Awaitable[list[Any]] = trajectories()
        return GroupResult(trajectories=answer, summary={})


def job(folder: Path, **rollout: Any) -> JobConfig:
    return parse_config({"out": str(folder), "rollout": {"max_groups_per_worker": 3, **rollout}})


def run(pool: FakePool, folder: Path, items: list[Item] = ITEMS) -> Counted:
    progress = Counted()
    with Journal(folder / "q.jsonl", {"a": 1}) as journal:
        todo = [item for item in items if item.id not in journal.done]
        asyncio.run(_label_all(pool, todo, job(folder, workers=2), journal, progress))  # type: ignore[arg-type]
    return progress


def test_questions_are_labelled_many_at_once_and_written_as_they_finish(tmp_path: Path) -> None:
    pool = FakePool()
    progress = run(pool, tmp_path)
    found = [q["id"] for q in entries(tmp_path / "q.jsonl")]
    assert sorted(found, key=int) == [i.id for i in ITEMS] and found[0] != "0"
    assert pool.most == 6, "two workers, three questions each"
    assert pool.stopped and progress.notes[-1] == "12 solutions"


def test_a_question_that_cannot_be_asked_is_a_status(tmp_path: Path) -> None:
    progress = run(FakePool({"3": DataError("its prompt is too long")}), tmp_path)
    failed = [q for q in entries(tmp_path / "q.jsonl") if q["status"] == "failed"]
    assert failed == [{"id": "3", "status": "failed", "error": "its prompt is too long"}]
    assert progress.notes[-1] == "11 solutions, 1 failed"


def test_a_pool_that_gives_up_ends_the_run_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    pool = FakePool({"4": EnvironmentProblem("engine-0 died too often")})
    with pytest.raises(EnvironmentProblem, match="died too often"):
        run(pool, tmp_path)
    assert pool.stopped
    before = {q["id"] for q in entries(tmp_path / "q.jsonl")}
    assert before and "4" not in before
    run(FakePool(), tmp_path)
    after = [q["id"] for q in entries(tmp_path / "q.jsonl")]
    assert len(after) == 12 and before < set(after)


def test_what_an_existing_run_means(tmp_path: Path) -> None:
    config, folder = job(tmp_path), tmp_path / "run" / "labels"
    with pytest.raises(CheckpointError, match="nothing to resume"):
        _prepare(folder, config, "resume")
    _prepare(folder, config, "error")
    (folder / "questions.jsonl").touch()
    with pytest.raises(ConfigError, match="Go on with --resume"):
        _prepare(folder, config, "error")
    _prepare(folder, config, "resume")
    assert (folder / "questions.jsonl").exists()
    _prepare(folder, config, "overwrite")
    assert [f.name for f in folder.iterdir()] == ["config.yaml"]


def test_a_run_that_is_alive_is_not_overwritten(tmp_path: Path) -> None:
    config, folder = job(tmp_path), tmp_path / "run" / "labels"
    _prepare(folder, config, "error")
    with Journal(folder / "questions.jsonl", {"a": 1}) as journal:
        journal.append({"id": "0"})
        with pytest.raises(CheckpointError, match=r"questions\.jsonl is in use: another process is writing"):
            _prepare(folder, config, "overwrite")
        journal.append({"id": "1"})
        assert [q["id"] for q in entries(folder / "questions.jsonl")] == ["0", "1"], "nothing was taken from under it"
    _prepare(folder, config, "overwrite")
    assert not (folder / "questions.jsonl").exists()


def test_items_without_an_id_of_their_own_are_refused(tmp_path: Path) -> None:
    task = Chat()
    with pytest.raises(DataError, match="no items in its held_out split"):
        choose_items(parse_config({"labels": {"split": "held_out"}}), task)
    task.train = lambda: [task.item, task.item]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="several items of the same id"):
        choose_items(parse_config({}), task)
