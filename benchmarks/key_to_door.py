"""Key-to-Door from random trajectories: Decision Transformer, plain cloning, and cloning of the best; what is asked for and what comes.

Three parts. `key_to_door`: success of the three on 1,000 random trajectories a seed, greedy. `delayed`: CartPole episodes of mixed
quality (the rule `balance`, which stands for an expert, acting at random at a share of the steps), learnt with each reward where it
was earned and with all of it at the end. `targets`: the same model asked for returns between the worst and the best recorded;
Spearman's rho of those and the achieved means.

Everything is trained by the job's own learner (DeepSpeed) and played by its own players, in this process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._record import RESULTS, record
from reasoner_ray.agents.sequence.collect import collect
from reasoner_ray.agents.sequence.driver import evaluation
from reasoner_ray.agents.sequence.learner import SequenceLearner
from reasoner_ray.agents.sequence.player import Player
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.config import JobConfig, load_tree, merge_trees, parse_config

JOBS = Path(__file__).parent.parent / "jobs" / "sequence"
KINDS = {"dt": "key_to_door_dt", "bc": "key_to_door_bc", "filtered": "key_to_door_filtered"}
NOISE = (0.05, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of random actions among the CartPole episodes."""
ASKED = (25, 50, 75, 100, 150, 200, 300, 400, 500)


def balance(observation: np.ndarray, rng: np.random.Generator) -> np.int64:
    """Keeps CartPole's pole up: push to where it leans and falls, a little towards the middle of the track."""
    x, speed, angle, turn = observation
    return np.int64(10 * angle + 2 * turn + 0.2 * x + 0.5 * speed > 0)


def made(job: str, seed: int, folder: Path, over: Mapping[str, Any]) -> JobConfig:
    """A job of jobs/sequence with a seed of its own, in ``folder``."""
    tree = merge_trees(load_tree(JOBS / f"{job}.yaml"), {"seed": seed, "out": str(folder), "tracking": {"wandb": "off", "terminal": "off"}})
    return parse_config(merge_trees(tree, dict(over)))


def trained(config: JobConfig) -> Player:
    """A player with what the job's learner learns in all its steps."""
    learner = SequenceLearner(config)
    for _ in range(config.trainer.steps):
        learner.train_step([])
    player = Player(config)
    player.load(learner.state_for_sync())
    return player


def looked_at(player: Player) -> dict[str, float]:
    """The evaluation of kind sequence."""
    seeds = [FIRST_EVAL_SEED + i for i in range(player.config.trainer.eval_tasks)]
    return evaluation({target: player.evaluate(seeds, target) for target in player.config.sequence.targets})


def key_to_door(seed: int, folder: Path, episodes: int) -> dict[str, float]:
    """Success of the three, and of the random moves that they learn from."""
    data = folder / f"key-to-door-{seed}-v0"
    over: dict[str, Any] = {"sequence": {"data": [str(data)], "collect": {"out": str(data)}}, "trainer": {"eval_tasks": episodes}}
    found = {"random": collect(made(KINDS["dt"], seed, folder, over))["return"]}
    for kind, job in KINDS.items():
        found[kind] = looked_at(trained(made(job, seed, folder, over)))["eval/return"]
        print(f"seed {seed}: {kind} {found[kind]:.3f}", flush=True)
    return found


def cartpole(seed: int, folder: Path, episodes: int, steps: int) -> dict[str, Any]:
    """Returns achieved with rewards where they were earned and at the end, and the correlation with those asked for."""
    data = []
    for noise in NOISE:
        out = folder / f"cartpole-{seed}-noise{int(100 * noise)}-v0"
        policy = {"policy": "benchmarks.key_to_door:balance", "noise": noise, "episodes": 40, "out": str(out)}
        collect(made("cartpole_dt", seed, folder, {"sequence": {"collect": policy, "data": [str(out)]}}))
        data.append(str(out))
    found: dict[str, Any] = {}
    for name, delayed in (("immediate", False), ("delayed", True)):
        asked = [500, *ASKED[:-1]] if not delayed else [500]
        over = {"sequence": {"data": data, "delayed": delayed, "targets": asked}, "trainer": {"eval_tasks": episodes, "steps": steps}}
        figures = looked_at(trained(made("cartpole_dt", seed, folder, over)))
        found[name] = figures["eval/return"]
        if not delayed:
            found["spearman"] = figures["eval/spearman"]
            found["achieved"] = [figures[f"eval/return_at_{target}"] for target in ASKED]
        print(f"seed {seed}: CartPole, {name}: {found}", flush=True)
    return found


def draw(doors: list[dict[str, float]], poles: list[dict[str, Any]], path: Path) -> None:
    """Success of each kind, and returns achieved over those asked for; a dot or a line a seed."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = ["random", *KINDS]
    for place, name in enumerate(names):
        left.plot([place] * len(doors), [100 * d[name] for d in doors], "o", color="#0072B2", alpha=0.7)
    left.axhline(60, color="#7F7F7F", linewidth=0.8, linestyle="--")
    left.set_xticks(range(len(names)), ["random moves", "Decision\nTransformer", "cloning", "cloning of\nthe best 3 %"])
    left.set(title="Key-to-Door, 1,000 random trajectories", ylabel="doors opened, %", ylim=(-2, 102))
    for pole in poles:
        right.plot(ASKED, pole["achieved"], marker="o", markersize=3, color="#D55E00", alpha=0.7)
    right.plot(ASKED, ASKED, color="#7F7F7F", linewidth=0.8, linestyle="--")
    right.set(title="CartPole, mixed data", xlabel="return asked for", ylabel="return achieved")
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Train, look, print, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=200, help="of Key-to-Door, for each figure")
    parser.add_argument("--poles", type=int, default=30, help="episodes of CartPole for each return asked for")
    parser.add_argument("--pole-steps", type=int, default=10, help="training steps of 100 updates on CartPole")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of so small a network threads only wait for each other
    seeds = range(1, args.seeds + 1)
    with tempfile.TemporaryDirectory() as folder:
        doors = [key_to_door(seed, Path(folder), args.episodes) for seed in seeds]
        poles = [cartpole(seed, Path(folder), args.poles, args.pole_steps) for seed in seeds]
    figures: dict[str, Any] = {f"key_to_door/{name}": [d[name] for d in doors] for name in doors[0]}
    figures |= {f"cartpole/{name}": [p[name] for p in poles] for name in ("immediate", "delayed", "spearman")}
    figures["cartpole/delayed_costs"] = [1 - p["delayed"] / p["immediate"] for p in poles]
    figures |= {f"cartpole/achieved_at_{target}": [p["achieved"][i] for p in poles] for i, target in enumerate(ASKED)}
    RESULTS.mkdir(exist_ok=True)
    draw(doors, poles, RESULTS / "key_to_door.png")
    record("key_to_door", settings={**vars(args), "noise": NOISE, "asked": ASKED}, figures=figures)


if __name__ == "__main__":
    main()
