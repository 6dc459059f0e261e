"""Runs that a measurement finds in its folder, or trains: finished ones are taken as they are, if they are of the job that is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer.metrics_log import METRICS_FILE, read_jsonl

FREE = ("name", "out", "trainer.steps", "tracking")
"""What may differ: where a run lies, how long it is, how it is watched."""

BY_DATA = ("sft", "prm", "value")
"""Kinds whose number of steps follows from their data, not from ``trainer.steps``."""


def trained(job: Path, options: list[str], grows: bool = True) -> Path:
    """The folder of the finished run of ``job`` with ``options``; `reasoner train` in a process of its own where it is not there.

    A run that was interrupted goes on from its last checkpoint; so does a finished one with fewer steps, where it ``grows`` and its
    learning rate is constant. Raises ``ConfigError`` where another run lies there, ``SystemExit`` where the training fails.
    """
    config = load_config(job, options)
    run, wanted, steps = config.run_dir, config.trainer.steps, steps_of(config)
    if steps == wanted or (steps and config.kind in BY_DATA):
        print(f"{run} is finished already")
        return run
    if steps and not (grows and steps < wanted and config.learner.lr_schedule == "constant"):
        raise ConfigError(f"{run} has {steps} training steps, not {wanted}; delete it and what began from it, or take another --out")
    how = ["--if-exists", "resume"] if _is_begun(config) else ["--overwrite"]
    if code := subprocess.run([sys.executable, "-m", "reasoner_ray.cli", "train", str(job), *options, *how]).returncode:
        raise SystemExit(f"the run in {run} failed with exit code {code}; see what it printed above")
    return run


def kept(file: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` gives (plain data), from ``file`` where it was made with the same ``settings`` before.

    Raises ``ConfigError`` where it was made with others.
    """
    if not file.is_file():
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps({"settings": settings, "made": make()}, indent=1))
        aside.replace(file)
    found = json.loads(file.read_text())
    wanted = json.loads(json.dumps(settings))
    if differ := sorted(key for key in found["settings"].keys() | wanted.keys() if found["settings"].get(key) != wanted.get(key)):
        named = ", ".join(f"{key}: {found['settings'].get(key)}, not {wanted.get(key)}" for key in differ)
        raise ConfigError(f"{file} was made otherwise ({named}); delete it and what was made from it, or take another folder")
    return found["made"]


def steps_of(config: JobConfig) -> int:
    """Training steps of the finished run in the folder of ``config``; 0 where there is none.

    Raises ``ConfigError`` where what lies there was trained otherwise.
    """
    run = config.run_dir
    if not (run / "model").is_dir():
        return 0
    _hold_equal(config, "was trained otherwise", FREE)
    return int(read_jsonl(run / METRICS_FILE)[-1]["step"])


def _is_begun(config: JobConfig) -> bool:
    """Whether a checkpoint of ``config`` is there. Raises ``ConfigError`` where it is another job's; a schedule fits one length alone."""
    if not any(config.run_dir.glob("checkpoints/step-*/MANIFEST.json")):
        return False
    constant = config.learner.lr_schedule == "constant"
    _hold_equal(config, "was begun otherwise", FREE if constant else tuple(key for key in FREE if key != "trainer.steps"))
    return True


def _hold_equal(config: JobConfig, what: str, free: tuple[str, ...]) -> None:
    """Raises ``ConfigError``, with ``what``, where the run's own configuration differs from ``config`` in more than is ``free``."""
    run = config.run_dir
    if not config.rollout.stop:
        free = (*free, "rollout.stop")  # a run writes down those of its task
    there, wanted = (dict(_leaves(c.model_dump(mode="json"))) for c in (load_config(run / "config.yaml"), config))
    keys = sorted(key for key in there.keys() | wanted.keys() if not any(key == f or key.startswith(f"{f}.") for f in free))
    found = [key for key in keys if there.get(key) != wanted.get(key)]
    if found:
        named = ", ".join(f"{key}: {there.get(key)}, not {wanted.get(key)}" for key in found[:4])
        raise ConfigError(f"{run} {what} ({named}); delete it and what began from it, or take another folder with --out")


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
