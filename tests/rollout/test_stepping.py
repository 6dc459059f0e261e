"""The in-process engine: token-exact, honest log-probs, versions, pauses."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from reasoner_ray.rollout.engine import EngineBroken, Generation, RequestAborted, Sampling
from tests.engines import buckets_of, change_every_parameter, load, reference_logprobs, state_of

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 60))


def sample(max_new_tokens: int = 12, **others: Any) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, **others)


def test_logprobs_are_those_of_the_distribution_sampled_from(engine: Any, tiny_model: Any) -> None:
    async def run() -> list[list[Generation]]:
        cases = [(1.0, 3), (0.7, 3), (1.5, 3), (0.0, 1)]
        return await asyncio.gather(*(engine.generate(PROMPT[: 20 + 7 * i], sample(temperature=t), n=n) for i, (t, n) in enumerate(cases)))

    groups = asyncio.run(run())
    assert [len(group) for group in groups] == [3, 3, 3, 1]
    for i, (temperature, group) in enumerate(zip((1.0, 0.7, 1.5, 1.0), groups, strict=True)):
        for generation in group:
            expected = reference_logprobs(tiny_model, PROMPT[: 20 + 7 * i], generation.tokens, temperature)
            np.testing.assert_allclose(generation.logprobs, expected, atol=2e-5)
            assert len(generation.versions) == len(generation.tokens) <= 12


def test_prompt_logprobs(engine: Any, tiny_model: Any) -> None:
    found = asyncio.run(engine.prompt_logprobs(PROMPT))
    np.testing.assert_allclose(found, reference_logprobs(tiny_model, PROMPT[:1], PROMPT[1:]), atol=2e-5)


def test_the_stop_string_and_the_end_token_stay_in_the_action(engine: Any, tiny_model_dir: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    async def run() -> list[Generation]:
        return await engine.generate(PROMPT, sample(60, stop=("a",)), n=16)

    generations = asyncio.run(run())
    stopped = [g for g in generations if g.finish_reason == "stop"]
    assert stopped
    for g in stopped:
        text = tokenizer.decode(g.tokens)
        before = tokenizer.decode(g.tokens[:-1])
        assert ("a" in text and "a" not in before) or g.tokens[-1] == tokenizer.eos_token_id
    assert all(len(g.tokens) == 60 for g in generations if g.finish_reason == "length")


def test_a_prompt_without_room_is_refused_and_an_action_never_leaves_the_context(engine: Any) -> None:
    with pytest.raises(ValueError, match="256"):
        asyncio.run(engine.generate([7] * 256, sample()))
    with pytest.raises(ValueError):
        asyncio.run(engine.generate([99_999], sample()))
    (only,) = asyncio.run(engine.generate([7] * 250, sample(50)))
    assert len(only.tokens) <= 6


def test_seeded_generation_does_not_depend_on_arrival_or_on_what_came_before(engine: Any) -> None:
    async def round_of(order: list[int], warm: bool) -> list[list[Generation]]:
        if warm:
            await engine.generate(PROMPT, sample(temperature=0.0))
            await engine.generate([9, 9], sample(3))
        await engine.pause()
        calls = {i: asyncio.ensure_future(engine.generate(PROMPT[: 30 + i], sample(8), n=4, order=f"g{i:03}")) for i in order}
        await asyncio.sleep(0)
        await engine.resume(seed=17)
        return [await calls[i] for i in sorted(calls)]

    first = asyncio.run(round_of([0, 1, 2, 3, 4], warm=False))
    second = asyncio.run(round_of([3, 0, 4, 2, 1], warm=True))
    assert first == second


def test_a_seed_that_comes_again_finds_nothing_computed(engine: Any) -> None:
    """Measurements use the same seeds one after the other."""

    async def run() -> list[int | None]:
        cached = []
        for _ in range(2):
            await engine.pause()
            await engine.resume(seed=5)
            cached += [(await engine.generate(PROMPT, sample(2)))[0].cached for _ in range(2)]
        return cached

    first, second, third, fourth = asyncio.run(run())
    assert first == third == 0 and second == fourth and second, "a prompt is shared within a round alone"


def test_more_requests_than_fit_at_once_all_end(engine: Any) -> None:
    async def run() -> list[list[Generation]]:
        return await asyncio.gather(*(engine.generate(PROMPT[:i], sample(3), n=8) for i in range(1, 13)))

    assert [len(group) for group in asyncio.run(run())] == [8] * 12
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)


def test_pause_keeps_requests_and_an_update_shows_in_their_versions(engine: Any, tiny_model: Any) -> None:
    old = tiny_model
    new = type(old)(old.config).eval()
    new.load_state_dict(old.state_dict())
    change_every_parameter(new, seed=1)

    async def run() -> tuple[Generation, Generation, Generation]:
        running = asyncio.ensure_future(engine.generate(PROMPT, sample(150)))
        await engine.ping()
        await engine.pause()
        waiting = asyncio.ensure_future(engine.generate(PROMPT, sample(5)))
        await asyncio.sleep(0.05)
        assert engine.stats.running == 1
        assert engine.stats.waiting == 1
        before = engine.version
        await engine.update_weights(buckets_of(state_of(new)), before + 1)
        await engine.resume()
        during, queued = await running, await waiting
        (after,) = await engine.generate(PROMPT, sample(20))
        return during[0], queued[0], after

    start = engine.version
    during, queued, after = asyncio.run(run())
    assert sorted(set(during.versions)) == during.versions[:1] + during.versions[-1:] == [start, start + 1]
    assert during.versions == sorted(during.versions)
    # A prompt that had not begun must not meet KV of the old weights, though the same prompt is cached for them.
    for generation in (queued, after):
        assert set(generation.versions) == {start + 1}
        np.testing.assert_allclose(generation.logprobs, reference_logprobs(new, PROMPT, generation.tokens), atol=2e-5)
    asyncio.run(load(engine, old))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_version_that_comes_again_shares_no_kv_with_its_first_weights(engine: Any, tiny_model: Any, seed: int | None) -> None:
    """As after a lost learner, which goes back to an earlier version and reaches this one by another way."""
    old, new = tiny_model, type(tiny_model)(tiny_model.config).eval()
    new.load_state_dict(old.state_dict())
    change_every_parameter(new, seed=2)
    version = engine.version + 1

    async def run(model: Any) -> Generation:
        await engine.pause()
        await engine.update_weights(buckets_of(state_of(model)), version)
        await engine.resume(seed)
        (generation,) = await engine.generate(PROMPT, sample(20))
        return generation

    asyncio.run(run(new))
    generation = asyncio.run(run(old))
    assert set(generation.versions) == {version}
    np.testing.assert_allclose(generation.logprobs, reference_logprobs(old, PROMPT, generation.tokens), atol=2e-5)


def test_weights_change_only_while_paused(engine: Any) -> None:
    with pytest.raises(RuntimeError, match="paused"):
        asyncio.run(engine.transfer("start_weight_update"))


def test_abort_and_cancel_leave_a_working_engine(engine: Any) -> None:
    async def run() -> None:
        aborted = asyncio.ensure_future(engine.generate(PROMPT, sample(150), n=2))
        cancelled = asyncio.ensure_future(engine.generate(PROMPT, sample(150)))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        await engine.abort()
        with pytest.raises(RequestAborted):
            await aborted
        assert len((await engine.generate(PROMPT, sample(2)))[0].tokens) <= 2

    asyncio.run(run())
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)


def test_a_failure_of_vllm_itself_reaches_everyone_as_the_engines_end(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("a bug in vLLM")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_step", fail)
            for error in await asyncio.gather(*(engine.generate(PROMPT, sample()) for _ in range(2)), return_exceptions=True):
                assert isinstance(error, EngineBroken) and "AssertionError: a bug in vLLM" in str(error)
            for call in (engine.generate(PROMPT, sample()), engine.ping()):
                with pytest.raises(EngineBroken):
                    await call

    try:
        asyncio.run(run())
    finally:
        engine._broken = None  # for the other tests: vLLM has seen nothing of it
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)


def test_ping_answers_idle_busy_and_paused(engine: Any) -> None:
    async def run() -> None:
        await asyncio.wait_for(engine.ping(), 20)
        busy = asyncio.ensure_future(engine.generate(PROMPT, sample(60)))
        await asyncio.sleep(0.02)
        await asyncio.wait_for(engine.ping(), 20)
        await engine.pause()
        await asyncio.wait_for(engine.ping(), 20)
        await engine.resume()
        await busy

    asyncio.run(run())
