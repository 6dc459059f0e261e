"""A tiny job of kind sequence for the tests, with its data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasoner_ray.agents.sequence.collect import collect
from reasoner_ray.config import JobConfig, merge_trees, parse_config


def job(folder: Path, **sections: Any) -> JobConfig:
    """Key-to-Door, a network of one block, three steps of two updates; its data set is written where there is none yet."""
    tree: dict[str, Any] = {
        "name": "run",
        "kind": "sequence",
        "out": str(folder),
        "sequence": {
            "world": {"id": "reasoner_ray/KeyToDoor-v0", "max_steps": 24, "envs": 4},
            "data": [str(folder / "random-v0")],
            "collect": {"episodes": 20, "out": str(folder / "random-v0")},
            "context": 4,
            "width": 16,
            "blocks": 1,
            "heads": 2,
            "batch": 8,
            "targets": [1.0, 0.5, 0.0],
        },
        "learner": {"lr": 1e-3, "updates_per_step": 2, "tokens_per_microbatch": 48, "torch_threads": 1},
        "rollout": {"cpus": 0.1, "torch_threads": 1},
        "trainer": {"steps": 3, "eval_every": 2, "eval_tasks": 3, "checkpoint_every": 2},
        "tracking": {"wandb": "off", "terminal": "off"},
    }
    config = parse_config(merge_trees(tree, sections))
    if not (folder / "random-v0").exists():
        random = {"sequence": {"collect": {"policy": "random", "out": str(folder / "random-v0")}}}
        collect(parse_config(merge_trees(merge_trees(tree, sections), random)))
    return config


PENDULUM = {
    "world": {"id": "Pendulum-v1", "max_steps": 10, "envs": 4},
    "targets": [-10.0],
    "return_scale": 100,
    "online": {"offline_steps": 1, "episodes": 3, "buffer": 12, "target": -5.0, "temperature_lr": 0.01},
}
"""Online, with numbers for actions."""
