"""Trains jobs of jobs/agdc with several seeds and looks at each result over many episodes: what agents that end themselves reach.

Runs that are finished already are looked at as they are, so that a measurement that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks._record import record
from reasoner_ray.agents.agdc.evaluate import search_metrics
from reasoner_ray.agents.agdc.launch import make_arena
from reasoner_ray.agents.agdc.rllib import TrainedPolicy
from reasoner_ray.config import load_config

SHOWN = ("stop_rate", "correct_stops", "success", "wrong_stops", "steps", "distance", "error")
JOBS = Path(__file__).parent.parent / "jobs" / "agdc"


def train(job: str, seed: int, out: Path, overrides: list[str]) -> Path:
    """The folder of a finished run. Raises ``CalledProcessError`` where it fails."""
    name = f"agdc-{job.replace('_', '-')}-seed{seed}"
    if not (out / name / "model").is_dir():
        options = [f"name={name}", f"seed={seed}", f"out={out}", "tracking.wandb=off", *overrides]
        resume = ["--if-exists", "resume"] if list((out / name).glob("checkpoints/step-*/MANIFEST.json")) else ["--overwrite"]
        command = [sys.executable, "-m", "reasoner_ray.cli", "train", str(JOBS / f"{job}.yaml"), *options, *resume]
        subprocess.run(command, check=True)
    return out / name


def main() -> None:
    """Train, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["ppo", "dqn", "ddpg"], choices=sorted(f.stem for f in JOBS.glob("*.yaml")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides, for example trainer.steps=40")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    for job in args.jobs:
        seeds = []
        for seed in range(1, args.seeds + 1):
            run = train(job, seed, args.out, args.set)
            agdc = load_config(run / "config.yaml").agdc
            policy = TrainedPolicy.load(run / "model", agdc)
            seeds.append(search_metrics(make_arena(agdc).run(policy, args.episodes), agdc.tolerance))
            print(f"{run.name}: " + ", ".join(f"{key} {seeds[-1][key]:.3g}" for key in SHOWN if key in seeds[-1]), flush=True)
        for key in SHOWN:
            if all(key in found for found in seeds):
                figures[f"{job}/{key}"] = [found[key] for found in seeds]
    record("agdc_training", settings={**vars(args), "out": str(args.out)}, figures=figures)


if __name__ == "__main__":
    main()
