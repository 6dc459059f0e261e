"""``reasoner collect`` of kind rl: scored episodes of a language model as records that kind sft and value learn from."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from reasoner_ray.actor_calls import together
from reasoner_ray.data.tasks import DataOrder, Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.journal import Journal, entries
from reasoner_ray.progress import Counter, show_progress
from reasoner_ray.rollout.pool import RolloutPool
from reasoner_ray.scoring.pool import ScorerPool
from reasoner_ray.trainer.launch import connect, load_task
from reasoner_ray.trainer.placement import place

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.trainer.parts import Judges, Plays
    from reasoner_ray.trajectory import Trajectory

RESUME = "collect with the settings it was begun with, or delete it"


def collect(config: JobConfig) -> dict[str, float]:
    """Play ``rollout.collect.tasks`` training items and write ``rollout.collect.out``; figures of what was played.

    Groups are kept in OUT.part as they finish, so that the same command goes on where one was cut short. Raises ``ReasonerError``.
    """
    out = _new_file(config)
    config, task, _ = load_task(config)
    order, part = DataOrder(task.train(), config.seed), out.with_name(f"{out.name}.part")
    groups = {f"collect-{place}": order[place] for place in range(config.rollout.collect.tasks)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with Journal(part, header_of(config, order.fingerprint), RESUME) as journal:
        todo = {name: item for name, item in groups.items() if name not in journal.done}
        if todo:
            connect(config)
            try:
                placed = place(config, ray.cluster_resources(), training=False)
                with show_progress("groups", len(groups), len(groups) - len(todo)) as progress:
                    asyncio.run(_collect(placed, todo, journal, progress))
            finally:
                ray.shutdown()
        figures = write(part, out, set(groups))
    part.unlink()
    return figures


def _new_file(config: JobConfig) -> Path:
    if config.rollout.collect.out is None:
        raise ConfigError("rollout.collect.out: name the file to write, for example runs/data/episodes.jsonl")
    out = Path(config.rollout.collect.out)
    if out.exists():
        raise ConfigError(f"{out} exists; delete it, or name another file with rollout.collect.out")
    return out


def header_of(config: JobConfig, items: str) -> dict[str, Any]:
    """What all episodes of a file were played with. How many, and by how many workers, may change between its runs."""
    tree = config.model_dump(mode="json")
    rollout = {k: tree["rollout"][k] for k in ("episode", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "max_turns")}
    rollout |= {"gamma": config.rollout.collect.gamma, "max_context": config.rollout.max_context, "stop": tree["rollout"]["stop"]}
    rollout["agent"] = {key: value for key, value in tree["rollout"]["agent"].items() if key != "max_processes"}
    if config.rollout.episode.startswith("search"):
        rollout["search"] = tree["search"]
    data = {"task": tree["task"], "items": items, "seed": config.seed, "samples": config.trainer.samples_per_task}
    scoring = {key: tree["scoring"][key] for key in ("scorers", "process")}
    return {"model": tree["model"], **data, **scoring, "rollout": rollout}


async def _collect(config: JobConfig, groups: dict[str, Item], journal: Journal, progress: Counter) -> None:
    pool, scorers = RolloutPool(config), ScorerPool(config)
    try:
        await asyncio.gather(pool.start(), scorers.start())
        await pool.assume_synced(version=0)
        await play_all(pool, scorers, groups, config, journal, progress)
    finally:
        await asyncio.gather(pool.stop(), scorers.stop())


async def play_all(
    rollouts: Plays, scorers: Judges, groups: dict[str, Item], config: JobConfig, journal: Journal, progress: Counter
) -> None:
    """Every group, as many at once as the engines take; each is in the journal as soon as it is scored. The first error ends it."""
    slots = asyncio.Semaphore(config.rollout.workers * config.rollout.max_groups_per_worker)
    gamma, samples, earned = config.rollout.collect.gamma, config.trainer.samples_per_task, list[float]()

    async def play(name: str, item: Item) -> None:
        async with slots:
            result = await rollouts.finish(rollouts.submit(item, name, samples))
            trajectories, _ = await scorers.fetch(await scorers.score(result, item))
        whole = [t for t in trajectories if t.status.is_trainable and t.trainable_tokens]
        records = [record for trajectory in whole for record in records_of(trajectory, gamma)]
        rewards = [trajectory.total_reward for trajectory in whole]
        line = {"id": name, "item": item.id, "rewards": rewards, "failed": len(trajectories) - len(whole), "records": records}
        await asyncio.to_thread(journal.append, line)
        earned.extend(rewards)
        progress.advance(f"reward {statistics.fmean(earned):.3f}" if earned else "")

    await together(play(name, item) for name, item in groups.items())


def records_of(trajectory: Trajectory, gamma: float = 1.0) -> list[dict[str, Any]]:
    """A record for each action: its context, the action, and as ``reward`` the return from there on, ``gamma`` a step of the environment.

    An action of several steps is discounted by as many, as in training.
    """
    found: list[dict[str, Any]] = []
    after = 0.0
    for span in reversed(trajectory.spans):
        if span.kind != "model":
            continue
        after = float(trajectory.rewards[span.start : span.end].sum()) + gamma**span.duration * after
        tokens, start = trajectory.tokens[span.context_start : span.end].tolist(), span.start - span.context_start
        found.append({"tokens": tokens, "start": start, "ends": [len(tokens)], "reward": after})
    return [{"id": f"{trajectory.id}/{turn}", **record} for turn, record in enumerate(reversed(found))]


def write(journal: Path, out: Path, names: set[str]) -> dict[str, float]:
    """The records of the groups ``names``, a line each, aside first and then renamed; figures of them."""
    figures: dict[str, list[float]] = {"rewards": [], "failed": [], "records": [], "tokens": []}
    aside = out.with_name(f"{out.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        for group in filter(lambda group: group["id"] in names, entries(journal)):
            figures["rewards"] += group["rewards"]
            figures["failed"].append(group["failed"])
            for record in group["records"]:
                figures["records"].append(1.0)
                figures["tokens"].append(len(record["tokens"]) - record["start"])
                file.write(json.dumps({**record, "item": group["item"]}) + "\n")
    aside.replace(out)
    rewards: Sequence[float] = figures["rewards"]
    return {
        "episodes": float(len(rewards)),
        "failed": sum(figures["failed"]),
        "records": sum(figures["records"]),
        "tokens": sum(figures["tokens"]),
        "reward": statistics.fmean(rewards) if rewards else float("nan"),
    }
