"""The main job: how far a real 135M model gets, and in how many minutes, with each algorithm over several seeds.

Every run is `reasoner train JOB seed=N` in a process of its own, one after the other; its minutes are those from the
process's start to its end. The model is made ready before the first (set-up). Draws the learning curves, seeds as bands.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, record
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import ReasonerError
from reasoner_ray.models import resolve_model
from reasoner_ray.plot import plot_runs
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

ROOT = Path(__file__).parent.parent
JOBS = [ROOT / "jobs" / "quickstart.yaml", ROOT / "jobs" / "quickstart_grpo.yaml"]
PER_STEP = (
    "time/step_s",
    "time/collect_s",
    "time/learn_s",
    "time/sync_s",
    "rollout/tokens_per_s",
    "learner/tokens_per_s",
    "learner/tokens_trained",
    "learner/tokens_packed",
    "idle/rollout",
    "idle/learner",
)
"""Metrics whose mean over a run's steps is recorded."""


def run_job(job: Path, overrides: list[str]) -> dict[str, Any]:
    """One run through the command line. Raises ``SystemExit`` where it fails."""
    config = load_config(job, overrides)
    began = time.perf_counter()
    command = [sys.executable, "-m", "reasoner_ray.cli", "train", str(job), *overrides, "--overwrite"]
    code = subprocess.run(command, cwd=ROOT).returncode
    minutes = (time.perf_counter() - began) / 60
    if code:
        raise SystemExit(f"the run in {config.run_dir} failed with exit code {code}; see what it printed above")
    return {"minutes": minutes, **summarise(config)}


def summarise(config: JobConfig) -> dict[str, Any]:
    """Accuracies in percentage points, mismatch of rollout and learner, mean seconds and rates of a step."""
    records = read_jsonl(config.run_dir / METRICS_FILE)
    curve = {r["step"]: 100 * r["eval/accuracy"] for r in records if r.get("eval/accuracy") is not None}
    steps = [r for r in records if r["step"] > 0]
    if 0 not in curve or config.trainer.steps not in curve:
        raise SystemExit(f"{config.run_dir} has no evaluation at its start or at its end; trainer.eval_tasks must be above 0")
    return {
        "accuracy_start": curve[0],
        "accuracy_end": curve[config.trainer.steps],
        "gain_points": curve[config.trainer.steps] - curve[0],
        "curve": curve,
        "mismatch_k3_mean": statistics.fmean(r["mismatch/k3"] for r in steps),
        "mismatch_max_abs": max(r["mismatch/max_abs"] for r in steps),
        "per_step": {key: statistics.fmean(r[key] for r in steps) for key in PER_STEP},
    }


def figures_of(algorithm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one algorithm; lists have one value a seed."""
    numbers = [key for key, value in runs[0].items() if isinstance(value, float)]
    return {
        **{f"{algorithm}_{key}": [run[key] for run in runs] for key in numbers},
        **{f"{algorithm}_{key}": [run["per_step"][key] for run in runs] for key in PER_STEP},
        f"{algorithm}_curves": [run["curve"] for run in runs],
    }


def main() -> None:
    """Run, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--jobs", type=Path, nargs="+", default=JOBS)
    parser.add_argument("--out", type=Path, default=Path("runs/main_job"), help="folder that holds the runs' folders")
    parser.add_argument("--overrides", nargs="*", default=[], help="for example trainer.steps=40")
    parser.add_argument("--name", default="main_job", help="of the record and its picture")
    args = parser.parse_args()
    args.out = args.out.resolve()
    try:
        jobs = {job.resolve(): load_config(job, args.overrides) for job in args.jobs}
        for config in jobs.values():
            resolve_model(config.model.path)
        results: dict[Path, list[dict[str, Any]]] = {job: [] for job in jobs}
        folders = []
        for seed in range(args.seeds):
            for job, config in jobs.items():
                name = f"{config.name}-s{seed}"
                own = [f"seed={seed}", f"name={name}", f"out={args.out}"]
                results[job].append(run_job(job, ["tracking.wandb=offline", *args.overrides, *own]))
                folders.append(args.out / name)
        figures: dict[str, Any] = {}
        for job, config in jobs.items():
            figures |= figures_of(config.algorithm.name, results[job])
        settings = {job.name: config.model_dump(mode="json") for job, config in jobs.items()}
        record(args.name, settings={"seeds": args.seeds, "overrides": args.overrides, **settings}, figures=figures)
        picture = RESULTS / f"{args.name}.png"
        plot_runs(folders, picture, title=f"SmolLM2-135M, {args.seeds} seeds")
        print(f"drawn to {picture}")
    except ReasonerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
