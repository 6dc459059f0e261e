"""Does credit for tokens learn faster than credit for actions? POAD, turn-level credit, NTPO, action-level PPO and ETPO side by side.

Every run is `reasoner train JOB algorithm.name=... seed=N` in a process of its own, one after the other, in the order of
the seeds, so that a benchmark cut short has complete comparisons. Equal for all: environment, model, prompts, episodes a
step, learning rate, number of steps; each algorithm has the settings of SETTINGS. Success and return are those of the
sampled training episodes (running mean over the last three steps), against environment steps and minutes; on the training wording
and on unseen ones the greedy policy is evaluated, and at the end --episodes sampled episodes of each (the papers' figures). A run
that is there already, finished, is not run again; with a larger `trainer.steps` it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, record
from benchmarks._runs import trained
from reasoner_ray.config import load_config
from reasoner_ray.errors import ReasonerError
from reasoner_ray.models import resolve_model
from reasoner_ray.plot import plot_runs, running_mean
from reasoner_ray.trainer.launch import evaluate
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, list[str]] = {
    "poad": ["algorithm.name=poad", "algorithm.settings.lambda_token=0.95"],
    "turn_level": ["algorithm.name=poad", "algorithm.settings.lambda_token=1"],
    "ntpo": ["algorithm.name=ntpo", "algorithm.settings.gamma_token={gamma}"],
    "ppo_action": ["algorithm.name=ppo_action"],
    "etpo": [
        "algorithm={{name: etpo, settings: {{gamma_action: {gamma}, beta: 0.05}}}}",
        "algorithm.settings.lambda_token=1",
        "algorithm.settings.lambda_action=0.95",
        "algorithm.settings.target_decay=0.8",
        "learner.critic=soft_q_frozen",
        "learner.critic_lr=1e-4",
        "learner.lr=5e-6",
        "learner.adam_eps=1e-6",
        "learner.max_grad_norm=1000",
    ],
}
"""What differs; gamma is the job's gamma_action. ETPO's policy climbs its critic, whose errors mislead it where an advantage's would only
be noise: hence a critic that is linear in the initial model's hidden states, and a policy that moves a quarter
as far at each; and an epsilon and a clipping norm that leave gradients their size, as Adam makes whole steps of rounding errors too.
"""
WINDOW = 3


def run(job: Path, algorithm: str, seed: int, out: Path, extra: list[str]) -> Path:
    """One run, unless it is there, or the rest of one with fewer steps; returns its folder. Raises as ``trained`` does."""
    base = load_config(job, extra)
    known = {"gamma": base.algorithm.settings.get("gamma_action", 0.99)}
    own = [f"name={base.name}-{algorithm}-s{seed}", f"seed={seed}", f"out={out}", "tracking.wandb=off"]
    overrides = [*extra, *(text.format(**known) for text in SETTINGS[algorithm]), *own]
    return trained(job, overrides)


def sampled(folder: Path, episodes: int) -> dict[str, float]:
    """Metrics of ``episodes`` sampled episodes a wording with a run's final weights; kept in its folder."""
    config = load_config(folder / "config.yaml", [f"trainer.eval_samples={episodes}", f"model.path={folder / 'model'}"])
    file = folder / f"sampled-{episodes}-step-{config.trainer.steps}.json"
    if not file.is_file():
        file.write_text(json.dumps(evaluate(config)))
    found: dict[str, float] = json.loads(file.read_text())
    return found


