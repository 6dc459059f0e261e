"""What the kinds that go step by step (mat, sequence) share from the command line: how a run begins, and what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from reasoner_ray.agents import SCRATCH
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.checkpoint import read_driver_state
from reasoner_ray.trainer.stepwise import StepDriver
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

FIRST_EVAL_SEED = 1_000_000_000
"""Episodes of evaluation have the seeds from here on, in every job."""


def train_on_actors(
    config: JobConfig, if_exists: launch.IfExists, make_driver: Callable[[JobConfig, Tracker], StepDriver]
) -> dict[str, float]:
    """Run a job to its end, from its newest checkpoint where it has one, and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    config, checkpoint = launch.choose_run(config, if_exists)
    if checkpoint is not None:
        read_driver_state(checkpoint)
    launch.connect(config)
    try:
        check_room(config, ray.cluster_resources())
        launch.make_run_folder(config, if_exists)
        tracker = Tracker(config, config.run_dir, resume=checkpoint is not None)
        return launch.run_driver(make_driver(config, tracker), checkpoint)
    finally:
        ray.shutdown()


def check_room(config: JobConfig, available: Mapping[str, float]) -> None:
    """Refuse a job that the cluster can never place. Raises ``ConfigError``."""
    workers, learner = config.rollout, config.learner
    cpus = workers.workers * workers.cpus + learner.ranks * learner.cpus
    if cpus > available.get("CPU", 0):
        raise ConfigError(
            f"rollout.workers of rollout.cpus and learner.ranks of learner.cpus add up to {cpus:g} CPUs; the cluster has "
            f"{available.get('CPU', 0):g}. Lower them (they are reservations, not limits) or the number of actors"
        )
    gpus = available.get("GPU", 0)
    if gpus and learner.ranks > gpus:
        raise ConfigError(f"learner.ranks={learner.ranks} need a GPU each where there are any; the cluster has {gpus:g}")


def evaluated_folder(config: JobConfig, model: str | None) -> Path:
    """Where the network that ``evaluate`` looks at lies."""
    if model is not None:
        return Path(model)
    own = config.run_dir / "model"
    return own if own.exists() or config.model.path == SCRATCH else Path(config.model.path)
