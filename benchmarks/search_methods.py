"""Every search method on one task and model, at several sizes and seeds: accuracy against generated tokens and against seconds.

The job says task, model, scorer of steps and prompts; the methods come from the table below. All searches run on one engine, a
method and size after the other, all items of it at once, so seconds compare methods and not start-ups. A method's seconds are the
wall-clock of all its items divided by their number; scorer tokens and prompt tokens are recorded beside.

    python -m benchmarks.search_methods jobs/search/arithmetic_mcts.yaml search.items=128 --name search_arithmetic
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import ray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, record
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.stepping import SteppingEngine
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.scoring.base import reward_terms
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.search.results import make_record, summarise_results
from reasoner_ray.search.run import search_items
from reasoner_ray.trainer.launch import connect, load_task

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "self_consistency": [{"paths": n} for n in (2, 4, 8, 16, 32)],
    "best_of_n": [{"paths": n} for n in (2, 4, 8, 16, 32)],
    "beam": [{"paths": p, "width": w} for p, w in ((1, 4), (2, 4), (4, 4), (8, 4))],
    "dfs": [{"paths": n, "width": 4} for n in (1, 2, 4)],
    "mcts": [{"paths": n, "width": 4} for n in (1, 2, 4, 8)],
    "cot_sc_tree": [{"paths": n, "width": 4} for n in (4, 8)],
    "mcts_alpha": [{"simulations": n, "width": 4} for n in (4, 8, 16)],
    "mcts_rollout": [{"simulations": n, "width": 4, "paths": n} for n in (8, 16, 32)],
    "gumbel": [{"simulations": n, "width": 4, "considered": 4} for n in (4, 8, 16)],
    "rstar": [{"actions": ["step", "rest"], "rollouts": n, "width": 3, "direct": 4} for n in (4, 8)],  # the policy knows one form alone
}


async def one_size(engine: SteppingEngine, config: JobConfig, items: Sequence[Item], scorer: Scorer, tokenizer: Any) -> dict[str, Any]:
    """All items at once by one method and size; the summary of `reasoner search`, with the wall-clock an item."""
    worker = RolloutWorker(config, engine, tokenizer)
    await engine.pause()
    await engine.resume(config.seed)  # what was computed before is not shared
    began = time.perf_counter()
    found = await asyncio.gather(*(worker.run_group(item, f"{config.seed}/{item.id}", 1) for item in items))
    wall = time.perf_counter() - began
    records = []
    for index, (item, (trajectories, _)) in enumerate(zip(items, found, strict=True)):
        judged, summary = await asyncio.to_thread(scorer.score_group, trajectories, item)
        records.append(make_record(index, item, judged, summary["rewards"]))
    return {**summarise_results(records), "wall_an_item": wall / len(items)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    return {"mean": fmean(values), "stdev": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


async def measure(engine: SteppingEngine, args: argparse.Namespace, base: JobConfig, task: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A row for each method and size, over all seeds."""
    scorer = Scorer(reward_terms(base.scoring, base.task), tokenizer, processes=1, timeout_s=base.scoring.timeout_s)
    items, rows = search_items(base, task), []
    try:
        for method in args.methods:
            for options in SWEEPS[method]:
                runs = []
                for seed in range(args.seeds):
                    search = base.search.model_copy(update={"method": method, "settings": options, "answers": None, "save_trees": False})
                    runs.append(await one_size(engine, base.model_copy(update={"seed": seed, "search": search}), items, scorer, tokenizer))
                row: dict[str, Any] = {"method": method, "settings": options}
                row |= {name: spread([run[name] for run in runs]) for name in ("accuracy", "confidence", "wall_an_item")}
                row |= {name: spread([run["cost"][name] for run in runs]) for name in runs[0]["cost"]}
                row["accuracy_by"] = {way: fmean([run["accuracy_by"][way] for run in runs]) for way in runs[0]["accuracy_by"]}
                row["unsolved"] = fmean([run["unsolved"] for run in runs])
                rows.append(row)
                print(
                    f"{method:<17} {options!s:<45} {row['accuracy']['mean']:.1%}  {row['generated']['mean']:.0f} tokens  "
                    f"{row['wall_an_item']['mean']:.3f} s",
                    flush=True,
                )
    finally:
        scorer.close()
    return rows


def draw(rows: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """Accuracy against tokens, and against seconds, a curve a method; bars are standard deviations over seeds."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (key, label) in zip(
        figure.subplots(1, 2, sharey=True), (("generated", "generated tokens an item"), ("wall_an_item", "seconds an item")), strict=True
    ):
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row[key]["mean"])
            ys, bars = [r["accuracy"]["mean"] for r in mine], [r["accuracy"]["stdev"] for r in mine]
            panel.errorbar([r[key]["mean"] for r in mine], ys, bars, label=method, marker="o", markersize=4, capsize=2, color=f"C{i}")
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out)


def main() -> None:
    """Measure, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--methods", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="search_methods")
    args = parser.parse_args()
    config, task, tokenizer = load_task(load_config(args.job, args.overrides))
    rollout = config.rollout.model_copy(update={"episode": "search_solutions", "max_groups_per_worker": 4096})
    config = config.model_copy(update={"rollout": rollout})
    connect(config)  # a step scorer may live in actors
    engine = SteppingEngine(EngineSettings.of(config, 0))
    try:
        rows = asyncio.run(measure(engine, args, config, task, tokenizer))
    finally:
        engine.shutdown()
        ray.shutdown()
    record(args.name, settings={"job": str(args.job), "overrides": args.overrides, "seeds": args.seeds}, figures={"rows": rows})
    draw(rows, RESULTS / f"{args.name}.png", f"{config.task.name}, {config.model.path}, steps valued by {config.search.scorer.name}")


if __name__ == "__main__":
    main()
