"""Labelled solutions whose right labels a model can learn, and jobs on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.prm.examples import Example
from reasoner_ray.steps import Partial

SLIP = 7
"""A token that makes a step wrong, and every step after it."""


def make_examples(n: int, seed: int = 0) -> list[Example]:
    """``n`` solutions of two to five steps of one to four tokens; half of them slip somewhere. The reward is 1 where none does."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        partial = Partial.root(rng.integers(20, 500, rng.integers(2, 6)).tolist())
        steps = int(rng.integers(2, 6))
        slip = int(rng.integers(0, steps)) if i % 2 else steps
        for s in range(steps):
            step = rng.integers(20, 500, rng.integers(1, 5))
            if s == slip:
                step[rng.integers(0, len(step))] = SLIP
            partial = partial.then(step.tolist())
        labels = tuple(float(s < slip) for s in range(steps))
        made.append(Example(id=f"e{i}", where=f"example {i}", partial=partial, labels=labels, reward=float(slip == steps)))
    return made


def write_examples(path: Path, examples: Sequence[Example]) -> Path:
    """A file of records of tokens."""
    with path.open("w") as file:
        for e in examples:
            record = {
                "tokens": e.partial.tokens,
                "start": e.partial.start,
                "ends": e.partial.ends,
                "labels": e.labels,
                "reward": e.reward,
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., JobConfig]:
    """Makes a supervised job on the tiny model, in float32, with ``section={key: value}`` changes."""

    def make(kind: str, **sections: Any) -> JobConfig:
        tree: dict[str, Any] = {
            "name": kind,
            "kind": kind,
            "out": str(tmp_path),
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "learner": {"lr": 1e-3, "critic_lr": 1e-2, "torch_threads": 1},
            "tracking": {"wandb": "off", "terminal": "off"},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        return parse_config(tree)

    return make
