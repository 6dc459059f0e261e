"""Trajectories and job configurations for the learner's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder


def make_groups(n_groups: int = 4, samples: int = 4, seed: int = 0, turns: int = 1) -> list[list[Trajectory]]:
    """Random groups: a shared prompt, ``turns`` actions of one to six tokens, an outcome reward; every third is truncated."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(n_groups):
        prompt = rng.integers(2, 500, 12).tolist()
        group = []
        for i in range(samples):
            builder = TrajectoryBuilder(id=f"g{g}-{i}", group_id=f"g{g}", task="test")
            builder.add_env(prompt)
            for turn in range(turns):
                if turn:
                    builder.add_env(rng.integers(2, 500, 3).tolist(), turn=turn)
                action = rng.integers(2, 500, rng.integers(1, 7)).tolist()
                builder.add_model(action, (-6 + 0.1 * rng.standard_normal(len(action))).tolist(), [0] * len(action), turn=turn)
            builder.add_reward(float(rng.normal()))
            group.append(builder.build(Status.TRUNCATED if i % 3 == 2 else Status.FINISHED))
        groups.append(group)
    return groups


@pytest.fixture(scope="session")
def groups() -> list[list[Trajectory]]:
    """Four groups of four two-turn trajectories."""
    return make_groups(turns=2)


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., JobConfig]:
    """Makes a job on the tiny model, in float32, with ``section={key: value}`` changes."""

    def make(**sections: Any) -> JobConfig:
        tree: dict[str, Any] = {
            "name": "learner",
            "out": str(tmp_path),
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "trainer": {"tasks_per_step": 4, "samples_per_task": 4},
            "learner": {"lr": 1e-3, "critic_lr": 1e-2, "critic_hidden": [32], "torch_threads": 1},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        return parse_config(tree)

    return make
