"""Seconds a GRPO step, the whole system against TRL's GRPOTrainer on the same machine.

Each side runs in a process of its own and both take turns. Equal on both sides: model, dtype, prompts and their order,
prompts a step, group size, temperature 1, reward function, optimiser (AdamW, learning rate, betas, clipping), one update
a step on all its samples, no KL, and the length of every answer: the model is given an end-of-text token that it never
samples and no stop string, so each answer has exactly ``--answer`` tokens. The samples are each side's own draws. A step
lasts from the end of one update (with us: of the weight sync after it) to the end of the next; start-up and the first
step of each process are not counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._record import ratios, record
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import EnvironmentProblem, ReasonerError

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "quickstart_grpo.yaml"
TRL = "1.16"
INSTALL = f"python -m pip install --no-deps 'trl=={TRL}.*'"
UNSAMPLED = "<repo_name>"
"""A token of SmolLM2's vocabulary for repositories of code; its probability after arithmetic is nil."""
TRL_SETTINGS = {
    # The objective of our grpo: no KL, advantages over the group's standard deviation, mean over tokens, the same clipping.
    "beta": 0.0,
    "scale_rewards": "group",
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "num_iterations": 1,
    # Hugging Face generation with its KV cache; vLLM within TRL needs a GPU.
    "use_vllm": False,
    "temperature": 1.0,
    # Faster where memory suffices, as it does here.
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def check_trl() -> str:
    """The installed version. Raises ``EnvironmentProblem`` where TRL is missing or another one."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(f"this benchmark compares with TRL, which is not installed: run `{INSTALL}`") from error
    if not found.startswith(f"{TRL}."):
        raise EnvironmentProblem(f"this benchmark is written for TRL {TRL}, found {found}: run `{INSTALL}`")
    return found


def make_job(args: argparse.Namespace, folder: Path) -> JobConfig:
    """The quick start's grpo job on the prompts and the model in ``folder``."""
    overrides = {
        "name": "ours",
        "out": folder,
        "model.path": folder / "model",
        "task": {"name": "jsonl", "args": {"path": str(folder / "prompts.jsonl"), "held_out_fraction": 0.0}},
        "scoring.scorers": [{"name": "numeric", "args": {"which": "first"}}],
        "rollout.max_new_tokens": args.answer,
        "trainer.steps": args.steps,
        "trainer.tasks_per_step": args.prompts,
        "trainer.samples_per_task": args.samples,
        "trainer.eval_tasks": 0,
        "trainer.eval_every": 0,
        "tracking.wandb": "off",
        "tracking.terminal": "plain",
    }
    return load_config(JOB, [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()])


def write_inputs(args: argparse.Namespace, folder: Path) -> None:
    """What both sides read: the arithmetic task's prompts, and the model with an end-of-text token that never comes."""
    from reasoner_ray.data.tasks import get_task
    from reasoner_ray.models import load_tokenizer, resolve_model

    base = load_config(JOB)
    items = get_task(base.task, base.seed).train()[: args.prompts * args.steps]
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) + "\n" for item in items]
    (folder / "prompts.jsonl").write_text("".join(lines))

    source, model = resolve_model(base.model.path), folder / "model"
    model.mkdir()
    for weights in source.glob("*.safetensors"):
        (model / weights.name).symlink_to(weights)
    tokenizer = load_tokenizer(source)
    tokenizer.eos_token = UNSAMPLED
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((source / name).read_text())
        (model / name).write_text(json.dumps({**values, "eos_token_id": tokenizer.eos_token_id}))


def run_ours(config: JobConfig) -> dict[str, Any]:
    """The real system, from its own record of the run."""
    from reasoner_ray.trainer.launch import train
    from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

    train(config, "overwrite")
    steps = [r for r in read_jsonl(config.run_dir / METRICS_FILE) if r["step"] > 0]
    ends = [r["time"] for r in steps]
    parts = ("time/step_s", "time/collect_s", "time/learn_s", "time/sync_s", "learner/tokens_packed", "mismatch/max_abs")
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "tokens_trained": [r["learner/tokens_trained"] for r in steps[1:]],
        "rewards": [r["reward/mean"] for r in steps[1:]],
        "parts": {key: statistics.median(r[key] for r in steps[1:]) for key in parts},
        "groups_failed": steps[-1]["faults/groups_failed"],  # each was generated again, so its step took longer
    }


