"""The parity probe with a real engine and a real learner: weights that did not arrive end the job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from reasoner_ray.config import parse_config
from reasoner_ray.data.tasks import DataOrder, get_task
from reasoner_ray.errors import SyncError
from reasoner_ray.learner.learner import Learner
from reasoner_ray.models import load_tokenizer
from reasoner_ray.rollout.worker import RolloutWorker
from reasoner_ray.trainer.driver import Parts, TrainerDriver
from reasoner_ray.trainer.launch import DEFAULT_TOLERANCE
from tests.engines import buckets_of, state_of
from tests.trainer.fakes import FakeLearners, FakeRollouts, FakeScorers, FakeTracker

pytestmark = pytest.mark.slow


@dataclass
class RealWeights(FakeRollouts):
    """Weights and probes are those of a real engine; groups are made up."""

    worker: Any = None

    async def pause(self) -> None:
        await super().pause()
        await self.worker.pause()

    async def resume(self, seed: int | None = None) -> None:
        await self.worker.resume(seed)
        await super().resume(seed)

    async def update_weights(self, published: Any, version: int) -> None:
        await super().update_weights(published, version)
        await self.worker.update(buckets_of(published), version)

    async def probe(self, items: Any) -> Any:
        return await self.worker.probe(items)


@dataclass
class RealMismatch(FakeLearners):
    """Publishes a real learner's weights, and compares with them."""

    learner: Any = None

    async def publish_weights(self) -> Any:
        return [(name, tensor.clone()) for name, tensor in self.learner.state_for_sync()]

    async def mismatch(self, probe: Any) -> dict[str, float]:
        return self.learner.mismatch(probe)


@pytest.fixture
def borrowed(engine: Any, tiny_model: Any) -> Iterator[Any]:
    """The engine that all tests share; it gets its weights back."""
    yield engine

    async def restore() -> None:
        await engine.pause()
        await engine.update_weights(buckets_of(state_of(tiny_model)), 0)
        await engine.resume()

    asyncio.run(restore())


@pytest.mark.parametrize("arrive", [True, False])
def test_weights_that_did_not_arrive_end_the_job(
    arrive: bool, borrowed: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner's embedding has changed; without its repacking, a tied head of vLLM's CPU engine keeps the old one."""
    trainer = {"steps": 1, "tasks_per_step": 2, "samples_per_task": 2, "checkpoint_every": 0, "eval_tasks": 0}
    model = {"path": str(tiny_model_dir), "dtype": "float32"}
    learner_settings = {"torch_threads": 1, "critic": "none"}
    config = parse_config(
        {"out": str(tmp_path), "model": model, "algorithm": {"name": "grpo"}, "trainer": trainer, "learner": learner_settings}
    )
    learner = Learner(config)
    with torch.no_grad():
        embedding = learner.engine.policy.lm.get_input_embeddings().weight
        embedding += 0.2 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    if not arrive:
        monkeypatch.setattr("reasoner_ray.sync.weights.repack_embeddings", lambda _: None)
    parts: Any = {
        "rollouts": RealWeights(worker=RolloutWorker(config, borrowed, load_tokenizer(tiny_model_dir))),
        "scorers": FakeScorers(),
        "learners": RealMismatch(learner=learner),
        "tracker": FakeTracker(),
    }
    items = list(get_task(config.task).train())
    tolerance = DEFAULT_TOLERANCE["float32"]
    driver = TrainerDriver(config, Parts(**parts, train_items=DataOrder(items, 0), eval_items=[], probe_tolerance=tolerance))
    if arrive:
        asyncio.run(driver.run())
        assert driver.step == 1
    else:
        with pytest.raises(SyncError, match=r"the weights of version 0 did not arrive: .* differ by \d\.\d+ nats"):
            asyncio.run(driver.run())
