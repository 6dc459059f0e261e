"""AsyncLLM on a CPU: slow to start, so one test tells its whole story."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.rollout.engine import RequestAborted, Sampling
from tests.engines import buckets_of, change_every_parameter, reference_logprobs, state_of, tiny_settings

PROMPT = list(range(5, 60))


@pytest.mark.slow
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
