"""The pool on real Ray actors with real vLLM engines: routing, kills, workers that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.errors import EnvironmentProblem, ModelError
from reasoner_ray.rollout.engine import EngineBroken
from reasoner_ray.trainer.fleet import Event, State
from tests.engines import change_every_parameter, reference_logprobs, state_of

pytestmark = pytest.mark.slow


def job(folder: Path, **rollout: Any) -> JobConfig:
    return parse_config(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "rollout": {"max_context": 256, "max_new_tokens": 6, "kv_cache_gb": 0.05, "cpus": 1, "torch_threads": 1, **rollout},
        }
    )


def put_weights(ray: Any, model: Any) -> list[Any]:
    from reasoner_ray.sync.buckets import make_buckets

    return [ray.put(bucket) for bucket in make_buckets(state_of(model), 100_000)]


async def check_probe(pool: Any, items: list[Any], model: Any, engines: int) -> None:
    """Every engine answers the probe, with the log-probs of ``model``."""
    trajectories = await (await pool.probe(items[:2]))
    assert len(trajectories) == 2 * engines
    for t in trajectories:
        prompt, answer = t.tokens[~t.loss_mask].tolist(), t.tokens[t.loss_mask].tolist()
        np.testing.assert_allclose(t.behaviour_logprobs[t.loss_mask], reference_logprobs(model, prompt, answer), atol=1e-4)


async def groups(pool: Any, items: list[Any], numbers: range, kill: str | None = None) -> list[Any]:
    """Groups of four samples, on every routable engine; ``kill`` dies while they run."""
    await pool.pause()
    calls = [pool.submit(items[i], f"g{i}", 4) for i in numbers]
    assert {call.engine.name for call in calls} == set(pool.fleet.routable)
    await pool.resume(seed=5)
    if kill is not None:
        os.kill(pool.processes[kill], signal.SIGKILL)
    return list(await asyncio.gather(*(pool.finish(call) for call in calls)))


async def check_same(first: list[Any], again: list[Any]) -> None:
    """Tokens and log-probs are equal bit by bit."""
    for a, b in zip(first, again, strict=True):
        for x, y in zip(await a.trajectories, await b.trajectories, strict=True):
            assert x.tokens.tolist() == y.tokens.tolist(), "seeded rollouts repeat"
            assert x.behaviour_logprobs.tolist() == y.behaviour_logprobs.tolist()


async def refuses_what_has_no_room(pool: Any, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the cluster has, and more than others leave of it; either way the engines there go on."""
    monkeypatch.setattr("reasoner_ray.rollout.room.ROOM_SECONDS", 2.0)
    others = ray.util.placement_group([{"CPU": 1.0}] * int(ray.available_resources()["CPU"]))
    await others.ready()
    for wanted, message in ((500, r"need 498 CPU, the Ray cluster has 8"), (3, r"no room for 1 more rollout engines of \{'CPU': 1")):
        with pytest.raises(EnvironmentProblem, match=message):
            await pool.scale(wanted)
    ray.util.remove_placement_group(others)
    assert list(pool.processes) == pool.fleet.routable == ["engine-0", "engine-1"]


