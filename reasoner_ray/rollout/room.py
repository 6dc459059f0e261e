"""Whether the Ray cluster has room for rollout engines: an actor that fits nowhere would wait for ever, without a word."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import ray

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.sync.backends import engine_gpus

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

ROOM_SECONDS = 10.0
"""How long Ray may take to find room for more engines."""


def engine_needs(config: JobConfig, *, gpus: bool) -> dict[str, float]:
    """Ray resources of one engine, on a cluster with GPUs or without."""
    of_gpus = {"GPU": engine_gpus(config)} if gpus else {}
    return {"CPU": config.rollout.cpus, **of_gpus, **config.cluster.rollout_resources}


def check_cluster(needs: dict[str, float], engines: int) -> None:
    """Raises ``EnvironmentProblem`` where the whole cluster, empty, has less than ``engines`` need."""
    have = ray.cluster_resources()
    for resource, amount in needs.items():
        if amount * engines > have.get(resource, 0):
            raise EnvironmentProblem(
                f"{engines} rollout engines need {amount * engines:g} {resource}, the Ray cluster has {have.get(resource, 0):g}: lower "
                "rollout.workers, rollout.cpus or rollout.tensor_parallel, or add nodes"
            )


async def check_room(needs: dict[str, float], engines: int) -> None:
    """Raises ``EnvironmentProblem`` where what is free at the moment, on single nodes, is less than ``engines`` need."""
    bundle = {resource: amount for resource, amount in needs.items() if amount}
    if not bundle:
        return
    trial = ray.util.placement_group([bundle] * engines)
    try:
        await asyncio.wait_for(asyncio.wrap_future(trial.ready().future()), ROOM_SECONDS)
    except TimeoutError as error:
        raise EnvironmentProblem(f"the Ray cluster has no room for {engines} more rollout engines of {bundle} at the moment") from error
    finally:
        ray.util.remove_placement_group(trial)
