"""PPO with process rewards against PPO with the outcome alone, from nothing: every stage is a command of the system.

On proofs over an invented ontology, whose answer is true or false, so that half of all wrong proofs end with the right
answer: fine-tune a small model on gold proofs (kind sft), label its own proofs with Math-Shepherd completions (`reasoner
label`) or by the exact check of each line (``--labels exact``), train a process reward model on the labels (kind prm), measure it on
held-out questions, then train the fine-tuned policy with POAD for equally many steps with the outcome alone and with both, over several
seeds that take turns.
What is finished is taken as it is, and what was broken off goes on; `benchmarks.search_methods --job jobs/search/deduction.yaml`
searches with them (``model.path=FOLDER/sft/model search.scorer.args.model=FOLDER/prm/model task.args.hops=[1,2]``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from benchmarks._record import record
from benchmarks._runs import kept, trained
from reasoner_ray.config import load_config
from reasoner_ray.data.deduction import DeductionTask
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.models import fingerprint, resolve_model
from reasoner_ray.search.results import read_results
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl
from reasoner_ray.trainer.tracking import MINUTES

ROOT = Path(__file__).parent.parent
TRANSFORMS = ("minimum", "difference", "shaping", "raw")
NO_SCORER = "search.scorer={name: likelihood}"
WINDOW = 5
"""Steps at a run's beginning and at its end whose samples are told as one figure each."""
FIXED = ("name", "out", "kind", "seed", "model.path", "scoring.process", "trainer.eval_tasks")
"""What ``--rl`` may not set: it tells the runs apart, or is what they are compared by."""


def reasoner(command: str, job: Path, overrides: list[str]) -> tuple[str, float]:
    """What a command printed, and its minutes. Raises ``SystemExit`` where it fails."""
    began = time.perf_counter()
    options = ["--overwrite"] if command != "eval" else []
    done = subprocess.run(
        [sys.executable, "-m", "reasoner_ray.cli", command, str(job), *overrides, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"reasoner {command} {job.name} failed with exit code {done.returncode}")
    return done.stdout, (time.perf_counter() - began) / 60


def curve(run: Path, metric: str) -> dict[int, float]:
    """A metric of a run by step."""
    return {r["step"]: r[metric] for r in read_jsonl(run / METRICS_FILE) if r.get(metric) is not None}


def write_job(folder: Path, arguments: argparse.Namespace) -> Path:
    """The job that all stages share."""
    job = folder / "job.yaml"
    job.write_text(
        f"""
out: {folder}
model: {{path: "builtin:smollm2-135m", dtype: {arguments.dtype}}}
task: {{name: deduction, args: {{hops: [1, {arguments.hops}], style: text, instruction: ""}}}}
rollout: {{max_new_tokens: 128, max_context: 640, kv_cache_gb: 1}}
learner: {{lr: 2.0e-5, tokens_per_microbatch: 2048}}
tracking: {{wandb: "off", terminal: plain}}
"""
    )
    return job


class Checkable(Protocol):
    """A task that knows of each step whether it holds."""

    def train(self) -> Sequence[Item]: ...

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]: ...


def exact_labels(results: Path, task: Checkable) -> list[dict[str, Any]]:
    """The solutions of a search (``save_tokens``), one line a step, with the task's own word on each of their lines."""
    items, records = {item.id: item for item in task.train()}, []
    for search in read_results(results):
        for solution in search["solutions"]:
            right = task.check_steps(items[search["id"]], solution["text"].rstrip("\n").split("\n"))
            if len(right) == len(solution["path"]["ends"]):
                records.append({"question": search["id"], **solution["path"], "labels": [int(label) for label in right]})
    return records


def sample(job: Path, name: str, policy: str, questions: int, samples: int) -> tuple[Path, float]:
    """Plain samples of so many training questions, with their tokens: the file of results, and the minutes."""
    plain = ["search.method=self_consistency", f"search.settings={{paths: {samples}}}", NO_SCORER]
    hands = ["search.save_tokens=true", "search.split=train", f"search.items={questions}"]
    _, minutes = reasoner("search", job, [f"name={name}", policy, *plain, *hands])
    return job.parent / name / "search" / "results.jsonl", minutes


