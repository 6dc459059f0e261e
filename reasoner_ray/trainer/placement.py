"""What a job asks of its Ray cluster: which actors share a GPU where there are too few for each to have its own, and whether it fits.

Ray would let an actor that fits nowhere wait for ever, without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reasoner_ray.errors import ConfigError
from reasoner_ray.prm.settings import step_model_gpus, with_step_model_gpus
from reasoner_ray.sync.backends import engine_gpus, pair_gpus, part_of_memory, rank_gpus, resolve_backend

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)

MOST_SHARING = 4
"""Actors that share a GPU without having been told to."""


def place(config: JobConfig, available: Mapping[str, float], *, training: bool = True) -> JobConfig:
    """``config`` with the GPUs of every actor that shares one in numbers, for a cluster of ``available`` resources.

    With ``sync.backend: ipc``, and where there are too few GPUs for every engine, learner rank and model of steps to have its own,
    those share whose GPUs are left open: on one GPU a job trains too. Raises ``ConfigError`` for a job that can never be placed.
    """
    gpus = available.get("GPU", 0)
    if gpus and _may_share(config, gpus, training):
        ways = ((2, False), *((sharing, True) for sharing in range(2, MOST_SHARING + 1)))
        tried = [_shared(config, sharing, models, training) for sharing, models in ways]
        fitting = next((shared for shared in tried if _problem(shared, gpus, training) is None), None)
        if fitting is not None:
            log.warning("%g GPUs in the cluster, so actors share them: %s", gpus, _told(fitting, training))
            config = fitting
        elif config.sync.backend == "ipc":  # it cannot do without sharing
            config = tried[0]
    check_resources(config, available, training=training)
    return config


def _actors(config: JobConfig, training: bool) -> tuple[int, int]:
    """Engines and learner ranks: without ``training`` (an evaluation) no learner is placed; supervised training places no engine."""
    return 0 if training and config.kind != "rl" else config.rollout.workers, config.learner.ranks if training else 0


def _units(config: JobConfig, training: bool) -> list[float]:
    """GPUs of everything that Ray places for itself: an engine with its learner rank where they share one by ``ipc``, else each actor."""
    engines, ranks = _actors(config, training)
    models = step_model_gpus(config, training=training) if engines else []
    if engines and ranks and resolve_backend(config, gpus=True) == "ipc":
        return [*models, *[pair_gpus(config)] * ranks]
    return [*models, *[engine_gpus(config)] * engines, *[rank_gpus(config)] * ranks]


def _fits(units: list[float], gpus: float) -> bool:
    """Whether they can be laid out, the greatest first, so that no part of a GPU lies on two."""
    free = gpus - sum(unit for unit in units if unit >= 1)
    rooms = [1.0] * int(free)
    for unit in sorted((unit for unit in units if unit < 1), reverse=True):
        room = next((i for i, left in enumerate(rooms) if left >= unit - 1e-6), None)
        if room is None:
            return False
        rooms[room] -= unit
    return free >= 0


def _may_share(config: JobConfig, gpus: float, training: bool) -> bool:
    engines, ranks = _actors(config, training)
    if not engines or config.rollout.tensor_parallel > 1 or (ranks and config.sync.backend == "nccl"):
        return False
    asked = config.sync.backend == "ipc" or min(engine_gpus(config), rank_gpus(config)) < 1
    return (bool(ranks) and asked) or not _fits(_units(config, training), gpus)


def _shared(config: JobConfig, sharing: int, models: bool, training: bool) -> JobConfig:
    """``config`` with ``sharing`` actors a GPU, those of step ``models`` among them or not; what it says itself stays."""
    part = 10_000 // sharing / 10_000  # Ray counts ten-thousandths
    rollout, learner, sync = config.rollout, config.learner, config.sync
    engine = rollout.gpus or (part if learner.gpus is None else min(part, max(round(1 - learner.gpus, 4), 1e-4)))
    rank = learner.gpus or (part if rollout.gpus is None else min(part, max(round(1 - rollout.gpus, 4), 1e-4)))
    if not training:
        sync = sync.model_copy(update={"backend": "object_store"})  # nothing is synced
    elif sync.backend == "auto":
        paired = rollout.workers <= learner.ranks and rollout.engine != "stepping"
        sync = sync.model_copy(update={"backend": "ipc" if paired else "object_store"})
    rollout, learner = rollout.model_copy(update={"gpus": engine}), learner.model_copy(update={"gpus": rank})
    config = config.model_copy(update={"rollout": rollout, "learner": learner, "sync": sync})
    return with_step_model_gpus(config, part) if models else config


def _told(config: JobConfig, training: bool) -> str:
    """Who has how much."""
    memory = f"rollout.gpu_memory_utilization={config.rollout.gpu_memory_utilization or part_of_memory(config):g}"
    said = [f"an engine has {engine_gpus(config):g} of one (rollout.gpus, {memory})"]
    if training:
        said.append(f"a learner rank {rank_gpus(config):g} (learner.gpus), with sync.backend={config.sync.backend}")
    if models := step_model_gpus(config, training=training):
        said.append(f"models of steps {models[0]:g} each (args.gpus)")
    return ", ".join(said)


def _problem(config: JobConfig, gpus: float, training: bool) -> str | None:
    """Why the job cannot be placed on so many GPUs; None where it can."""
    engines, ranks = _actors(config, training)
    units = _units(config, training)
    paired = engines and ranks and resolve_backend(config, gpus=True) == "ipc"
    if paired and pair_gpus(config) > 1:
        return f"sync.backend=ipc: an engine and a rank share one GPU; rollout.gpus and learner.gpus add up to {pair_gpus(config):g}"
    if ranks > 1 and (pair_gpus(config) if paired else rank_gpus(config)) <= 0.5:
        return (
            f"learner.ranks={ranks} of {rank_gpus(config):g} GPUs: two ranks on one cannot be connected; take learner.ranks=1, or more GPUs"
        )
    if _fits(units, gpus):
        return None
    models = step_model_gpus(config, training=training) if engines else []
    also = f" with {sum(models):g} for models that judge steps (args.gpus times args.workers of scoring.process, search.scorer)"
    return (
        f"rollout.workers={engines} of {engine_gpus(config):g} GPUs (rollout.tensor_parallel, rollout.gpus) and learner.ranks={ranks} "
        f"of {rank_gpus(config):g} (learner.gpus) need {sum(units):g} GPUs{also if models else ''}; the cluster has {gpus:g}"
    )


def check_resources(config: JobConfig, available: Mapping[str, float], *, training: bool = True) -> None:
    """Refuse a job that the cluster can never place. Raises ``ConfigError``."""
    (engines, ranks), gpus = _actors(config, training), available.get("GPU", 0)
    if training:
        resolve_backend(config, gpus=gpus > 0)
    if gpus and (problem := _problem(config, gpus, training)) is not None:
        raise ConfigError(problem)
    if not gpus and config.rollout.tensor_parallel > 1:
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
