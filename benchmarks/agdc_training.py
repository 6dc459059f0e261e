"""Agents that end themselves against planners, in one table: AGDC with PPO, DQN and DDPG, ablations, and worlds outside the training.

Jobs of jobs/agdc are trained with several seeds, seed by seed, so that a measurement cut short has complete comparisons; --parallel of
them at a time. Each result plays the same fixed episodes in its own job's setting and, with --shifts, in others; so do the planners, once
for each setting (moves, filter, rule) that occurs. Runs that are finished are looked at as they are, one that was interrupted goes on
from its last checkpoint, and looks are kept in OUT/agdc-looks.json: the same command, started again, goes on where it was. A job with
the rule `calibrated` is fitted first. Draws agdc_training.png: the learning curves, and what each policy reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, record
from benchmarks._runs import trained
from benchmarks.agdc_planners import SHIFTS, shifted
from reasoner_ray.agents.agdc.evaluate import search_metrics
from reasoner_ray.agents.agdc.launch import make_arena
from reasoner_ray.agents.agdc.problem import Policy, make_problem
from reasoner_ray.agents.agdc.rllib import TrainedPolicy
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.config import load_config
from reasoner_ray.errors import ConfigError, ReasonerError
from reasoner_ray.plot import plot_runs
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

SHOWN = ("success", "right", "stop_rate", "correct_stops", "wrong_stops", "steps", "distance", "final_distance", "error")
JOBS = Path(__file__).parent.parent / "jobs" / "agdc"
ALL = [
    *("ppo", "dqn", "ddpg"),
    *("ppo_without_agdc", "ppo_without_feedback", "ppo_without_cessation", "ppo_over_confident", "ppo_calibrated"),
]
HOW = ("environment", "objects", "problem", "belief", "cessation", "feedback", "tolerance", "detect")
"""What decides how an episode goes, policies apart."""


def command(*arguments: str) -> None:
    """A command of reasoner's. Raises ``CalledProcessError`` where it fails."""
    subprocess.run([sys.executable, "-m", "reasoner_ray.cli", *arguments], check=True)


def overrides_of(job: str, args: argparse.Namespace) -> list[str]:
    """What a job is given: --set, and the fit of the rule `calibrated`, made where it is not there yet."""
    config = load_config(JOBS / f"{job}.yaml", args.set)
    if config.agdc.cessation.rule != "calibrated":
        return list(args.set)
    file = args.out / "agdc-calibration.json"
    if not file.is_file():
        fitting = ["agdc.policy=dcee", f"trainer.eval_tasks={args.episodes}", f"agdc.calibrate={file}"]
        command("eval", str(JOBS / f"{job}.yaml"), *args.set, *fitting)
    return [*args.set, f"agdc.cessation.calibration={file}"]


def check(args: argparse.Namespace) -> None:
    """Raises ``ConfigError`` before any training for planners or shifts that a job's problem does not have."""
    for job in args.jobs:
        agdc = load_config(JOBS / f"{job}.yaml", args.set).agdc
        planners = make_problem(agdc).planners
        for planner in args.planners:
            planners.get(planner)
        if args.shifts and agdc.problem != "source_term":
            raise ConfigError(f"--shifts changes source_term's world, and job {job} is {agdc.problem}; leave --shifts out")