def label(job: Path, folder: Path, policy: str, arguments: argparse.Namespace) -> tuple[str, float]:
    """The file of labelled steps of the policy's own solutions, and the minutes."""
    if arguments.labels == "math_shepherd":
        settings = [f"labels.items={arguments.questions}", "labels.method=math_shepherd", "labels.completions=4", "labels.solutions=4"]
        _, minutes = reasoner("label", job, ["name=labels", policy, *settings])
        return str(folder / "labels" / "labels" / "labels.jsonl"), minutes
    results, minutes = sample(job, "samples", policy, arguments.questions, 4)
    records, file = exact_labels(results, DeductionTask(hops=(1, arguments.hops))), folder / "labels.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file), minutes


def train_reward_model(job: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fine-tuned policy, the labels and the process reward model, with what each cost and how good it is."""
    lengths = "supervised.max_tokens=640"
    shared = ["supervised.batch=32", lengths, f"learner.lr={arguments.lr}", "trainer.eval_every=0"]
    gold = ["kind=sft", "supervised.data=[task]", f"supervised.max_steps={arguments.sft_steps}", "supervised.held_out_fraction=0.01"]
    sft = trained(job, ["name=sft", *gold, *shared])
    policy = f"model.path={sft / 'model'}"
    made_of = {"policy": fingerprint(resolve_model(str(sft / "model"))), "labels": arguments.labels, "questions": arguments.questions}
    labels, labelled = kept(folder / "labels.json", made_of, partial(label, job, folder, policy, arguments))
    heads = ["kind=prm", f"supervised.data=[{labels}]", "supervised.held_out_fraction=0.15", "supervised.epochs=2"]
    prm = trained(job, ["name=prm", policy, *heads, "learner.critic_lr=1e-3", *shared])
    curves = {name: curve(prm, f"eval/{name}") for name in ("auc", "accuracy", "majority", "loss", "steps")}
    last = {f"held-out {name}": values[max(values)] for name, values in curves.items() if values}
    of_sft, of_prm = (read_jsonl(run / METRICS_FILE)[-1][MINUTES] for run in (sft, prm))
    return {"minutes of sft": of_sft, "minutes of labelling": labelled, "minutes of the reward model": of_prm, **last}


def compare(
    job: Path,
    scorer: str,
    models: tuple[Path, Path],
    options: Sequence[str],
    arguments: argparse.Namespace,
    exact: str | None = None,
) -> dict[str, list[float]]:
    """What ``looked_at`` says of each run, and its minutes: lists over the seeds. The sides take turns.

    ``scorer`` judges the outcome. ``models`` are the policy and the process reward model, ``options`` of the job what all runs share;
    ``arguments`` has ``seeds`` and what ``add_rewards`` adds. ``exact`` (module:function) adds a side whose process rewards
    are that function's, with the first transform. A run whose job or models changed is refused. Raises ``ConfigError``.
    """
    policy, judge = models
    sides: dict[str, list[str]] = {"outcome": []}
    shared = f'separator: "\\n", normalise: {arguments.normalise}, weight: {arguments.weight}'
    for transform in arguments.transforms:
        sides[transform] = [f"scoring.process={{args: {{model: {judge}, dtype: {arguments.dtype}}}, transform: {transform}, {shared}}}"]
    if exact is not None:
        scores = f'scorer: function, args: {{path: "{exact}"}}, transform: {arguments.transforms[0]}'
        sides["exact"] = [f"scoring.process={{{scores}, {shared}}}"]
    if taken := [override for override in arguments.rl if override.removeprefix("+").startswith(FIXED)]:
        raise ConfigError(f"--rl {taken[0]}: the comparison sets this itself")
    figures: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        for side, extra in sides.items() if seed % 2 else reversed(sides.items()):
            name, overrides = f"ppo-{side}-{seed}", [f"seed={seed}", f"model.path={policy}", *options, *arguments.rl, *extra]
            made_of = load_config(job, overrides).model_dump(mode="json", exclude={"name", "out", "tracking"})
            used = models if side in arguments.transforms else models[:1]
            made_of |= {"models": [fingerprint(resolve_model(str(model))) for model in used]}
            trained_in = kept(job.parent / f"{name}.json", made_of, partial(ppo, job, name, overrides))["minutes"]
            for key, value in {"minutes": trained_in, **looked_at(job.parent / name, scorer)}.items():
                figures.setdefault(f"{side}: {key}", []).append(value)
    return figures


def ppo(job: Path, name: str, overrides: Sequence[str]) -> dict[str, float]:
    """Train; the minutes it took."""
    _, minutes = reasoner("train", job, [f"name={name}", *overrides])
    return {"minutes": minutes}


def looked_at(run: Path, scorer: str) -> dict[str, float]:
    """How often a run's samples of held-out questions were right before and after, and, in its first and last steps, how often those of
    training questions were, in percent, what the process model gave them, and what that had to do with the truth."""
    accuracy = curve(run, f"eval/{scorer}")
    figures = {"held-out samples, before": 100 * accuracy[0], "held-out samples, after": 100 * accuracy[max(accuracy)]}
    curves = {"training samples": [100 * value for value in curve(run, f"reward/{scorer}").values()]}
    curves |= {f"process {name}": list(curve(run, f"process/{name}").values()) for name in ("score", "correlation", "gap", "steps")}
    for name, values in curves.items():
        if window := min(WINDOW, len(values) // 2):
            figures[f"{name}, first steps"], figures[f"{name}, last steps"] = fmean(values[:window]), fmean(values[-window:])
    return figures


def add_rewards(parser: argparse.ArgumentParser, transform: str) -> None:
    """What ``compare`` asks of its arguments."""
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="of all models")
    parser.add_argument("--weight", type=float, default=0.5, help="of the process rewards beside the outcome")
    parser.add_argument("--transforms", nargs="+", default=[transform], choices=TRANSFORMS, help="of the scores, one side of PPO each")
    parser.add_argument(
        "--normalise", default="none", choices=["none", "group"], help="group: step rewards of a prompt's samples get mean 0, deviation 1"
    )
    parser.add_argument("--rl", nargs="+", default=[], metavar="KEY=VALUE", help="of the job of every PPO run, over what is set here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--sft-steps", type=int, default=60, help="few enough that the policy still errs")
    parser.add_argument("--lr", type=float, default=2e-5, help="of fine-tuning and of the reward model; PPO has its own")
    parser.add_argument("--labels", default="math_shepherd", choices=["math_shepherd", "exact"])
    parser.add_argument("--questions", type=int, default=200, help="questions whose solutions are labelled")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of PPO; none: the policy and the reward model alone")
    parser.add_argument("--evaluated", type=int, default=128, help="held-out questions before and after PPO, two samples of each")
    add_rewards(parser, "minimum")
    parser.add_argument("--folder", type=Path, default=Path("runs/process_rewards"))
    parser.add_argument("--name", default="process_rewards", help="of the record")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    job = write_job(folder, arguments)
    made_of = {key: getattr(arguments, key) for key in ("hops", "sft_steps", "lr", "labels", "questions", "dtype")}
    reward_model = kept(folder / "reward_model.json", made_of, lambda: train_reward_model(job, folder, arguments))
    loop = [f"trainer.steps={arguments.steps}", "trainer.tasks_per_step=16", "trainer.samples_per_task=4"]
    looks = [f"trainer.eval_tasks={arguments.evaluated}", "trainer.eval_samples=2", "trainer.eval_every=0"]
    models, rates = (folder / "sft" / "model", folder / "prm" / "model"), ["learner.lr=3e-5", "learner.critic_lr=1e-3"]
    figures = compare(job, "deduction", models, [*loop, *looks, *rates, "trainer.checkpoint_every=0"], arguments)
    record(arguments.name, {k: str(v) for k, v in vars(arguments).items() if k != "name"}, reward_model | figures)


if __name__ == "__main__":
    main()
