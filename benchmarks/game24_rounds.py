"""Game24 with a small model made here: every search method at equal tokens, and search in training (TS-LLM, arXiv 2309.17179).

A Llama of a few million weights with a tokenizer of the game's own learns to compute from games with other targets than 24, then
solutions of a part of the training hands (kind sft, twice).
Then, each by a command of the system: over several seeds, rounds of search in training (kind rounds; before the first one a value model
learns from plain samples), and what as many training steps on the gold solutions alone come to; a process reward model of the fine-tuned
policy's own steps, labelled by the exact check; and over several seeds every search method at equal generated tokens on the held-out hands
with these two (``benchmarks.search_methods``), PPO with that model's process rewards against PPO with the outcome alone, and PPO in parts
between which the model learns from the policy's new steps.

The rounds search by best-of-N: while the policy hardly ever makes 24, the value model has seen few right solutions, and a tree search that
prunes by it finds fewer than plain samples do. The value chooses a search's answer; every right path of it is learnt.

    python -m benchmarks.game24_rounds                  # hours on two cores, not timed yet
    python -m benchmarks.game24_rounds --tiny           # minutes: whether everything runs; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, record
from benchmarks._runs import kept
from benchmarks.process_rewards import NO_SCORER, ROOT, WINDOW, add_rewards, compare, curve, exact_labels, looked_at, reasoner, sample
from benchmarks.search_methods import SWEEPS
from reasoner_ray.data.countdown import CountdownTask
from reasoner_ray.data.game24 import Game24Task
from reasoner_ray.data.number_games import Term, apply, check_lines, is_reachable, join_terms, operations, write_step
from reasoner_ray.data.tasks import Item
from reasoner_ray.models import fingerprint, resolve_model
from reasoner_ray.plot import plot_runs
from reasoner_ray.search.results import read_results
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

VOCABULARY = 512
STAGES = ("plays", "sft", "rounds", "control", "judge", "methods", "rewards", "refreshed")
FIGURES = {
    "eval/accuracy": "the bare policy, greedy, %",
    "eval/tokens": "the bare policy, tokens a hand",
    "searched/accuracy": "with search, %",
    "searched/tokens": "with search, generated tokens a hand",
    "searched/scorer_tokens": "with search, scorer tokens a hand",
    "searched/seconds": "with search, seconds a hand",
    "search/any_right": "training hands solved by some path, %",
    "policy/paths": "paths learnt",
    "value/auc": "AUC of the value model",
}


def make_model(folder: Path, items: Sequence[Item], *, width: int, layers: int, seed: int) -> Path:
    """A Llama with random weights, and a byte-level BPE tokenizer in which a number of the game is one token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((f"{item.prompt}{item.info['solution']}" for item in items), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,  # of 32 dimensions, the least that the CPU attention of vLLM computes
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_solutions(file: Path, items: Sequence[Item]) -> int:
    """Records of the items' own solutions; how many there are."""
    file.write_text("".join(json.dumps({"prompt": item.prompt, "answer": item.info["solution"]}) + "\n" for item in items))
    return len(items)


def write_gold(file: Path, items: Sequence[Item], share: float) -> int:
    """Records of the solutions of a share of the hands, chosen at random once and for all; how many there are."""
    hands = sorted({str(item.info["numbers"]) for item in items})
    taught = set(random.Random(0).sample(hands, max(1, round(share * len(hands)))))
    chosen = [item for item in items if str(item.info["numbers"]) in taught]
    return write_solutions(file, chosen)


def write_plays(file: Path, number: int) -> int:
    """Records of so many games of four cards with another target, made by playing at random; how many there are."""
    games = CountdownTask(numbers=4, highest=13, highest_target=99, train_size=number, style="text", instruction="").train()
    chosen = [item for item in games if item.answer != 24]  # else they would show solutions of held-out hands
    return write_solutions(file, chosen)


def fine_tune(job: Path, name: str, start: Path, data: Path, epochs: int, lr: float) -> dict[str, float]:
    """A model that learns the solutions of ``data``: RUN/NAME."""
    options = ["kind=sft", f"name={name}", f"model.path={start}", f"supervised.data=[{data}]", f"supervised.epochs={epochs}"]
    _, minutes = reasoner("train", job, [*options, f"learner.lr={lr}", "learner.lr_schedule=cosine"])
    rows = read_jsonl(job.parent / name / METRICS_FILE)
    speeds = [row["learner/tokens_per_s"] for row in rows if "learner/tokens_per_s" in row]
    figures = {f"{name}: minutes": minutes, f"{name}: tokens a second": sum(speeds) / len(speeds)}
    return figures | {f"{name}: held-out loss": row["eval/loss"] for row in rows if "eval/loss" in row}  # the last; few hold none out


def write_job(folder: Path, gold: Path, arguments: argparse.Namespace) -> Path:
    """The job that all stages share."""
    job, most = folder / "job.yaml", arguments.value_steps or "null"
    job.write_text(
        f"""
out: {folder}
model: {{path: {folder / "start"}, dtype: {arguments.dtype}}}
task: {{name: game24}}
rollout: {{max_new_tokens: 112, max_context: 160, kv_cache_gb: 1, max_groups_per_worker: 128}}
learner: {{lr: 1.0e-3, critic_lr: 1.0e-3, warmup_steps: 20, tokens_per_microbatch: 8192}}
supervised: {{batch: 64, max_tokens: 160, held_out_fraction: 0.02}}
trainer: {{eval_every: 100, checkpoint_every: 0}}
tracking: {{wandb: "off", terminal: plain}}
search:
  method: best_of_n
  settings: {{paths: {arguments.paths}}}
  step_tokens: 40
  depth: 5
  scorer: {{name: prm, args: {{kept_tokens: 65536}}}}
  items: {arguments.held_out}
rounds:
  n: {arguments.rounds}
  questions: {arguments.questions}
  samples: {arguments.samples}
  phases:
    policy:
      learner: {{lr: 3.0e-4, lr_schedule: cosine, warmup_steps: 5}}
      supervised: {{data: [{gold}], epochs: {arguments.epochs_a_round}}}
    value:
      learner: {{lr: 5.0e-4, lr_schedule: cosine, warmup_steps: 5}}
      supervised: {{epochs: {arguments.value_epochs}, max_steps: {most}}}
"""
    )
    return job


def settings_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What a stage depends on."""
    return {name: getattr(arguments, name) for name in names}


def learn_by_search(job: Path, folder: Path, policy: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The rounds, once a seed; figures by round, and their learning curves as a picture. ``policy`` tells what they begin with."""
    figures: dict[str, list[float]] = {}
    runs = []
    for seed in arguments.seeds:
        name = f"rounds-seed{seed}"
        overrides = ["kind=rounds", f"name={name}", f"seed={seed}", f"model.path={folder / 'sft' / 'model'}"]
        if arguments.tiny:  # nothing it writes is right, and something must be learnt
            overrides += ["rounds.right_from=0", "rounds.phases.policy.supervised.learn_above=null"]
        runs.append(folder / name)
        kept(folder / f"{name}.json", policy, dict)  # rounds that were begun with another policy are refused
        finish(job, overrides, runs[-1])
        records = read_jsonl(runs[-1] / METRICS_FILE)
        minutes = sum(value for row in records for key, value in row.items() if key.startswith("time/") and key.endswith("_minutes"))
        figures.setdefault("minutes of the rounds", []).append(minutes)
        for row in records:
            for key, said in FIGURES.items():
                if key in row:
                    scale = 100 if said.endswith("%") else 1
                    figures.setdefault(f"round {row['step']}: {said}", []).append(scale * row[key])
        samples = [sampled(runs[-1] / f"round-{row['step']:02d}" / "searched", arguments.paths) for row in records]
        for row, found in zip(records, samples, strict=True):
            for key, value in found.items():
                figures.setdefault(f"round {row['step']}: the bare policy, {key}", []).append(value)
        for number, (before, after) in enumerate(pairwise(samples), 1):
            gain = after["sampled, %"] - before["sampled, %"]
            figures.setdefault(f"round {number}: gain of the bare policy, sampled, points", []).append(gain)
    plot_runs(runs, RESULTS / f"{arguments.name}_rounds.png", ["eval/accuracy", "searched/accuracy"])
    return figures


def finish(job: Path, overrides: list[str], run: Path) -> None:
    """Have a run of rounds to its end, one that was begun from where it is. Raises ``SystemExit`` where it fails or is another job's."""
    begun = ["--resume"] if (run / "config.yaml").is_file() else []
    command = [sys.executable, "-m", "reasoner_ray.cli", "train", str(job), *overrides, *begun]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"the rounds in {run} failed; see what they printed above")


