"""The Ray side of one rollout worker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import ray

from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.worker import EngineKind, Mode, RolloutWorker, build_engine
from reasoner_ray.sync.buckets import Bucket, pack_bucket

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig
    from reasoner_ray.data.tasks import Item
    from reasoner_ray.sync.backends import Backend


class RolloutActor:
    """The Ray side of a ``RolloutWorker``; every method is a coroutine on the actor's loop."""

    def __init__(self, config: JobConfig, index: int, name: str, kind: EngineKind, backend: Backend) -> None:
        self._arguments = (config, index, name, kind, backend)
        self._worker: RolloutWorker

    async def start(self) -> int:
        """Load the model; returns the process id."""
        from reasoner_ray.models import load_tokenizer

        config, index, name, kind, backend = self._arguments
        engine_settings = await asyncio.to_thread(EngineSettings.of, config, index, backend)
        if kind == "stepping":
            # Loading takes long; in its own thread it leaves this loop free to answer.
            engine = await asyncio.to_thread(build_engine, kind, engine_settings)
        else:
            engine = build_engine(kind, engine_settings)  # AsyncLLM belongs to the loop it is made in
        tokenizer = load_tokenizer(engine_settings.model, trust_remote_code=config.model.trust_remote_code)
        self._worker = RolloutWorker(config, engine, tokenizer, name)
        return os.getpid()

    @ray.method(num_returns=2)
    async def run_group(self, item: Item, group_id: str, n: int, mode: Mode) -> tuple[Any, Any]:
        """(trajectories, summary); see ``RolloutWorker.run_group``."""
        return await self._worker.run_group(item, group_id, n, mode)

    async def probe(self, items: list[Item]) -> list[Any]:
        """See ``RolloutWorker.probe``."""
        return await self._worker.probe(items)

    async def ping(self) -> int:
        """See ``RolloutWorker.ping``."""
        return await self._worker.ping()

    async def pause(self) -> None:
        """See ``RolloutWorker.pause``."""
        await self._worker.pause()

    async def resume(self, seed: int | None, arrivals: int) -> None:
        """See ``RolloutWorker.resume``."""
        await self._worker.resume(seed, arrivals)

    async def transfer(self, method: str, info: dict[str, Any] | None) -> None:
        """One call of vLLM's weight-transfer protocol; see ``Engine.transfer``."""
        await self._worker.engine.transfer(method, info)

    async def update(self, refs: list[Any], version: int) -> None:
        """Load weights from the object store, one bucket at a time."""
        await self._worker.update(_fetch(refs), version)

    async def label(self, version: int) -> None:
        """Say which version the weights it holds are."""
        await self._worker.engine.set_version(version)

    async def abort(self) -> None:
        """See ``RolloutWorker.abort``."""
        await self._worker.abort()

    async def stats(self) -> dict[str, float]:
        """See ``RolloutWorker.stats``."""
        return self._worker.stats()

    async def stop(self) -> None:
        """End the engine and its processes."""
        self._worker.close()


async def _fetch(refs: list[Any]) -> AsyncIterator[Bucket]:
    """Buckets as they arrive; a plain list of (name, tensor) pairs counts as one."""
    for ref in refs:
        bucket = await ref
        yield bucket if isinstance(bucket, Bucket) else pack_bucket(bucket)
