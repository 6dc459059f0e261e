"""AsyncLLM on a CPU: slow to start, so one test tells its whole story."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from reasoner_ray.rollout.engine import RequestAborted, Sampling
from tests.engines import buckets_of, change_every_parameter, reference_logprobs, state_of, tiny_settings
from tests.processes import left_behind

PROMPT = list(range(5, 60))


@pytest.mark.long
def test_the_same_protocol_as_the_stepping_engine(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    from reasoner_ray.rollout.async_engine import AsyncEngine

    old = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    new = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    change_every_parameter(new, seed=3)

    def check(generation: Any, model: Any, version: int) -> None:
        np.testing.assert_allclose(generation.logprobs, reference_logprobs(model, PROMPT, generation.tokens), atol=1e-4)
        assert set(generation.versions) == {version}

    async def story() -> None:
        settings = tiny_settings(tiny_model_dir)
        engine = AsyncEngine(settings)
        try:
            for generation in await engine.generate(PROMPT, Sampling(max_new_tokens=10), n=3):
                check(generation, old, 0)
            np.testing.assert_allclose(await engine.prompt_logprobs(PROMPT), reference_logprobs(old, PROMPT[:1], PROMPT[1:]), atol=1e-4)
            await engine.ping()
            running = asyncio.ensure_future(engine.generate(PROMPT, Sampling(max_new_tokens=180)))
            while not engine.stats.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await engine.ping()  # busy
            await engine.pause()
            await engine.update_weights(buckets_of(state_of(new)), 1)
            await engine.resume()
            (during,) = await running
            assert during.versions == sorted(during.versions)
            assert set(during.versions) <= {0, 1}
            for generation in await engine.generate(PROMPT, Sampling(max_new_tokens=10), n=2):
                check(generation, new, 1)
            assert engine.version == 1
            await engine.pause()
            await engine.update_weights(buckets_of(state_of(old)), 1)  # the same number, other weights: no KV may be shared
            await engine.resume()
            for generation in await engine.generate(PROMPT, Sampling(max_new_tokens=10), n=2):
                check(generation, old, 1)
            assert engine.stats.new_tokens > 0

            full = settings.max_running
            both = [asyncio.ensure_future(engine.generate(PROMPT, Sampling(max_new_tokens=180), n=full)) for _ in range(2)]
            while not (engine.stats.running == full and engine.stats.waiting):
                await asyncio.sleep(0.01)
            await engine.abort()
            dropped = await asyncio.gather(*both, return_exceptions=True)
            assert isinstance(dropped[1], RequestAborted), "it waited for room, and would have generated for nobody"
            assert engine.stats.running == engine.stats.waiting == 0
        finally:
            engine.shutdown()

    asyncio.run(asyncio.wait_for(story(), 280))


OWNER = """
import multiprocessing, os, time
from reasoner_ray import settings

spawn = multiprocessing.get_context("spawn")

def worker(pipe):
    import reasoner_ray.sync.weights
    pipe.send(os.getpid())
    time.sleep(600)

def core(pipe):
    spawn.Process(target=worker, args=(pipe,)).start()
    pipe.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    settings.set_engine_environment(in_process=False)
    ours, theirs = spawn.Pipe()
    spawn.Process(target=core, args=(theirs,)).start()
    print(ours.recv(), ours.recv(), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_vllms_processes_end_with_an_owner_that_was_killed(tmp_path: Path) -> None:
    """Processes as vLLM starts them, without a model: the engine core below its owner, a worker with our extension below that."""
    (tmp_path / "owner.py").write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, tmp_path / "owner.py"], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(processes) == 2
    owner.kill()
    owner.wait()
    assert not left_behind(processes)