def sampled(search: Path, samples: int) -> dict[str, float]:
    """How often plain samples of a policy are right, and how many hands some of them solves, in percent, by a search of so many a hand."""
    hands = [[solution["correct"] for solution in found["solutions"]] for found in read_results(search / "search" / "results.jsonl")]
    drawn = samples * len(hands)  # some were cut and are no solutions
    return {"sampled, %": 100 * sum(map(sum, hands)) / drawn, "some sample right, %": 100 * sum(map(any, hands)) / len(hands)}


def learn_gold(job: Path, folder: Path, gold: Path, policy: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """What the bare policy comes to with as many training steps as all its rounds had, on the gold solutions that it knows already."""

    def train(seed: int, steps: int) -> dict[str, float]:
        learn = [f"supervised.data=[{gold}]", "supervised.epochs=1000", f"supervised.max_steps={steps}"]
        learn += ["learner.lr=3e-4", "learner.lr_schedule=cosine", "learner.warmup_steps=5"]
        name = f"control-seed{seed}"
        reasoner("train", job, ["kind=sft", f"name={name}", f"seed={seed}", f"model.path={folder / 'sft' / 'model'}", *learn])
        model, figures = [f"seed={seed}", f"model.path={folder / name / 'model'}", NO_SCORER], {}
        for method, settings, samples in (("greedy", "{}", 1), ("self_consistency", f"{{paths: {arguments.paths}}}", arguments.paths)):
            reasoner("search", job, [f"name={name}-{method}", *model, f"search.method={method}", f"search.settings={settings}"])
            figures[method] = sampled(folder / f"{name}-{method}", samples)
        return {"greedy, %": figures["greedy"]["sampled, %"], **figures["self_consistency"]}

    made = []
    for seed in arguments.seeds:
        rounds = [folder / f"rounds-seed{seed}" / f"round-{number:02d}" / "policy" for number in range(1, arguments.rounds + 1)]
        steps = sum(read_jsonl(run / METRICS_FILE)[-1]["step"] for run in rounds)
        settings = {**policy, **settings_of(arguments, "paths", "held_out"), "steps": steps}
        made.append(kept(folder / f"control-seed{seed}.json", settings, partial(train, seed, steps)))
    return {f"as many steps on gold alone: the bare policy, {name}": [figures[name] for figures in made] for name in made[0]}


def learn_judge(job: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A model that values steps of the fine-tuned policy on the training hands: whether 24 can still be reached, by the exact check."""
    policy, labels = f"model.path={folder / 'sft' / 'model'}", folder / "labels.jsonl"
    results, sampling = sample(job, "samples", policy, arguments.judged_questions, arguments.judged_samples)
    counts = write_labels(results, labels, arguments.first_steps, arguments.second_steps, arguments.misprints)
    rates = [f"supervised.epochs={arguments.judge_epochs}", "learner.lr=5e-4"]
    _, learning = train_judge(job, "judge", folder / "sft" / "model", [labels], rates)
    last: dict[str, Any] = next((row for row in reversed(read_jsonl(folder / "judge" / METRICS_FILE)) if "eval/loss" in row), {})
    figures: dict[str, Any] = {"minutes of sampling": sampling, "minutes of learning": learning, **counts}
    figures |= {f"held-out {name}": last.get(f"eval/{name}") for name in ("auc", "accuracy", "majority", "steps")}
    return {f"step values: {name}": value for name, value in figures.items()}


def train_judge(job: Path, name: str, start: Path, labels: Sequence[Path], options: Sequence[str]) -> tuple[str, float]:
    """A process reward model that goes on from ``start``, an epoch long: what the command printed, and its minutes."""
    lines = ['supervised.separator="\\n"', "supervised.end_of_text=false", "supervised.held_out_fraction=0.05"]
    learn = [f"supervised.data=[{', '.join(map(str, labels))}]", "supervised.epochs=1", "learner.lr_schedule=cosine", *options]
    return reasoner("train", job, ["kind=prm", f"name={name}", f"model.path={start}", *lines, *learn])


def write_labels(results: Path, labels: Path, first: int = 0, second: int = 0, misprints: int = 0) -> dict[str, float]:
    """Each sampled solution with the task's own word on each of its lines; how many solutions and right lines there are.

    Beside them, of each hand, ``first`` first steps and ``second`` second ones, as many of either as lead to 24 and as do not: of the
    policy's own steps most are wrong in the same few ways. And ``misprints`` of the right ones with one number changed, nearly all of
    them wrong: who trains against a judge finds what was never called wrong.
    """
    task = Game24Task(style="text", instruction="")
    records = exact_labels(results, task)
    items, asked = {item.id: item for item in task.train()}, sorted({search["id"] for search in read_results(results)})
    source = random.Random(0)
    moves = [record for name in asked for record in step_records(items[name], source, first, second, misprints)]
    labels.write_text("".join(json.dumps(record) + "\n" for record in [*records, *moves]))
    steps = [label for record in records for label in record["labels"]]
    return {"solutions": float(len(records)), "right lines": sum(steps) / max(1, len(steps)), "further steps": float(len(moves))}


def step_records(item: Item, source: random.Random, first: int, second: int, misprints: int = 0) -> list[dict[str, Any]]:
    """Beginnings of solutions of a hand, whose last line is right, or wrong and all before it right; each line ends as in a solution.

    Behind them ``misprints`` of the right ones with one number of the last line changed.
    """
    terms, target = tuple(Term(Fraction(n), str(n)) for n in item.info["numbers"]), item.info["target"]
    about = {"question": item.id, "prompt": item.prompt}
    records: list[dict[str, Any]] = []
    for right, number in ((True, first // 2), (False, first // 2)):
        options = [move for move in moves_of(terms, target) if move[2] is right]
        chosen = source.sample(options, min(number, len(options)))
        records += [{**about, "steps": [f"{line}\n"], "labels": [int(right)]} for line, _, _ in chosen]
    begun = [move for move in moves_of(terms, target) if move[2]]
    for i in range(second if begun else 0):  # a few hands need fractions
        line, left, _ = source.choice(begun)
        options = [move for move in moves_of(left, target) if move[2] is (i % 2 == 0)]
        if options:
            records.append({**about, "steps": [line, f"{source.choice(options)[0]}\n"], "labels": [1, int(i % 2 == 0)]})
    good, errors = [each for each in records if each["labels"][-1]], random.Random(f"misprints of {item.id}")  # the others stay as they are
    for made in errors.sample(good, min(misprints, len(good))):
        steps = [*made["steps"][:-1], misprint(made["steps"][-1], errors)]
        labels = check_lines(steps, item.info["numbers"], target)
        records.append({**about, "steps": steps, "labels": [int(label) for label in labels]})
    return records


def misprint(line: str, source: random.Random) -> str:
    """The line with one of its numbers changed."""
    number = source.choice(list(re.finditer(r"\d+", line)))
    other = source.choice([n for n in range(int(number[0]) + 7) if n != int(number[0])])
    return f"{line[: number.start()]}{other}{line[number.end() :]}"


def moves_of(terms: tuple[Term, ...], target: int) -> list[tuple[str, tuple[Term, ...], bool]]:
    """Each operation with a whole result from 0 on: its line, what is then left, and whether the target can still be made."""
    found = []
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for sign, a, b in operations(terms[i], terms[j]):
            value = apply(sign, a.value, b.value)
            if value is not None and value >= 0 and value.denominator == 1:
                left = tuple(sorted([*rest, join_terms(sign, a, b, value)], key=lambda term: term.value))
                values = [term.value for term in left]
                found.append((write_step(a.value, sign, b.value, values), left, is_reachable(values, target)))
    return found


def compare_methods(job: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Every method at equal tokens: a record of its own."""
    overrides = [
        f"model.path={folder / 'sft' / 'model'}",
        f"search.scorer.args.model={folder / 'judge' / 'model'}",
        f"search.items={arguments.held_out}",
    ]
    command = [sys.executable, "-m", "benchmarks.search_methods", "--job", str(job), *overrides, "--seeds", str(len(arguments.seeds))]
    command += ["--methods", *(arguments.methods or SWEEPS), "--sizes", "0", "--tokens", *map(str, arguments.tokens)]
    if subprocess.run([*command, "--name", f"{arguments.name}_methods", "--out", str(folder / "methods")], cwd=ROOT).returncode:
        raise SystemExit("benchmarks.search_methods failed")


def exact_steps(prompt: str, steps: Sequence[str]) -> list[float]:
    """A step scorer that errs never: 1 for each line after which 24 can still be made, else 0."""
    *numbers, target = map(int, re.findall(r"\d+", prompt))
    return [float(right) for right in check_lines(steps, numbers, target)]


def rl_options(arguments: argparse.Namespace, steps: int) -> list[str]:
    """What all PPO runs share."""
    sizes = [f"trainer.steps={steps}", "trainer.tasks_per_step=32", "trainer.samples_per_task=8"]
    looks = ["trainer.eval_every=0", f"trainer.eval_tasks={arguments.held_out}", "trainer.eval_samples=4"]  # one greedy answer says little
    return [*sizes, *looks, "learner.lr=1e-4", "learner.critic_lr=1e-3", "learner.warmup_steps=2", NO_SCORER]


def compare_rewards(job: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """PPO on training hands from the fine-tuned policy: the outcome alone, with the judge's word on each line, and with the truth of it."""
    models, options = (folder / "sft" / "model", folder / "judge" / "model"), rl_options(arguments, arguments.steps)
    figures = compare(job, "number_game", models, options, arguments, "benchmarks.game24_rounds:exact_steps")
    runs = [folder / f"ppo-{side}-{seed}" for side in ("outcome", *arguments.transforms, "exact") for seed in arguments.seeds]
    shown = ["reward/number_game", "process/score", "process/correlation", "learner/entropy"]
    plot_runs(runs, RESULTS / f"{arguments.name}_ppo.png", shown, smooth=WINDOW)
    return {f"PPO, {name}": values for name, values in figures.items()}


def refresh_judge(job: Path, folder: Path, seed: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """PPO with the judge's word on each line, in parts; after each but the last the judge goes on learning. Figures by part.

    It learns from the exact labels of the policy's new solutions, of all parts so far, with drawn steps as before. Optimiser and critic
    of the policy begin anew in each part.
    """
    policy, judge, labels = folder / "sft" / "model", folder / "judge" / "model", list[Path]()
    figures: dict[str, list[float]] = {}
    for part in range(1, arguments.parts + 1):
        name, own = f"refreshed-{seed}-{part}", f"seed={100 * seed + part}"
        shared = f'transform: raw, separator: "\\n", normalise: {arguments.normalise}, weight: {arguments.weight}'
        options = [*rl_options(arguments, arguments.steps // arguments.parts), f"scoring.process={{args: {{model: {judge}}}, {shared}}}"]
        _, minutes = reasoner("train", job, [f"name={name}", own, f"model.path={policy}", *options, *arguments.rl])
        policy, found = folder / name / "model", {"minutes of PPO": minutes, **looked_at(folder / name, "number_game")}
        if part < arguments.parts:
            results, found["minutes of sampling"] = sample(job, f"{name}-samples", f"model.path={policy}", arguments.refreshed_questions, 4)
            labels.append(folder / f"{name}-labels.jsonl")
            found["right lines"] = write_labels(results, labels[-1], first=2, second=2, misprints=2)["right lines"]
            _, found["minutes of the judge"] = train_judge(job, f"{name}-judge", judge, labels, ["learner.lr=3e-4", own])
            judge = folder / f"{name}-judge" / "model"
            found["judge's held-out AUC"] = curve(folder / f"{name}-judge", "eval/auc").popitem()[1]
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
    return figures


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the model; a multiple of 32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--solutions", type=int, default=16, help="of each taught hand at most")
    parser.add_argument("--taught", type=float, default=0.5, help="share of the training hands whose solutions are shown")
    parser.add_argument("--plays", type=int, default=40_000, help="games with other targets, for arithmetic")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning on solutions before the rounds")
    parser.add_argument("--epochs-a-round", type=int, default=1, help="of the policy")
    parser.add_argument("--paths", type=int, default=12, help="solutions of a hand that a search in rounds samples and values")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=300, help="training hands searched a round, the first so many")
    parser.add_argument("--samples", type=int, default=8, help="of each, for the first value model")
    parser.add_argument("--value-epochs", type=int, default=3, help="of the value model in each round")
    parser.add_argument("--value-steps", type=int, help="and of at most so many training steps")
    parser.add_argument("--judged-questions", type=int, default=1073, help="training hands whose steps are labelled, the first so many")
    parser.add_argument("--judged-samples", type=int, default=12, help="of each")
    parser.add_argument("--first-steps", type=int, default=16, help="and of each hand so many first steps, half of them right")
    parser.add_argument("--second-steps", type=int, default=8, help="and so many second ones")
    parser.add_argument("--misprints", type=int, default=4, help="and so many of the right ones with a number changed")
    parser.add_argument("--judge-epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 500, 1000], help="budgets of the methods")
    parser.add_argument("--held-out", type=int, default=128, help="hands of every evaluation, the first so many")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="of rounds, control and PPO; each stage that is finished in the folder is taken as it is",
    )
    parser.add_argument("--methods", nargs="+", help="fewer than all of them")
    parser.add_argument("--steps", type=int, default=40, help="of PPO")
    parser.add_argument("--parts", type=int, default=4, help="of PPO, between which the judge of stage refreshed learns")
    parser.add_argument("--refreshed-questions", type=int, default=400, help="training hands whose new solutions it learns from each time")
    add_rewards(parser, "raw")  # the judge cannot compute whether a formula makes 24, so the least score is that of the last line
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--folder", type=Path, default=Path("runs/game24_rounds"))
    parser.add_argument("--name", default="game24_rounds", help="of the record")
    parser.add_argument("--tiny", action="store_true", help="a model and sizes that mean nothing")
    arguments = parser.parse_args()
    if arguments.tiny:
        tiny: dict[str, Any] = {"width": 64, "layers": 2, "taught": 0.1, "solutions": 8, "plays": 640, "epochs": 1, "epochs_a_round": 1}
        tiny |= {"rounds": 1, "questions": 48, "samples": 4, "value_epochs": 1, "held_out": 16, "seeds": [1]}
        tiny |= {
            "judged_questions": 32,
            "judged_samples": 4,
            "judge_epochs": 1,
            "parts": 2,
            "refreshed_questions": 16,
            "first_steps": 4,
            "second_steps": 2,
            "misprints": 2,
        }
        vars(arguments).update(tiny | {"steps": 2, "tokens": [200], "methods": ["greedy", "best_of_n", "beam"]})
    return arguments


def main() -> None:
    arguments = read_arguments()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    items, gold = Game24Task(solutions=arguments.solutions).train(), folder / "gold.jsonl"
    figures: dict[str, Any] = {"gold solutions": write_gold(gold, items, arguments.taught)}
    job = write_job(folder, gold, arguments)

    def stage(name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Figures of a stage that is asked for, or was finished before."""
        file = folder / f"{name}.json"
        if name in arguments.stages or file.is_file():
            figures.update(kept(file, settings, make))

    def play() -> dict[str, float]:
        make_model(folder / "start", items, width=arguments.width, layers=arguments.layers, seed=0)
        plays = folder / "plays.jsonl"
        return {"plays": write_plays(plays, arguments.plays)} | fine_tune(job, "plays", folder / "start", plays, 1, 1e-3)

    def train_policy() -> dict[str, float]:
        return fine_tune(job, "sft", folder / "plays" / "model", gold, arguments.epochs, 5e-4)

    of_plays = settings_of(arguments, "width", "layers", "solutions", "plays")
    stage("plays", of_plays, play)
    stage("sft", of_plays | settings_of(arguments, "taught", "epochs"), train_policy)
    policy = {"policy": fingerprint(resolve_model(str(folder / "sft" / "model")))}
    if "rounds" in arguments.stages:
        figures |= learn_by_search(job, folder, policy, arguments)
    if "control" in arguments.stages:
        figures |= learn_gold(job, folder, gold, policy, arguments)
    of_judge = settings_of(arguments, "judged_questions", "judged_samples", "first_steps", "second_steps", "misprints", "judge_epochs")
    stage("judge", of_judge | policy, lambda: learn_judge(job, folder, arguments))
    if "methods" in arguments.stages:
        compare_methods(job, folder, arguments)
    if "rewards" in arguments.stages:
        figures |= compare_rewards(job, folder, arguments)
    if "refreshed" in arguments.stages:
        of_parts = settings_of(arguments, "steps", "parts", "refreshed_questions", "weight", "normalise", "held_out", "rl") | policy
        for seed in arguments.seeds:
            made = kept(folder / f"refreshed-{seed}.json", of_parts, partial(refresh_judge, job, folder, seed, arguments))
            figures |= {f"PPO with a refreshed judge, seed {seed}: {name}, by part": {"parts": values} for name, values in made.items()}
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "name"}
    record(arguments.name, settings, figures)


if __name__ == "__main__":
    main()