def train(job: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a finished run. Raises as ``trained`` does."""
    name = f"agdc-{job.replace('_', '-')}-seed{seed}"
    options = [f"name={name}", f"seed={seed}", f"out={args.out}", "tracking.wandb=off", *overrides_of(job, args)]
    return trained(JOBS / f"{job}.yaml", options)


class Looks:
    """Evaluations, kept in a file as they come."""

    def __init__(self, file: Path, episodes: int) -> None:
        self._file, self._episodes = file, episodes
        self._known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}

    def look(self, name: str, agdc: AgdcConfig, policy: Policy) -> dict[str, float]:
        """Figures of ``policy``, by its ``name`` and how its episodes go."""
        how = {key: value for key, value in agdc.model_dump(mode="json").items() if key in HOW}
        key = json.dumps([name, self._episodes, how])
        if key not in self._known:
            self._known[key] = search_metrics(make_arena(agdc).run(policy, self._episodes), agdc.tolerance)
            self._file.write_text(json.dumps(self._known, indent=1))
        found = self._known[key]
        print(f"{name}: " + ", ".join(f"{shown} {found[shown]:.3g}" for shown in SHOWN if shown in found), flush=True)
        return found


def worlds(agdc: AgdcConfig, shifts: list[str]) -> dict[str, AgdcConfig]:
    """The job's own setting, and others."""
    return {"as_trained": agdc, **{name: shifted(agdc, SHIFTS[name]) for name in shifts}}


def measure(args: argparse.Namespace) -> tuple[dict[str, dict[str, list[dict[str, float]]]], list[Path]]:
    """Table: world, policy (a job, or a planner in a job's setting), its looks, one a seed; and the runs."""
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    looks, runs = Looks(args.out / "agdc-looks.json", args.episodes), []
    pool = ThreadPoolExecutor(args.parallel)
    try:
        training = [(job, pool.submit(train, job, seed, args)) for seed in range(1, args.seeds + 1) for job in args.jobs]
        for job, finished in training:
            run = finished.result()
            runs.append(run)
            for world, agdc in worlds(load_config(run / "config.yaml").agdc, args.shifts).items():
                found = looks.look(f"{run.name}, {world}", agdc, TrainedPolicy.load(run / "model", agdc))
                table.setdefault(world, {}).setdefault(job, []).append(found)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the runs under way; the others must not begin
    settings: dict[str, str] = {}
    for job in args.jobs:
        own = load_config(args.out / f"agdc-{job.replace('_', '-')}-seed1" / "config.yaml").agdc
        how = json.dumps({key: value for key, value in own.model_dump(mode="json").items() if key in HOW and key != "feedback"})
        if not own.detect or own.cessation.rule == "never" or settings.setdefault(how, job) != job:
            continue  # planners have a belief and a rule; jobs that share both share their planners
        for world, agdc in worlds(own, args.shifts).items():
            for planner in args.planners:
                found = looks.look(f"{planner} in {job}, {world}", agdc, make_problem(agdc).planners.get(planner)(seed=0))
                table[world][f"{planner} in {job}"] = [found]
    return table, runs


def draw(table: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Success, wrong stops and steps of each policy: the mean of its seeds with their range, or a planner's own 95 % interval."""
    names, panels = list(table), ("success", "wrong_stops", "steps")
    figure = Figure(figsize=(4.2 * len(panels), 0.32 * len(names) + 1.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for row, name in enumerate(names):
            values = [found[metric] for found in table[name]]
            several = len(values) > 1
            low, high = (min(values), max(values)) if several else (table[name][0][f"{metric}_{end}"] for end in ("low", "high"))
            mean, colour = statistics.fmean(values), "#7F7F7F" if " in " in name else "#0072B2"
            axes.errorbar(mean, row, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], fmt="o", color=colour, capsize=3)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=metric.replace("_", " "))
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def figures_of(table: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """WORLD/POLICY/METRIC: a number a seed; of the only look (a planner) also its interval."""
    figures: dict[str, Any] = {}
    for world, policies in table.items():
        for policy, found in policies.items():
            for key in SHOWN:
                if all(key in one for one in found):
                    figures[f"{world}/{policy}/{key}"] = [one[key] for one in found] if len(found) > 1 else found[0][key]
                    for end in ("low", "high"):
                        ends = [one[f"{key}_{end}"] for one in found]
                        figures[f"{world}/{policy}/{key}_{end}"] = ends if len(found) > 1 else ends[0]
    return figures


def training_of(runs: list[Path]) -> dict[str, list[float]]:
    """training/JOB/minutes and training/JOB/actions: what the training of each seed took, evaluations and checkpoints included."""
    figures: dict[str, list[float]] = {}
    for run in runs:
        lines = read_jsonl(run / METRICS_FILE)
        job = run.name.removeprefix("agdc-").rpartition("-seed")[0].replace("-", "_")
        for key, metric in (("minutes", "time/minutes"), ("actions", "episode/actions_in_all")):
            figures.setdefault(f"training/{job}/{key}", []).append(next(line[metric] for line in reversed(lines) if metric in line))
    return figures


def main() -> None:
    """Train, measure, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=ALL, choices=sorted(f.stem for f in JOBS.glob("*.yaml")), help="of jobs/agdc")
    parser.add_argument("--planners", nargs="*", default=["random", "infotaxis", "entrotaxis", "dcee", "oracle"], help="to compare with")
    parser.add_argument("--shifts", nargs="*", default=[], choices=list(SHIFTS), help="also outside the range of training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each job, seeds 1 to N")
    parser.add_argument("--episodes", type=int, default=500, help="that each policy is looked at on, the same for all")
    parser.add_argument("--parallel", type=int, default=1, help="runs that train at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs' folders")
    parser.add_argument("--name", default="agdc_training", help="of the record and the pictures")
    parser.add_argument("--set", nargs="*", default=[], help="overrides, for example trainer.steps=40")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        check(args)
        table, runs = measure(args)
    except ReasonerError as error:
        sys.exit(f"error: {error}")
    record(args.name, settings={**vars(args), "out": str(args.out)}, figures=figures_of(table) | training_of(runs))
    for world, policies in table.items():
        draw(policies, RESULTS / (f"{args.name}.png" if world == "as_trained" else f"{args.name}_{world}.png"))
    curves = ["eval/success", "eval/wrong_stops", "eval/stop_rate", "eval/steps"]
    plot_runs(runs, RESULTS / f"{args.name}_curves.png", curves, x="actions")


if __name__ == "__main__":
    main()
