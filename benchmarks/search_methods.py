"""Search methods on one task and model, over seeds: at equal generated tokens, and at several sizes against tokens and against seconds.

A job says task, model, scorer of steps and prompts (``jobs/search/TASK.yaml``, or one's own). All searches run on one engine, a method
after the other, all items of it at once, so seconds compare methods and not start-ups. A row has what was really generated, prompt and
scorer tokens, seconds an item (the wall-clock of all items by their number), and accuracy with a 95 % interval.

At equal tokens self-consistency and best-of-N draw as many solutions as it takes to generate the tokens of the budget, all at once, and
beam search, which has no answer before its end, is as wide as fits in. A tree search gets the budget itself (``search.budget.generated``)
and ends with the step that uses it up; a way that it is on then gives no answer. Greedy decoding is one solution. Differences are of
pairs, item by item.

What is finished is kept in ``--out`` and taken from there, so a broken-off measurement goes on.

    python -m benchmarks.search_methods --task deduction search.items=64
    python -m benchmarks.search_methods --task gsm8k model.path=FOLDER search.items=50 \\
        task.args.path=GSM8K/train.jsonl.gz task.args.held_out_path=GSM8K/test.jsonl
    python -m benchmarks.search_methods --job jobs/search/arithmetic_mcts.yaml search.items=128 --name search_arithmetic
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import ray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks._record import RESULTS, record
from benchmarks._runs import kept
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.data.tasks import Item, Task, stable_hash
from reasoner_ray.models import fingerprint, resolve_model
from reasoner_ray.prm.step_scorer import PrmStepScorer
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.stepping import SteppingEngine
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.scoring.base import reward_terms
from reasoner_ray.scoring.scorer import Scorer
from reasoner_ray.scoring.step_scorers import StepScorerContext
from reasoner_ray.search.methods import get_method, make_step_scorer
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
PLAIN = ("best_of_n", "self_consistency")
"""What the others are compared with at equal tokens."""
SIZED = ("greedy", *PLAIN, "beam")
"""Methods that a budget would break off before they have an answer, or make slower: it says how large they are instead."""
EQUAL = (*SIZED, "mcts")
JOBS = Path(__file__).parent.parent / "jobs" / "search"
TASKS: dict[str, tuple[list[int], int | None]] = {
    "game24": ([500, 1000], None),
    "deduction": ([640, 1280], None),
    "gsm8k": ([1024, 2048], 0),
    "math500": ([2048], 0),
}
"""For each task budgets in generated tokens, of eight solutions and more, and how many sizes of each method (None: all)."""


def fitted(method: str, budget: int, solution: float) -> dict[str, Any]:
    """Settings with which a search generates ``budget`` tokens, or goes on until it has.

    ``solution`` is the tokens of a sampled solution. Of plain samples there are as many as reach the budget, of beam search as many
    steps at a time as fit in. The ways through a tree are bounded at four a sample: a tree that is known to its end costs nothing more.
    """
    samples = budget / solution
    most, width = math.ceil(4 * samples), max(1, min(4, int(samples)))
    if method == "greedy":
        return {}
    if method in PLAIN:
        return {"paths": math.ceil(samples)}
    if method == "beam":
        room = math.ceil(samples)
        widths = [w for w in (4, 5, 3, 6, 2) if w <= room] or [1]
        paths, width = max(((room // w, w) for w in widths), key=lambda size: size[0] * size[1])
        return {"paths": paths, "width": width}
    if method == "rstar":
        return {"actions": ["step", "rest"], "rollouts": most, "width": 3, "direct": 4}
    more = {
        "mcts_alpha": {"simulations": 4, "sample_moves": True},
        "gumbel": {"simulations": 4, "considered": 4},
        "mcts_rollout": {"simulations": 4 * most},
    }
    return {"paths": most, "width": width, **more.get(method, {})}


def interval(values: Sequence[float]) -> list[float]:
    """Wilson's 95 % interval of a mean of shares in [0, 1], one an item. Several seeds of an item count as one draw: rather wide."""
    n, mean, z = len(values), fmean(values), NormalDist().inv_cdf(0.975)
    middle = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def by_item(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    """In what share of the seeds each item is right, by its place; those that could not be judged in some seed are left out."""
    seeds = zip(*(run["right_items"] for run in runs), strict=True)
    return {place: fmean(values) for place, values in enumerate(seeds) if None not in values}


def points_above(runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], draws: int = 10_000) -> dict[str, Any]:
    """What ``runs`` are better by in percentage points, with a 95 % interval over the items of both (bootstrap of pairs)."""
    ours, theirs = by_item(runs), by_item(plain)
    gained = 100 * np.array([ours[place] - theirs[place] for place in sorted(ours.keys() & theirs.keys())])
    drawn = np.random.default_rng(0).integers(len(gained), size=(draws, len(gained)))
    return {"points": float(gained.mean()), "points_95": np.percentile(gained[drawn].mean(1), [2.5, 97.5]).tolist()}


