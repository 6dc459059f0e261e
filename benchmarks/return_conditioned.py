"""Language agents that are told what to earn, against those that learn the best alone: the same recorded episodes, the same steps.

With each seed the untrained model plays (`reasoner collect`), and three copies learn from its actions (`reasoner train`, kind sft): each
behind the return that followed (Decision Transformer, `conditioned`), the best share without a text (`filtered`, %BC), and all of them
(`cloned`). All play --episodes sampled episodes; the first is told each return in turn. Finished parts are taken as they are: the same
command, started again, goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks._record import record
from benchmarks._runs import kept, trained
from reasoner_ray.config import load_config
from reasoner_ray.errors import ConfigError, ReasonerError
from reasoner_ray.prm.conditioning import control_text
from reasoner_ray.trainer.launch import evaluate

JOBS = Path(__file__).parent.parent / "jobs" / "agents"


def collected(job: Path, seed: int, args: argparse.Namespace) -> Path:
    """The records of a seed's episodes, played where they are not there yet. Raises ``SystemExit`` where that fails."""
    file: Path = args.out / f"episodes-seed{seed}.jsonl"

    def play() -> str:
        how = [f"rollout.collect.{key}={value}" for key, value in (("out", file), ("gamma", args.gamma), ("tasks", args.tasks))]
        command = [sys.executable, "-m", "reasoner_ray.cli", "collect", str(job), f"seed={seed}", *how, *args.set]
        if code := subprocess.run([*command, f"trainer.samples_per_task={args.samples}"]).returncode:
            raise SystemExit(f"collecting {file} failed with exit code {code}; see what it printed above")
        return file.name

    settings = {"job": job.stem, **{key: getattr(args, key) for key in ("gamma", "tasks", "samples", "set")}}
    made = Path(args.out / kept(args.out / f"episodes-seed{seed}.json", settings, play))
    if not made.is_file():
        raise ConfigError(f"{made} is gone, but not {made.with_suffix('.json')}, which says how it was made; delete that too")
    return made


def played(job: Path, name: str, options: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Figures of --episodes sampled episodes, kept in OUT. Raises ``ConfigError`` where others lie there."""
    config = load_config(job, [*options, *args.set, f"trainer.eval_samples={args.episodes}", "trainer.eval_tasks=1"])
    settings = {"job": job.stem, "options": options, "episodes": args.episodes, "set": args.set}
    found: dict[str, float] = kept(args.out / f"played-{name}.json", settings, lambda: evaluate(config))
    print(f"{name}: success {found['eval/success']:.3f}, return {found['eval/discounted_return']:.3f}", flush=True)
    return found


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """SIDE/METRIC: a number a seed; ``told_B``: told the B-th best return."""
    job, figures = JOBS / f"{args.job}.yaml", dict[str, list[float]]()

    def note(side: str, found: dict[str, float]) -> None:
        for metric in ("success", "discounted_return"):
            figures.setdefault(f"{side}/{metric}", []).append(found[f"eval/{metric}"])

    note("untrained", played(job, "untrained", [], args))
    for seed in range(1, args.seeds + 1):
        data = f"supervised.data=[{collected(job, seed, args)}]"
        for side in ("conditioned", "filtered", "cloned"):
            taught = JOBS / f"{args.job}_{'conditioned' if side == 'conditioned' else 'filtered'}.yaml"
            everything = ["supervised.keep_top=1"] if side == "cloned" else []
            options = [f"name={side}-seed{seed}", f"seed={seed}", f"out={args.out}", "tracking.wandb=off", data, *everything, *args.set]
            run = trained(taught, options)
            model, condition = f"model.path={run / 'model'}", load_config(taught).supervised.condition
            if condition is None:
                note(side, played(job, run.name, [model], args))
                continue
            returns = []
            for bucket in range(len(condition.above) + 1):
                control = json.dumps(control_text(bucket, condition))
                found = played(job, f"{run.name}-told-{bucket}", [model, f"task.control={control}"], args)
                returns.append(found["eval/discounted_return"])
                note(f"conditioned_told_{bucket}", found)
            figures.setdefault("conditioned/spearman_of_told_and_earned", []).append(float(spearmanr(range(len(returns)), returns)[0]))
    return figures


def main() -> None:
    """Collect, train, play, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="tomato_salad", help="of jobs/agents, with JOB_conditioned.yaml and JOB_filtered.yaml beside it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=32, help="that are played for the records, each --samples times")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--gamma", type=float, default=0.99, help="discount of the recorded returns")
    parser.add_argument("--episodes", type=int, default=100, help="sampled episodes each is judged by")
    parser.add_argument("--out", type=Path, default=Path("runs/return_conditioned"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every job, for example model.dtype=float32")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        figures: dict[str, Any] = {name: found if len(found) > 1 else found[0] for name, found in measure(args).items()}
    except ReasonerError as error:
        sys.exit(f"error: {error}")
    record("return_conditioned", settings={**vars(args), "out": str(args.out)}, figures=figures)


if __name__ == "__main__":
    main()