@pytest.mark.long
def test_a_pool_survives_kills_and_changes_of_size(ray_cluster: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pool, one story: starting engines is what takes the time here."""
    from transformers import AutoModelForCausalLM

    from reasoner_ray.rollout.pool import RolloutPool

    config = job(tiny_model_dir, workers=2)
    items = list(get_task(config.task, config.seed).train())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    change_every_parameter(model, seed=1)

    async def story() -> None:
        pool = RolloutPool(config)
        await pool.start()
        assert pool.n_engines == 0, "nothing is given out before the first sync"
        await pool.pause()
        await pool.update_weights(put_weights(ray_cluster, model), version=1)
        await pool.resume()
        assert pool.n_engines == 2
        await check_probe(pool, items, model, 2)

        await check_same(await groups(pool, items, range(6)), await groups(pool, items, range(6)))
        stats = await pool.stats()
        assert stats["tokens"] > 0
        assert stats["busy_s"] > 0
        assert stats["restarts"] == 0
        assert [r.summary["rewards"] for r in await pool.evaluate(items[:3])] == [[0.0]] * 3

        results = await groups(pool, items, range(6, 12), kill="engine-0")
        assert [r.summary["group_id"] for r in results] == [f"g{i}" for i in range(6, 12)]
        await pool.restart("engine-1")  # waits for itself; engine-0 comes back on its own
        while pool.n_engines < 2:
            await asyncio.sleep(0.1)
        assert pool.fleet.restarts == 2
        await check_probe(pool, items, model, 2)  # new engines hold the synced weights, not those of the model folder

        await pool.scale(3)
        assert pool.fleet.routable == ["engine-0", "engine-1", "engine-2"]
        await check_probe(pool, items, model, 3)
        calls = [asyncio.create_task(pool.finish(pool.submit(items[i], f"g{i}", 4))) for i in range(3)]
        await pool.scale(2)
        assert pool.fleet.routable == ["engine-0", "engine-1"]
        assert {result.summary["engine"] for result in await asyncio.gather(*calls)} == {"engine-0", "engine-1", "engine-2"}
        await check_probe(pool, items, model, 2)
        await refuses_what_has_no_room(pool, ray_cluster, monkeypatch)
        await pool.stop()

    asyncio.run(asyncio.wait_for(story(), 300))


class EngineDeadError(Exception):
    """Named as vLLM's."""


@pytest.mark.parametrize("error", [EngineDeadError("EngineCore encountered an issue"), EngineBroken("vLLM failed in a step")])
def test_the_death_of_vllm_is_the_engines_death(error: Exception) -> None:
    """Its actor lives on, and would fail every call."""
    from ray.exceptions import RayActorError, RayTaskError

    from reasoner_ray.rollout.pool import _answer

    async def generate() -> None:
        raise RayTaskError("run_group", "traceback", error)

    with pytest.raises(RayActorError, match=f"vLLM's engine died: {error}"):
        asyncio.run(_answer(generate()))


class FakeActor:
    """An actor whose every method answers at once, but for ``update``, which does something first."""

    def __init__(self, on_update: Callable[[], None] = lambda: None) -> None:
        self.on_update = on_update

    def __getattr__(self, method: str) -> Any:
        async def answer(*_: Any) -> None:
            if method == "update":
                self.on_update()

        return SimpleNamespace(remote=answer)


def fake_pool(*actors: FakeActor) -> tuple[Any, list[Any]]:
    from reasoner_ray.rollout.pool import RolloutPool, _Engine

    pool = RolloutPool(parse_config({}))
    for i, actor in enumerate(actors):
        pool._engines[f"e{i}"] = _Engine(name=f"e{i}", index=i, actor=actor, process=1)
        pool.fleet.join(f"e{i}")
    return pool, list(pool._engines.values())


@pytest.mark.parametrize("back", [False, True])
def test_an_engine_that_died_while_others_loaded_is_not_taken_for_synced(back: bool) -> None:
    def lose_the_first() -> None:
        pool.fleet.observe("e0", Event.DIED)
        pool.fleet.observe("e0", Event.RESTART_BEGAN)
        if back:
            engines[0].actor = FakeActor()
            pool.fleet.observe("e0", Event.RESTARTED)

    pool, engines = fake_pool(FakeActor(), FakeActor(lose_the_first))
    asyncio.run(pool.update_weights([], 1))
    assert pool.fleet.routable == ["e1"]
    assert pool.fleet.members["e0"].state is (State.STALE if back else State.RESTARTING)


def test_an_evaluation_goes_on_with_an_engine_that_was_replaced() -> None:
    """Nothing is published there: without the weights of its folder the new one would never be given work."""

    async def run() -> None:
        pool, (engine,) = fake_pool(FakeActor())
        await pool.assume_synced(0)
        assert pool.fleet.routable == ["e0"]
        for event in (Event.DIED, Event.RESTART_BEGAN, Event.RESTARTED):
            pool.fleet.observe("e0", event)
        await pool._catch_up(engine)
        assert pool.fleet.routable == ["e0"]

    asyncio.run(run())


def test_errors_reach_the_driver_as_themselves(ray_cluster: Any, tmp_path: Path, tiny_model_dir: Path) -> None:
    from reasoner_ray.rollout.pool import RolloutPool

    async def start(config: JobConfig) -> None:
        pool = RolloutPool(config)
        try:
            await pool.start()
        finally:
            await pool.stop()

    with pytest.raises(ModelError, match="nowhere"):
        asyncio.run(start(job(tmp_path / "nowhere")))
    with pytest.raises(EnvironmentProblem, match=r"rollout\.workers"):
        asyncio.run(start(job(tiny_model_dir, workers=500)))
