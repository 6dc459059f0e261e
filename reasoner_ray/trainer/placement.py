"""What a job asks of its Ray cluster: which actors share a GPU where there are too few for each to have its own, and whether it fits.

Ray would let an actor that fits nowhere wait for ever, without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reasoner_ray.errors import ConfigError
from reasoner_ray.prm.settings import step_model_gpus, with_step_model_gpus
from reasoner_ray.sync.backends import engine_gpus, rank_gpus, resolve_backend

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)

MOST_SHARING = 4
"""Actors that share a GPU without having been told to."""
SHARED_MEMORY = 0.8
"""Part of a shared GPU's memory that is divided among those who share it; what is left is for CUDA's own needs."""


def place(config: JobConfig, available: Mapping[str, float], *, training: bool = True) -> JobConfig:
    """``config`` with the GPUs of every actor that shares one in numbers, for a cluster of ``available`` resources.

    With ``sync.backend: ipc``, and where there are too few GPUs for every engine, learner rank and model of steps to have its own,
    those share whose GPUs are left open: on one GPU a job trains too. Raises ``ConfigError`` for a job that can never be placed.
    """
    gpus = available.get("GPU", 0)
    if gpus and _may_share(config, gpus, training):
        tried = (_shared(config, sharing, models) for sharing, models in ((2, False), *((n, True) for n in range(2, MOST_SHARING + 1))))
        fitting = next((shared for shared in tried if _gpus_wanted(shared, training) <= gpus), None)
        if fitting is not None:
            log.warning(
                "%g GPUs in the cluster: actors share them, with rollout.gpus=%g, learner.gpus=%g, rollout.gpu_memory_utilization=%g "
                "and sync.backend=%s",
                *(gpus, fitting.rollout.gpus, fitting.learner.gpus, fitting.rollout.gpu_memory_utilization, fitting.sync.backend),
            )
            config = fitting
    check_resources(config, available, training=training)
    return config


def _actors(config: JobConfig, training: bool) -> tuple[int, int]:
    """Engines and learner ranks: without ``training`` (an evaluation) no learner is placed; supervised training places no engine."""
    return 0 if training and config.kind != "rl" else config.rollout.workers, config.learner.ranks if training else 0


def _gpus_wanted(config: JobConfig, training: bool) -> float:
    engines, ranks = _actors(config, training)
    models = step_model_gpus(config, training=training) if engines else 0.0
    return models + engines * engine_gpus(config) + ranks * rank_gpus(config)


def _may_share(config: JobConfig, gpus: float, training: bool) -> bool:
    engines, ranks = _actors(config, training)
    if not engines or config.rollout.tensor_parallel > 1:
        return False
    if ranks and config.sync.backend == "nccl":
        return False
    parts_of_gpus = min(engine_gpus(config), rank_gpus(config)) < 1
    return (bool(ranks) and (parts_of_gpus or config.sync.backend == "ipc")) or _gpus_wanted(config, training) > gpus


def _shared(config: JobConfig, sharing: int, models: bool) -> JobConfig:
    """``config`` with ``sharing`` actors a GPU, those of step ``models`` among them or not; what it says itself stays."""
    part = 10_000 // sharing / 10_000  # Ray counts ten-thousandths
    rollout, learner, sync = config.rollout, config.learner, config.sync
    memory = rollout.gpu_memory_utilization or round(SHARED_MEMORY / sharing, 2)
    rollout = rollout.model_copy(update={"gpus": rollout.gpus or part, "gpu_memory_utilization": memory})
    if sync.backend == "auto":
        paired = rollout.workers <= learner.ranks and rollout.engine != "stepping"
        sync = sync.model_copy(update={"backend": "ipc" if paired else "object_store"})
    learner = learner.model_copy(update={"gpus": learner.gpus or part})
    config = config.model_copy(update={"rollout": rollout, "learner": learner, "sync": sync})
    return with_step_model_gpus(config, part) if models else config


def check_resources(config: JobConfig, available: Mapping[str, float], *, training: bool = True) -> None:
    """Refuse a job that the cluster can never place. Raises ``ConfigError``."""
    (engines, ranks), gpus = _actors(config, training), available.get("GPU", 0)
    if training:
        resolve_backend(config, gpus=gpus > 0)
    if gpus:
        _check_gpus(config, gpus, engines, ranks, training)
    elif config.rollout.tensor_parallel > 1:
        raise ConfigError(f"rollout.tensor_parallel={config.rollout.tensor_parallel}: the cluster has no GPUs, so it must be 1")
    wanted_cpus = engines * config.rollout.cpus + ranks * config.learner.cpus + config.scoring.workers * config.scoring.cpus
    if wanted_cpus > available.get("CPU", 0):
        raise ConfigError(
            f"rollout.cpus, learner.cpus and scoring.cpus add up to {wanted_cpus:g} CPUs; the cluster has {available.get('CPU', 0):g}. "
            "Lower them (they are reservations, not limits) or the number of actors"
        )
    custom = {"rollout": config.cluster.rollout_resources, "learner": config.cluster.learner_resources if training else {}}
    for section, needs in custom.items():
        for name, amount in needs.items():
            if amount > available.get(name, 0):
                raise ConfigError(f"cluster.{section}_resources.{name}: {amount:g} wanted, the cluster offers {available.get(name, 0):g}")


def _check_gpus(config: JobConfig, gpus: float, engines: int, ranks: int, training: bool) -> None:
    wanted, steps = _gpus_wanted(config, training), step_model_gpus(config, training=training) if engines else 0
    if wanted <= gpus:
        return
    also = f" with {steps:g} for models that judge steps (args.gpus times args.workers of scoring.process, search.scorer)" if steps else ""
    raise ConfigError(
        f"rollout.workers={engines} of {engine_gpus(config):g} GPUs (rollout.tensor_parallel, rollout.gpus) and learner.ranks={ranks} "
        f"of {rank_gpus(config):g} (learner.gpus) need {wanted:g} GPUs{also}; the cluster has {gpus:g}"
    )
