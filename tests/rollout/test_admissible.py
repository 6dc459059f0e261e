"""Lists of candidates scored by a real engine: the numbers of the model itself, each computed once."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from reasoner_ray.rollout.admissible import CandidateScorer
from reasoner_ray.rollout.engine import RequestAborted
from reasoner_ray.rollout.stepping import SteppingEngine
from tests.engines import change_every_parameter, load, reference_logprobs
from tests.rollout.fakes import ScriptedEngine

PROMPT = list(range(20, 57))
CANDIDATES = ((5, 6, 7), (5, 8), (5,), (9, 10, 11, 12))
WORDS = (3.0, 2.0, 1.0, 2.0)


def expected(model: Any, prompt: list[int], temperature: float = 1.0) -> np.ndarray:
    """log pi(a|o) of every candidate, each by a forward pass of its own."""
    scores = [float(reference_logprobs(model, prompt, list(c), temperature).sum()) / n for c, n in zip(CANDIDATES, WORDS, strict=True)]
    return np.array(scores) - np.log(np.exp(scores).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_models_own(engine: SteppingEngine, tiny_model: Any, temperature: float) -> None:
    prompts = [PROMPT, PROMPT[:20], [*PROMPT, 3, 4]]

    async def run() -> list[Any]:
        scorer = CandidateScorer(engine, temperature)
        return await asyncio.gather(*(scorer.score(prompt, CANDIDATES, WORDS) for prompt in prompts))

    for prompt, scored in zip(prompts, asyncio.run(run()), strict=True):
        assert scored.logprobs == pytest.approx(expected(tiny_model, prompt, temperature), abs=1e-4)
        assert [sum(tokens) for tokens in scored.token_logprobs] == pytest.approx(scored.logprobs.tolist(), abs=1e-9)


def test_new_weights_give_new_scores(engine: SteppingEngine, tiny_model: Any) -> None:
    old = copy.deepcopy(tiny_model)
    change_every_parameter(tiny_model, seed=5)

    async def run() -> tuple[Any, Any]:
        scorer = CandidateScorer(engine)
        before = await scorer.score(PROMPT, CANDIDATES, WORDS)
        await load(engine, tiny_model)
        after = await scorer.score(PROMPT, CANDIDATES, WORDS)
        await load(engine, old)  # for the other tests
        return before, after

    before, after = asyncio.run(run())
    assert after.version == before.version + 1
    assert after.logprobs == pytest.approx(expected(tiny_model, PROMPT), abs=1e-4)
    assert np.abs(after.logprobs - before.logprobs).max() > 1e-3


class CountingEngine(ScriptedEngine):
    """Scores by formula, counting requests."""

    def __init__(self) -> None:
        super().__init__(lambda tokens: ([1], "stop"))
        self.asked: list[list[int]] = []
        self.broken = False

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        self.asked.append(list(prompt))
        await asyncio.sleep(0)
        if self.broken:
            raise RequestAborted("the engine dropped its requests")
        return [-float(t % 5 + 1) for t in tokens]


def test_equal_states_are_asked_for_once_and_by_node() -> None:
    engine = CountingEngine()

    async def run() -> None:
        scorer = CandidateScorer(engine)
        first = await asyncio.gather(*(scorer.score([1, 2], CANDIDATES, WORDS) for _ in range(50)))
        assert all(scored is first[0] for scored in first)

    asyncio.run(run())
    assert sorted(engine.asked) == sorted([[1, 2], [1, 2, 5], [1, 2, 5, 6], [1, 2, 9], [1, 2, 9, 10], [1, 2, 9, 10, 11]])


def test_scores_are_of_the_weights_even_where_a_version_comes_again() -> None:
    engine = CountingEngine()

    async def run() -> None:
        scorer = CandidateScorer(engine)
        await scorer.score([1], ((5,),), (1.0,))
        await scorer.score([1], ((5,),), (1.0,))
        assert len(engine.asked) == 1
        await engine.set_version(engine.version)
        await scorer.score([1], ((5,),), (1.0,))
        assert len(engine.asked) == 2

    asyncio.run(run())


def test_a_failure_is_not_remembered_and_memory_is_bounded() -> None:
    engine = CountingEngine()

    async def run() -> None:
        scorer = CandidateScorer(engine, capacity=3)
        engine.broken = True
        with pytest.raises(RequestAborted):
            await scorer.score([1], CANDIDATES, WORDS)
        engine.broken = False
        assert (await scorer.score([1], CANDIDATES, WORDS)).version == engine.version
        for i in range(20):
            await scorer.score([i], CANDIDATES, WORDS)
        assert len(scorer._known) == 3

    asyncio.run(run())


def test_a_cancelled_episode_does_not_take_the_scores_from_the_others() -> None:
    engine = CountingEngine()

    async def run() -> None:
        scorer = CandidateScorer(engine)
        one = asyncio.create_task(scorer.score([1], CANDIDATES, WORDS))
        other = asyncio.create_task(scorer.score([1], CANDIDATES, WORDS))
        await asyncio.sleep(0)
        one.cancel()
        assert (await other).best() in range(4)

    asyncio.run(run())


def test_draws_follow_the_distribution() -> None:
    async def run() -> Any:
        return await CandidateScorer(CountingEngine()).score([1], CANDIDATES, WORDS)

    scored = asyncio.run(run())
    source = np.random.default_rng(0)
    counts = np.bincount([scored.draw(source) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx(np.exp(scored.logprobs), abs=0.03)
    assert scored.best() == int(scored.logprobs.argmax())
