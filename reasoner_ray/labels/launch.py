"""`reasoner label`: the task's questions through a pool of rollout workers, into a journal that survives a kill."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from reasoner_ray.actor_calls import together
from reasoner_ray.config import JobConfig, to_yaml
from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from reasoner_ray.journal import Journal, entries
from reasoner_ray.labels.report import lines_of, summarise
from reasoner_ray.labels.store import JOURNAL, export, remove_labels
from reasoner_ray.progress import Counter, show_progress
from reasoner_ray.rollout.pool import RolloutPool
from reasoner_ray.trainer.launch import connect, load_task
from reasoner_ray.trainer.placement import place

if TYPE_CHECKING:
    from reasoner_ray.trainer.parts import GroupResult

IfExists = Literal["error", "resume", "overwrite"]
FOLDER = "labels"
"""Of a run's folder, which may hold a training run as well."""
RESUME = "resume with the run's own settings (reasoner label RUN/labels/config.yaml --resume), or replace it with --overwrite"


def label(config: JobConfig, if_exists: IfExists = "error") -> dict[str, Any]:
    """Label the task's questions, print the report and return it. Questions that the run's journal holds are not labelled again.

    Writes RUN/labels/questions.jsonl (a line a question, as they finish), labels.jsonl or .parquet (a record a solution) and
    report.json. Raises ``ReasonerError`` with what to do.
    """
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"episode": "label"})})
    config, task, _ = load_task(config)
    items, began = choose_items(config, task), time.perf_counter()
    folder = config.run_dir / FOLDER
    _prepare(folder, config, if_exists)
    with Journal(folder / JOURNAL, header_of(config), RESUME) as journal:
        todo = [item for item in items if item.id not in journal.done]
        if todo:
            connect(config)
            try:
                placed = place(config, ray.cluster_resources(), training=False)
                with show_progress("questions", len(items), len(items) - len(todo)) as progress:
                    asyncio.run(_label_all(RolloutPool(placed), todo, config, journal, progress))
            except KeyboardInterrupt:
                print(
                    f"{len(journal.done)} questions are labelled; go on with: reasoner label {folder / 'config.yaml'} --resume", flush=True
                )
                raise
            finally:
                ray.shutdown()
    report = {**summarise(entries(journal.path)), "session_s": time.perf_counter() - began}
    data = export(journal.path, config.labels.format)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for line in [*lines_of(report), f"written to {data}"]:
        print(line)
    return report


def choose_items(config: JobConfig, task: Task) -> list[Item]:
    """The items to label. Raises ``DataError`` where there is none, or where two share an id (a journal could not tell them apart)."""
    items = list((task.train() if config.labels.split == "train" else task.held_out())[: config.labels.items])
    if not items:
        raise DataError(f"task {task.name} has no items in its {config.labels.split} split to label")
    if len({item.id for item in items}) < len(items):
        raise DataError(f"task {task.name} has several items of the same id; labelling needs one id an item")
    return items


def header_of(config: JobConfig) -> dict[str, Any]:
    """What all labels of a journal were made with. How many workers, and how many items, may change between its runs."""
    tree = config.model_dump(mode="json")
    labels = {k: v for k, v in tree["labels"].items() if k not in ("items", "format")}
    rollout = {k: tree["rollout"][k] for k in ("max_new_tokens", "max_context", "stop")}
    data = {"task": tree["task"], "seed": config.seed, "scorers": tree["scoring"]["scorers"]}
    return {"model": tree["model"], **data, "labels": labels, "rollout": rollout}


def _prepare(folder: Path, config: JobConfig, if_exists: IfExists) -> None:
    if if_exists == "resume":
        if not (folder / JOURNAL).is_file():
            raise CheckpointError(f"nothing to resume: {folder / JOURNAL} does not exist")
        return
    if folder.exists():
        if if_exists == "error":
            raise ConfigError(f"{folder} exists. Go on with --resume, replace it with --overwrite, or set another name=...")
        remove_labels(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))


async def _label_all(pool: RolloutPool, items: Sequence[Item], config: JobConfig, journal: Journal, progress: Counter) -> None:
    """Every item, as many at once as the engines take; each is in the journal as soon as it is finished."""
    slots = asyncio.Semaphore(config.rollout.workers * config.rollout.max_groups_per_worker)
    counts = {"solutions": 0, "failed": 0}

    async def label_one(item: Item) -> None:
        async with slots:
            record = await _record_of(pool, item)
        await asyncio.to_thread(journal.append, record)
        counts["solutions"] += len(record.get("solutions", ()))
        counts["failed"] += record["status"] == "failed"
        progress.advance(", ".join(f"{count} {name}" for name, count in counts.items() if count))

    try:
        await pool.start()
        await pool.assume_synced(version=0)
        await together(map(label_one, items))
    finally:
        await pool.stop()


async def _record_of(pool: RolloutPool, item: Item) -> dict[str, Any]:
    """A question's line; one that cannot be asked (its prompt is too long, say) is a status, and counted."""
    try:
        result: GroupResult = await pool.finish(pool.submit(item, f"label-{item.id}", 1))
    except DataError as error:
        return {"id": item.id, "status": "failed", "error": str(error)}
    (trajectory,) = await result.trajectories
    record: dict[str, Any] = trajectory.info["labels"]
    return record
