"""``reasoner search``: a search for each of a task's items, many at once on the rollout pool, judged only when it has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from reasoner_ray.actor_calls import together
from reasoner_ray.config import JobConfig, load_config, to_yaml
from reasoner_ray.data.tasks import Item, Task
from reasoner_ray.errors import ConfigError, DataError
from reasoner_ray.journal import as_line, open_locked, remove_folder
from reasoner_ray.progress import show_progress
from reasoner_ray.rollout.pool import RolloutPool
from reasoner_ray.scoring.pool import ScorerPool
from reasoner_ray.scoring.step_scorers import StepScorerContext
from reasoner_ray.search.methods import get_method, make_step_scorer
from reasoner_ray.search.results import (
    RESULTS_FILE,
    ResultsFile,
    failed_record,
    make_record,
    read_results,
    recorded_samples,
    show,
    summarise_results,
)
from reasoner_ray.search.settings import StoppingConfig
from reasoner_ray.search.stopping import Calibration, calibrate
from reasoner_ray.trainer.launch import IfExists, connect, load_task
from reasoner_ray.trainer.parts import Judges, Plays
from reasoner_ray.trainer.placement import place
from reasoner_ray.yaml_text import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NOT_THE_SEARCH = ("name", "out", "kind", "algorithm", "learner", "sync", "trainer", "tracking", "cluster", "labels", "supervised", "rounds")
"""Sections that may differ where a search goes on."""
MAY_DIFFER = {"search": ("items", "save_trees", "right_from"), "rollout": ("gpus", "gpu_memory_utilization")}
"""Keys of other sections that may."""
FOLDER = "search"
"""Where a run's folder holds its search."""


class SearchRun:
    """The items of a run that have no line yet, many at once; each line is written when its search has ended."""

    def __init__(
        self,
        rollouts: Plays,
        scorers: Judges,
        file: ResultsFile,
        *,
        in_flight: int,
        trees: Path | None = None,
        tokens: bool = False,
        on_result: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self._rollouts, self._scorers, self._file, self._tokens = rollouts, scorers, file, tokens
        self._slots = asyncio.Semaphore(in_flight)
        self._trees, self._on_result = trees, on_result

    async def run(self, items: Sequence[Item]) -> None:
        """Search; the first error ends the run, what was found until then is on disk. Raises what the search or a scorer raised.

        An item that cannot be searched on (its prompt is too long, say) is no error: its line says why.
        """
        done = self._file.done
        await together(self._one(index, item) for index, item in enumerate(items) if item.id not in done)

    async def _one(self, index: int, item: Item) -> None:
        async with self._slots:
            record = await self._search(index, item)
        self._file.append(record)
        self._on_result(record)

    async def _search(self, index: int, item: Item) -> dict[str, Any]:
        try:
            result = await self._rollouts.finish(self._rollouts.submit(item, f"search-{item.id}", 1))
        except DataError as error:
            return failed_record(index, item, str(error))
        trajectories, summary = await self._scorers.fetch(await self._scorers.score(result, item))
        tree = trajectories[0].info["search"].get("tree")
        if self._trees is not None and tree is not None:
            self._trees.mkdir(exist_ok=True)
            (self._trees / f"{index:05d}.json").write_bytes(as_line(tree))
        return make_record(index, item, trajectories, summary["rewards"], tokens=self._tokens)


def search(config: JobConfig, if_exists: IfExists = "error") -> dict[str, Any]:
    """Run a job's searches to the end, print their summary and return it (``summarise_results``); it is in RUN/search/summary.json too.

    Raises ``ReasonerError`` with what to do.
    """
    config, task, tokenizer = load_task(config)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"episode": "search_solutions"})})
    items = search_items(config, task)
    if config.rollout.temperature not in (1.0, config.search.temperature):
        told = "searches sample at search.temperature=%g; rollout.temperature=%g says nothing to them"
        log.warning(told, config.search.temperature, config.rollout.temperature)
    config = new_name(config) if if_exists == "new" else config
    folder, began = prepare_folder(config, if_exists), time.perf_counter()
    with ResultsFile(folder / RESULTS_FILE) as file:
        known = {item.id for item in items}
        if strange := [record["id"] for record in file.records if record["id"] not in known]:
            raise DataError(f"{file.path} holds item {strange[0]!r}, which is none of this job's; take --overwrite, or another name=...")
        connect(config)
        try:
            placed = place(config, ray.cluster_resources(), training=False)
            with show_progress("items", len(items), len(file.records)) as progress:
                asyncio.run(_search(placed, items, tokenizer, file, lambda record: progress.advance(standing(file.records))))
        finally:
            ray.shutdown()
    found = summarise_results(file.records, config.search.right_from)
    summary = {"method": config.search.method, **found, "session_s": time.perf_counter() - began}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(show(summary))
    return summary