def summarise(folder: Path, episodes: int) -> dict[str, Any]:
    """A run's curves and last evaluations."""
    records = read_jsonl(folder / METRICS_FILE)
    steps = [r for r in records if "episode/success" in r]
    evals = [r for r in records if r.get("eval/accuracy") is not None]
    success = running_mean(_column(steps, "episode/success"), WINDOW)
    reached = [r["episode/actions_in_all"] for r, s in zip(steps, success, strict=True) if s >= 0.5]
    return {
        "final_success_sampled": float(success[-1]),
        "final_return_sampled": float(running_mean(_column(steps, "episode/discounted_return"), WINDOW)[-1]),
        "actions_to_half_success": reached[0] if reached else None,
        "minutes": steps[-1]["time/minutes"],
        "best_eval_return_greedy": max(r[_training(r, "discounted_return")] for r in evals),
        "final_eval_return_greedy": evals[-1][_training(evals[-1], "discounted_return")],
        "eval": {key.removeprefix("eval/"): value for key, value in evals[-1].items() if key.startswith("eval/") and value is not None},
        "sampled": {key.removeprefix("eval/"): value for key, value in sampled(folder, episodes).items()} if episodes else {},
        "curve": {
            key: [r[key] for r in steps]
            for key in ("episode/actions_in_all", "time/minutes", "episode/success", "episode/discounted_return", "learner/entropy")
            if all(key in r for r in steps)
        },
    }


def _column(records: list[dict[str, Any]], key: str) -> Any:
    import numpy as np

    return np.array([r[key] for r in records], dtype=float)


def _training(record_: dict[str, Any], name: str) -> str:
    """The metric on the training wording, where several are evaluated."""
    labelled = f"eval/training/{name}"
    return labelled if labelled in record_ else f"eval/{name}"


def figures_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Lists with one value a seed; a seed that never got half its episodes right is left out of that figure and counted."""
    figures: dict[str, Any] = {}
    for algorithm, runs in results.items():
        for key in ("final_success_sampled", "final_return_sampled", "best_eval_return_greedy", "final_eval_return_greedy", "minutes"):
            figures[f"{algorithm}_{key}"] = [r[key] for r in runs]
        reached = [r["actions_to_half_success"] for r in runs if r["actions_to_half_success"] is not None]
        figures[f"{algorithm}_seeds_that_reached_half_success"] = len(reached)
        if reached:
            figures[f"{algorithm}_actions_to_half_success"] = reached
        labels = sorted({key for r in runs for key in r["eval"] if key.endswith("/discounted_return")})
        for key in labels:
            figures[f"{algorithm}_eval_{key}"] = [r["eval"][key] for r in runs]
        for key in sorted(key for key in runs[0]["sampled"] if key.endswith(("discounted_return", "success"))):
            figures[f"{algorithm}_sampled_eval_{key}"] = [r["sampled"][key] for r in runs]
        figures[f"{algorithm}_curves"] = [r["curve"] for r in runs]
    return figures


def main() -> None:
    """Run, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "agents" / "food_preparation.yaml")
    parser.add_argument("--algorithms", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--episodes", type=int, default=20, help="sampled episodes a wording at the end; 0: none")
    parser.add_argument("--out", type=Path, default=Path("runs/token_credit"), help="folder that holds the runs' folders")
    parser.add_argument("--overrides", nargs="*", default=[], help="for all runs, for example trainer.steps=20")
    args = parser.parse_args()
    args.out, args.job = args.out.resolve(), args.job.resolve()
    try:
        config = load_config(args.job, args.overrides)
        resolve_model(config.model.path)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.algorithms}
        folders = []
        for seed in range(args.seeds):
            for algorithm in args.algorithms:
                folders.append(run(args.job, algorithm, seed, args.out, args.overrides))
                results[algorithm].append(summarise(folders[-1], args.episodes))
        name = f"token_credit_{args.job.stem}"
        settings = {
            "seeds": args.seeds,
            "sampled_episodes_a_wording": args.episodes,
            "overrides": args.overrides,
            "differs": SETTINGS,
            "job": config.model_dump(mode="json"),
        }
        record(name, settings=settings, figures=figures_of(results))
        metrics = ["episode/success", "episode/discounted_return"]
        for x in ("actions", "minutes"):
            picture = RESULTS / f"{name}_{x}.png"
            plot_runs(folders, picture, metrics, smooth=WINDOW, x=x, title=f"{config.name}: {args.seeds} seeds")
            print(f"drawn to {picture}")
        means = {a: statistics.fmean(r["final_success_sampled"] for r in runs) for a, runs in results.items()}
        print(", ".join(f"{a} {m:.0%}" for a, m in means.items()), "success at the end")
    except ReasonerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