def run_trl(config: JobConfig, micro_batch: int) -> dict[str, Any]:
    """TRL as its user would run it, on the same prompts in the same order."""
    check_trl()
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reasoner_ray.data.tasks import DataOrder, get_task
    from reasoner_ray.models import resolve_dtype
    from reasoner_ray.scoring.exact_match import numbers_in

    trainer, learner = config.trainer, config.learner
    items = DataOrder(get_task(config.task).train(), config.seed)
    rows = [{"prompt": items[i].prompt, "answer": items[i].answer} for i in range(trainer.steps * trainer.tasks_per_step)]
    ends: list[float] = []
    tokens: list[int] = []
    rewards: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        first = [numbers_in(text)[:1] for text in completions]
        scores = [float(found == numbers_in(gold)) for found, gold in zip(first, answer, strict=True)]
        tokens.append(sum(map(len, completion_ids)))
        rewards.append(statistics.fmean(scores))
        return scores

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    batch = trainer.tasks_per_step * trainer.samples_per_task
    settings = GRPOConfig(
        **TRL_SETTINGS,
        output_dir=str(config.out / "trl"),
        use_cpu=not torch.cuda.is_available(),
        bf16=resolve_dtype(config.model.dtype) is torch.bfloat16,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        num_generations=trainer.samples_per_task,
        max_completion_length=config.rollout.max_new_tokens,
        max_steps=trainer.steps,
        learning_rate=learner.lr,
        weight_decay=learner.weight_decay,
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        max_grad_norm=learner.max_grad_norm,
        seed=config.seed,
    )
    model = str(config.model.path)
    GRPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]).train()
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "tokens_trained": [float(n) for n in tokens[1:]],
        "rewards": rewards[1:],
    }


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own, with the arguments of this one."""
    out = folder / f"{side}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.trl_step", *sys.argv[1:], "--side", side, "--folder", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    print(f"{side}: {', '.join(f'{s:.1f}' for s in result['seconds'])} s a step", flush=True)
    return result


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Run the pairs, check that they did the same amount of work, record."""
    version = check_trl()
    write_inputs(args, folder)
    pairs = [{side: run_side(side, folder) for side in ("trl", "ours")} for _ in range(args.pairs)]
    expected = args.prompts * args.samples * args.answer
    for pair in pairs:
        for side, result in pair.items():
            if any(n != expected for n in result["tokens_trained"]):
                raise SystemExit(f"{side} trained {result['tokens_trained']} tokens a step, not {expected}: the sides are not comparable")
    seconds = {side: [s for pair in pairs for s in pair[side]["seconds"]] for side in ("trl", "ours")}
    medians = {side: [statistics.median(pair[side]["seconds"]) for pair in pairs] for side in seconds}
    config = make_job(args, folder)
    shown = {"rollout": config.rollout, "learner": config.learner, "algorithm": config.algorithm}
    record(
        "trl_step",
        settings={
            "equal": (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip(),
            "prompts_per_step": args.prompts,
            "group_size": args.samples,
            "answer_tokens": args.answer,
            "steps_per_process": args.steps,
            "model": load_config(JOB).model.path,
            "trl": {"version": version, **TRL_SETTINGS, "per_device_train_batch_size": args.trl_micro_batch},
            "ours": {name: section.model_dump(mode="json") for name, section in shown.items()},
        },
        figures={
            "ratio_of_medians": statistics.median(seconds["trl"]) / statistics.median(seconds["ours"]),
            "ratio_per_pair": ratios(medians["trl"], medians["ours"]),
            "trl_seconds_per_step": seconds["trl"],
            "ours_seconds_per_step": seconds["ours"],
            "tokens_trained_per_step_each": expected,
            "trl_mean_reward": statistics.fmean(r for pair in pairs for r in pair["trl"]["rewards"]),
            "ours_mean_reward": statistics.fmean(r for pair in pairs for r in pair["ours"]["rewards"]),
            "ours_groups_failed": [pair["ours"]["groups_failed"] for pair in pairs],
            **{f"ours_{key}": [pair["ours"]["parts"][key] for pair in pairs] for key in pairs[0]["ours"]["parts"]},
        },
    )


def main() -> None:
    """Measure and record; with ``--side``, be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of each process, the first of them not counted")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--answer", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="samples of one forward and backward pass of TRL")
    parser.add_argument("--side", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    if (args.prompts * args.samples) % args.trl_micro_batch:
        parser.error("--trl-micro-batch must divide prompts x samples")
    try:
        if args.side is None:
            with tempfile.TemporaryDirectory() as folder:
                compare(args, Path(folder))
            return
        config = make_job(args, args.folder)
        result = run_ours(config) if args.side == "ours" else run_trl(config, args.trl_micro_batch)
        (args.folder / f"{args.side}.json").write_text(json.dumps(result))
    except ReasonerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