async def one_size(engine: SteppingEngine, config: JobConfig, items: Sequence[Item], scorer: Scorer, tokenizer: Any) -> dict[str, Any]:
    """All items at once by one method and size; the summary of `reasoner search`, with the wall-clock an item and which items are right."""
    worker = RolloutWorker(config, engine, tokenizer)
    await engine.pause()
    await engine.resume(config.seed)  # what was computed before is not shared
    if get_method(config.search).uses_scorer(config.search):
        step_scorer = make_step_scorer(config.search, StepScorerContext(config=config, engine=engine, tokenizer=tokenizer))
        if isinstance(step_scorer, PrmStepScorer):
            await step_scorer.forget()
    began = time.perf_counter()
    found = await asyncio.gather(*(worker.run_group(item, f"{config.seed}/{item.id}", 1) for item in items))
    wall = time.perf_counter() - began
    records = []
    for index, (item, (trajectories, _)) in enumerate(zip(items, found, strict=True)):
        judged, summary = await asyncio.to_thread(scorer.score_group, trajectories, item)
        records.append(make_record(index, item, judged, summary["rewards"]))
    right = [None if r["correct"] is None else float(r["correct"] >= config.search.right_from) for r in records]
    return {**summarise_results(records, config.search.right_from), "wall_an_item": wall / len(items), "right_items": right}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    return {"mean": fmean(values), "stdev": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def summed_up(method: str, options: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of figures over all seeds, printed."""
    row: dict[str, Any] = {"method": method, "settings": options}
    row |= {name: spread([run[name] for run in runs]) for name in ("accuracy", "confidence", "wall_an_item")}
    row["accuracy_95"] = low, high = interval(list(by_item(runs).values()))
    row |= {name: spread([run["cost"][name] for run in runs]) for name in runs[0]["cost"]}
    ways = set.intersection(*(set(run["accuracy_by"]) for run in runs))  # values below 0 have no product
    row["accuracy_by"] = {way: fmean([run["accuracy_by"][way] for run in runs]) for way in sorted(ways)}
    row |= {name: fmean([run[name] for run in runs]) for name in ("unsolved", "unjudged")}
    print(
        f"{method:<17} {options!s:<45} {row['accuracy']['mean']:.1%} ({low:.1%} to {high:.1%})  {row['generated']['mean']:.0f} generated, "
        f"{row['prompt']['mean']:.0f} prompt, {row['scorer']['mean']:.0f} scorer tokens  {row['wall_an_item']['mean']:.3f} s",
        flush=True,
    )
    return row


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs searches, or finds them in ``folder`` where the same job with the same models has been run before."""

    base: JobConfig
    run: Callable[[JobConfig], dict[str, Any]]
    folder: Path
    seeds: int
    models: tuple[str, ...] = ()  # fingerprints of the policy's files and of the scorer's
    items: str = ""  # a hash of which are searched on, in their order

    def runs(self, method: str, options: dict[str, Any], budget: int | None = None) -> list[dict[str, Any]]:
        """One method and size, once a seed."""
        changed: dict[str, Any] = {"method": method, "settings": options, "answers": None, "save_trees": False}
        if budget is not None:
            changed["budget"] = self.base.search.budget.model_copy(update={"generated": budget})
        search, found = self.base.search.model_copy(update=changed), []
        for seed in range(self.seeds):
            config = self.base.model_copy(update={"seed": seed, "search": search})
            settings = config.model_dump(mode="json", include={"model", "task", "rollout", "scoring", "search", "seed"})
            settings |= {"models": list(self.models), "items": self.items}
            file = self.folder / f"{method}-{stable_hash(json.dumps(settings, sort_keys=True)):016x}.json"
            found.append(kept(file, settings, partial(self.run, config)))
        return found

    def swept(self, methods: Sequence[str], sizes: int | None) -> list[dict[str, Any]]:
        """A row for each method and each of its first ``sizes`` sizes."""
        plan = [(method, options) for method in methods for options in SWEEPS[method][:sizes]]
        return [summed_up(method, options, self.runs(method, options)) for method, options in plan]

    def at_equal_tokens(self, methods: Sequence[str], budgets: Sequence[int]) -> list[dict[str, Any]]:
        """A row for each budget and method, with what it is better by than the plain ones."""
        if not budgets:
            return []
        costs, rows = [run["cost"] for run in self.runs("self_consistency", {"paths": 4})], []
        solution = fmean([cost["generated"] / cost["requests"] for cost in costs])
        for budget in budgets:
            plain = {method: self.runs(method, fitted(method, budget, solution)) for method in PLAIN}
            for method in methods:
                options = fitted(method, budget, solution)
                found = plain.get(method) or self.runs(method, options, None if method in SIZED else budget)
                above = {f"above_{other}": points_above(found, runs) for other, runs in plain.items() if other != method}
                rows.append({"budget": budget, **summed_up(method, options, found), **above})
        return rows


def draw(rows: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """Accuracy against tokens, and against seconds, a curve a method; bars are standard deviations over seeds."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (key, label) in zip(
        figure.subplots(1, 2, sharey=True), (("generated", "generated tokens an item"), ("wall_an_item", "seconds an item")), strict=True
    ):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row[key]["mean"])
            place = list(SWEEPS).index(method)  # there are ten colours
            look = {"color": f"C{place % 10}", "marker": "os"[place // 10], "markersize": 4, "capsize": 2}
            ys, bars = [r["accuracy"]["mean"] for r in mine], [r["accuracy"]["stdev"] for r in mine]
            panel.errorbar([r[key]["mean"] for r in mine], ys, bars, label=method, **look)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out)


def read_arguments() -> argparse.Namespace:
    """What is asked for, with a task's own sizes where none are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of the job; without --task and --job the first is the job's file"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--task", choices=list(TASKS), help="its job in jobs/search")
    source.add_argument("--job", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(SWEEPS), help=f"default: {', '.join(EQUAL)} at equal tokens, all by sizes")
    parser.add_argument("--tokens", nargs="*", type=int, help="budgets of generated tokens that are equal for all; none: no such rows")
    parser.add_argument("--sizes", type=int, help="how many sizes of each method, the smallest first; 0: no such rows; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/search_methods"), help="where what is finished is kept")
    parser.add_argument("--name", help="of the record; default: search_TASK")
    args = parser.parse_args()
    if args.task is None and args.job is None:
        if not args.overrides:
            parser.error("--task or --job must be given")
        args.job = Path(args.overrides.pop(0))
    tokens, sizes = TASKS.get(args.task, ([], None))
    args.job = args.job or JOBS / f"{args.task}.yaml"
    args.tokens = tokens if args.tokens is None else args.tokens
    args.sizes = sizes if args.sizes is None else args.sizes
    args.name = args.name or (f"search_{args.task}" if args.task else "search_methods")
    return args


def measure(args: argparse.Namespace, config: JobConfig, task: Task, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows by sizes, and those at equal tokens."""
    terms = reward_terms(config.scoring, config.task)
    items, named = search_items(config, task), [config.model.path, config.search.scorer.args.get("model")]
    args.out.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner() as runner, closing(Scorer(terms, tokenizer, processes=1, timeout_s=config.scoring.timeout_s)) as scorer:
        engine = SteppingEngine(EngineSettings.of(config, 0))
        try:
            runner.run(one_size(engine, config, items[:1], scorer, tokenizer))  # or the first method's seconds would be those of start-ups
            bench = Bench(
                base=config,
                run=lambda job: runner.run(one_size(engine, job, items, scorer, tokenizer)),
                folder=args.out,
                seeds=args.seeds,
                models=tuple(fingerprint(resolve_model(name)) for name in named if name),
                items=f"{stable_hash(' '.join(item.id for item in items)):016x}",
            )
            equal = bench.at_equal_tokens(args.methods or EQUAL, args.tokens)
            return {"rows": bench.swept(args.methods or list(SWEEPS), args.sizes), "at_equal_tokens": equal}
        finally:
            engine.shutdown()


def main() -> None:
    """Measure, record and draw."""
    args = read_arguments()
    config, task, tokenizer = load_task(load_config(args.job, args.overrides))
    rollout = config.rollout.model_copy(update={"episode": "search_solutions", "max_groups_per_worker": 4096})
    config = config.model_copy(update={"rollout": rollout})
    connect(config)  # a step scorer may live in actors
    try:
        figures = measure(args, config, task, tokenizer)
    finally:
        ray.shutdown()
    settings = {"job": f"jobs/search/{args.job.name}" if args.task else str(args.job), "overrides": args.overrides, "seeds": args.seeds}
    record(args.name, settings={**settings, "items": config.search.items, "tokens": args.tokens, "sizes": args.sizes}, figures=figures)
    model = Path(config.model.path)
    run = model.parent.name if model.name == "model" else model.name  # RUN/model
    title = f"{config.task.name}, {run}, steps valued by {config.search.scorer.name}"
    for rows, name in zip(figures.values(), (args.name, f"{args.name}_equal_tokens"), strict=True):
        if rows:
            draw(rows, RESULTS / f"{name}.png", title)


if __name__ == "__main__":
    main()
