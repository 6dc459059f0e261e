"""A Multi-Agent Transformer against RLlib's multi-agent PPO (MAPPO, IPPO) on the same environments, steps and evaluation.

The transformer is trained by its job file, the baselines by RLlib's own PPO (benchmarks/_rllib.py). Environments, padding, agent ids, team
rewards, action masks and the normalisation of returns are the same code for all sides, and so are the greedy episodes that they are
compared by: at the beginning, every trainer.eval_every training steps, and at the end. The value loss is not: the transformer's is Huber's
with a clipped change, RLlib's is squared.

Runs lie in OUT/NAME/SIDE-seedN. Finished ones are looked at as they are, the transformer's go on where they were interrupted: the same
command, started again, goes on where it was. What was trained otherwise is refused. Draws NAME.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, record
from benchmarks._rllib import PpoSettings, learning_curve, steps_of
from benchmarks._runs import kept, trained
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import ReasonerError
from reasoner_ray.plot import plot_runs
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

ROOT = Path(__file__).parent.parent
SIDES = ("mat", "mappo", "ippo")


def options_of(side: str, seed: int, args: argparse.Namespace) -> list[str]:
    """What the job is given for a side's run."""
    return [*args.overrides, f"name={side}-seed{seed}", f"seed={seed}", f"out={args.out / args.name}", "tracking.wandb=off"]


def run_of(side: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a side's finished run, trained where it is not there. Raises as ``trained`` and ``kept`` do."""
    options = options_of(side, seed, args)
    if side == "mat":
        return trained(args.job, options)
    config = load_config(args.job, options)
    ppo = PpoSettings(lr=args.lr, clip=args.clip, epochs=args.epochs, minibatches=args.minibatches)
    run = config.run_dir
    run.mkdir(parents=True, exist_ok=True)
    settings = settings_of(config) | {"side": side, **asdict(ppo)}
    rows = kept(run / "curve.json", settings, lambda: learning_curve(config, central=side == "mappo", ppo=ppo))
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))  # the form in which curves are drawn
    return run


def settings_of(config: JobConfig) -> dict[str, Any]:
    """Everything of a job that RLlib's side depends on."""
    tree = config.model_dump(mode="json")
    keys = [f"multi_agent.{key}" for key in tree["multi_agent"] if key != "deadline_s"]
    keys += [f"mat.{key}" for key in ("width", "std_init", "gamma", "gae_lambda", "entropy", "value_norm", "value_norm_beta")]
    keys += ["rollout.workers", "learner.max_grad_norm", "trainer.steps", "trainer.eval_every", "trainer.eval_tasks"]
    return {key: tree[key.split(".")[0]][key.split(".")[1]] for key in keys} | {"seed": config.seed}


def curve_of(run: Path) -> dict[int, dict[str, float]]:
    """Evaluations by the environment steps before them."""
    rows = [row for row in read_jsonl(run / METRICS_FILE) if "eval/return" in row]
    return {int(row["episode/actions_in_all"]): row for row in rows}


def figures_of(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """SIDE_return and its interval at the end, SIDE/return_at_STEPS on the way, a number a seed."""
    curves = {side: [curve_of(run) for run in own] for side, own in runs.items()}
    figures: dict[str, Any] = {}
    for side, own in curves.items():
        figures[f"{side}_return"] = [curve[max(curve)]["eval/return"] for curve in own]
        figures[f"{side}_return_ci95"] = [curve[max(curve)]["eval/return_ci95"] for curve in own]
    if {"mat", "mappo"} <= set(runs):
        figures["mat_minus_mappo"] = statistics.fmean(figures["mat_return"]) - statistics.fmean(figures["mappo_return"])
    for side, own in curves.items():
        for steps in sorted(set.intersection(*(set(curve) for curve in own))):
            figures[f"{side}/return_at_{steps}"] = [curve[steps]["eval/return"] for curve in own]
    return figures


def main() -> None:
    """Train every side on every seed, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs/mat/simple_spread.yaml")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lr", type=float, default=7e-4, help="of the baselines; its default and those of the next three are MAPPO's for particles"
    )
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the comparison's folder")
    parser.add_argument("--name", help="of the comparison's folder, the record and the picture; default: mat_baselines_JOB")
    parser.add_argument("overrides", nargs="*", help="of the job, for example trainer.steps=50")
    args = parser.parse_args()
    args.name = args.name or f"mat_baselines_{args.job.stem}"
    runs: dict[str, list[Path]] = {}
    try:
        config = load_config(args.job, args.overrides)
        for seed in args.seeds:
            for side in args.sides:
                runs.setdefault(side, []).append(run_of(side, seed, args))
    except ReasonerError as error:
        parser.exit(1, f"error: {error}\n")
    settings = {**vars(args), "job": str(args.job), "out": str(args.out), "environment": config.multi_agent.name}
    settings |= {"environment_steps": steps_of(config) * config.trainer.steps, "returns_normalised": config.mat.value_norm}
    record(args.name, settings=settings, figures=figures_of(runs))
    plot_runs([run for own in runs.values() for run in own], RESULTS / f"{args.name}.png", ["eval/return"], x="actions")


if __name__ == "__main__":
    main()
