"""Few-shot transfer of a Multi-Agent Transformer: pre-trained on several tasks, then another task with little data of it.

With each seed a network is pre-trained (--pretrain), goes on with the other task (--job) for the greatest of --shares of a full run of it,
and so does a new network; both are looked at on the way, by greedy episodes of the same seeds. Share 0 is zero-shot. --full adds a new
network that has a full run. Every run is `reasoner train` in a process of its own; finished ones are looked at as they are, one that was
interrupted, or is now to be longer, goes on from its last checkpoint: the same command, started again, goes on where it was. A run that
was trained otherwise is refused. Draws NAME.png.

The jobs are those of simple_spread, from two and four agents to three. A faulty joint of HalfCheetah, from the whole one and other faults:
    python -m benchmarks.mat_transfer --pretrain jobs/mat/half_cheetah_pretrain.yaml --job jobs/mat/half_cheetah_faulty.yaml \\
        --steps 2500 --full --episodes 5 --name mat_transfer_faulty
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, record
from benchmarks._runs import trained
from reasoner_ray.agents import SCRATCH
from reasoner_ray.config import load_config
from reasoner_ray.errors import ReasonerError

JOBS = Path(__file__).parent.parent / "jobs" / "mat"
TINY = ["multi_agent.envs=2", "multi_agent.segment_steps=5", "mat.width=8", "learner.epochs=2", "learner.updates_per_step=1"]
"""For --tiny: a look at whether everything works, in a few minutes; see ``tiny``."""
COLOURS = {"transfer": "#0072B2", "scratch": "#D55E00", "full": "#7F7F7F"}


def tiny(job: Path) -> list[str]:
    """What --tiny overrides in a job. Episodes end after five steps: by the environment's own limit where the job gives it one."""
    limit = "multi_agent.args.max_cycles" if "max_cycles" in load_config(job).multi_agent.args else "multi_agent.max_steps"
    return [*TINY, f"{limit}=5"]


def train(job: Path, name: str, seed: int, args: argparse.Namespace, *options: str, grows: bool = True) -> Path:
    """The folder of a finished run, of which one that ``grows`` may be there with fewer steps. Raises as ``trained`` does."""
    fixed = [f"name={name}-seed{seed}", f"seed={seed}", f"out={args.out}", "tracking.wandb=off", f"trainer.eval_tasks={args.episodes}"]
    return trained(job, [*(tiny(job) if args.tiny else []), *args.set, *fixed, *options], grows)


def returns_of(run: Path) -> dict[int, float]:
    """Return of each evaluation by the training steps before it."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval/return"] for row in rows if "eval/return" in row}


def measure(args: argparse.Namespace) -> dict[str, list[dict[int, float]]]:
    """Each side's evaluations, one a seed."""
    steps = {share: round(args.steps * share / 100) for share in args.shares}
    every = math.gcd(*steps.values())
    few = [f"trainer.steps={max(steps.values())}", f"trainer.eval_every={every}"]
    found: dict[str, list[dict[int, float]]] = {}
    for seed in range(1, args.seeds + 1):
        before = train(args.pretrain, f"{args.name}-pretrain", seed, args, f"trainer.steps={args.pretrain_steps}", grows=False)
        sides = {"transfer": [f"model.path={before / 'model'}", *few], "scratch": [f"model.path={SCRATCH}", *few]}
        if args.full:
            sides["full"] = [f"model.path={SCRATCH}", f"trainer.steps={args.steps}", f"trainer.eval_every={max(steps.values())}"]
        for side, options in sides.items():
            run = train(args.job, f"{args.name}-{side}", seed, args, *options)
            found.setdefault(side, []).append(returns_of(run))
            print(f"{run.name}: " + ", ".join(f"step {step} {value:.4g}" for step, value in found[side][-1].items()), flush=True)
    return found


def figures_of(found: dict[str, list[dict[int, float]]], args: argparse.Namespace) -> dict[str, Any]:
    """SIDE/return at PERCENT of a full run, a number a seed; and by how much the pre-trained network is ahead."""
    figures: dict[str, Any] = {}
    for share in args.shares:
        step = round(args.steps * share / 100)
        for side in ("transfer", "scratch"):
            figures[f"{side}/return_at_{share}%"] = [one[step] for one in found[side]]
        pairs = zip(found["transfer"], found["scratch"], strict=True)
        figures[f"transfer_minus_scratch_at_{share}%"] = [a[step] - b[step] for a, b in pairs]
    if args.full:
        figures["full/return_at_100%"] = [one[args.steps] for one in found["full"]]
    return figures


def draw(found: dict[str, list[dict[int, float]]], args: argparse.Namespace, file: Path) -> None:
    """Return over the data of the new task: the mean of the seeds and their range. A full run's end is a line."""
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side, runs in found.items():
        if side == "full":
            mean = sum(run[args.steps] for run in runs) / len(runs)
            axes.axhline(mean, color=COLOURS[side], linestyle="--", label="from scratch, after a full run")
            continue
        steps = sorted(runs[0])
        values = [[run[step] for run in runs] for step in steps]
        shares = [100 * step / args.steps for step in steps]
        label = "pre-trained" if side == "transfer" else "from scratch"
        axes.plot(shares, [sum(v) / len(v) for v in values], color=COLOURS[side], marker=".", label=label)
        axes.fill_between(shares, [min(v) for v in values], [max(v) for v in values], color=COLOURS[side], alpha=0.2, linewidth=0)
    axes.set(xlabel="data of the new task, % of a full run", ylabel="return of greedy episodes")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    """Train, measure, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=Path, default=JOBS / "spread_pretrain.yaml")
    parser.add_argument("--job", type=Path, default=JOBS / "spread_transfer.yaml", help="the other task")
    parser.add_argument("--pretrain-steps", type=int, help="default: as the job says")
    parser.add_argument("--steps", type=int, default=200, help="of a full run of the other task; a multiple of 100")
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 1, 5, 10], help="of it, in percent")
    parser.add_argument("--full", action="store_true", help="also a full run from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="mat_transfer", help="of the runs, the record and the picture")
    parser.add_argument("--tiny", action="store_true", help="one seed, tiny networks and runs: whether it works, not what it gives")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every job, for example rollout.cpus=0.25")
    args = parser.parse_args()
    if args.tiny:
        args.seeds, args.steps, args.pretrain_steps, args.episodes, args.name = 1, 100, 2, 2, f"{args.name}_tiny"
    if args.steps % 100 or not max(args.shares):
        parser.error("--steps must be a multiple of 100, and one of --shares above 0")
    args.pretrain_steps = args.pretrain_steps or load_config(args.pretrain).trainer.steps
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(args)
    except ReasonerError as error:
        parser.exit(1, f"{error}\n")
    record(
        args.name,
        settings={**vars(args), **{key: str(getattr(args, key)) for key in ("out", "job", "pretrain")}},
        figures=figures_of(found, args),
    )
    draw(found, args, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