async def _search(
    config: JobConfig,
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    file: ResultsFile,
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    pool, scorers = RolloutPool(config), ScorerPool(config)
    try:
        await asyncio.gather(pool.start(), scorers.start(), _start_step_scorer(config, tokenizer))
        await pool.assume_synced(version=0)
        in_flight = config.rollout.workers * config.rollout.max_groups_per_worker
        trees = file.path.parent / "trees" if config.search.save_trees else None
        tokens = config.search.save_tokens
        await SearchRun(pool, scorers, file, in_flight=in_flight, trees=trees, tokens=tokens, on_result=on_result).run(items)
    finally:
        await asyncio.gather(pool.stop(), scorers.stop())


async def _start_step_scorer(config: JobConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Build the step scorer once here, so that what is wrong with it is said before any search, and its actors start for all."""
    if not get_method(config.search).uses_scorer(config.search):
        return
    engine: Any = None  # it belongs to the workers, and nothing is scored here
    scorer = make_step_scorer(config.search, StepScorerContext(config=config, engine=engine, tokenizer=tokenizer))
    if hasattr(scorer, "start"):
        await scorer.start()


def standing(records: Sequence[dict[str, Any]]) -> str:
    """How the searches so far did, in a few words."""
    judged = [r["correct"] for r in records if r["correct"] is not None]
    tokens = sum(r["cost"]["generated"] for r in records) / len(records)
    return f"{f'accuracy {sum(judged) / len(judged):.1%}' if judged else 'none judged'}, {tokens:.0f} tokens an item"


def search_items(config: JobConfig, task: Task) -> list[Item]:
    """The first ``search.items`` of the split. Raises ``DataError`` where there is none, or two share an id."""
    split = task.held_out() if config.search.split == "held_out" else task.train()
    items = list(split[: config.search.items])
    if not items:
        raise DataError(f"task {task.name} has no {config.search.split} items to search on")
    if len({item.id for item in items}) < len(items):
        raise DataError(f"task {task.name}: two {config.search.split} items share an id, so results cannot be told apart")
    return items


def new_name(config: JobConfig) -> JobConfig:
    """The job under the first name that has no search yet."""
    base, number = config.name, 1
    while (config.run_dir / FOLDER).exists():
        number += 1
        config = config.model_copy(update={"name": f"{base}-{number}"})
    return config


def prepare_folder(config: JobConfig, if_exists: IfExists) -> Path:
    """RUN/search, made or taken up again.

    Raises ``ConfigError`` where it holds another search, or one that was not asked to go on, and ``CheckpointError`` where another
    process is at work on it.
    """
    folder = config.run_dir / FOLDER
    if folder.exists() and if_exists not in ("overwrite", "resume"):
        raise ConfigError(f"{folder} exists. Go on with --resume, replace it with --overwrite, or set another name=...")
    results = folder / RESULTS_FILE
    if folder.exists() and if_exists == "overwrite":
        remove_folder(folder, results)
    with open_locked(results) if results.is_file() else nullcontext():
        if folder.exists():
            _check_same_search(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def _check_same_search(config: JobConfig, folder: Path) -> None:
    """Raises ``ConfigError`` where the folder's search was another."""
    settings = folder / "config.yaml"
    before = load_config(settings).model_dump(mode="json") if settings.is_file() else {}
    now = config.model_dump(mode="json")
    for tree in (before, now):
        for section, keys in MAY_DIFFER.items():
            for key in keys:
                tree.get(section, {}).pop(key, None)
    different = [key for key in now if key not in NOT_THE_SEARCH and now[key] != before.get(key)]
    if different:
        raise ConfigError(f"{folder} was made with another {', '.join(different)}: see {settings}, or set another name=...")


def calibrate_stopping(config: JobConfig, results: Path, tolerance: float) -> Calibration:
    """The stopping threshold for a job, out of the results of a run of self_consistency with fixed N.

    The replay looks at the belief as often as the job's method does. Raises ``DataError``; warns where the questions were held out.
    """
    recorded = recorded_samples(read_results(results), config.search.right_from)
    made_with = results.parent / "config.yaml"
    if made_with.is_file() and read_yaml(made_with.read_text()).get("search", {}).get("split") == "held_out":
        log.warning(
            "%s holds held-out questions: a threshold that is calibrated on them must not be reported on them; record a run with "
            "search.split=train",
            results,
        )
    method, settings = get_method(config.search), config.search.stopping or StoppingConfig()
    wave = int(getattr(method.settings(config.search.settings), "wave", 1))  # methods without waves look after each solution
    return calibrate(recorded, settings, tolerance=tolerance, wave=wave, answers=config.search.answers or method.answers)
