"""A world small enough to know everything of: solutions of three lines, a digit each; which digits are right is a function's to say."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.rollout.engine import Generation, Sampling
from reasoner_ray.scoring.answers import group_answers
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, StepScorerContext
from reasoner_ray.search.core import Search, SearchResult, run_search
from reasoner_ray.search.cost import Meter
from reasoner_ray.search.methods import get_method
from reasoner_ray.search.policy import StepPolicy
from tests.conftest import make_tiny_tokenizer
from tests.rollout.fakes import ScriptedEngine

TOKENIZER = make_tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
NEWLINE = TOKENIZER.encode("\n")[0]
PROMPT = [int(t) for t in TOKENIZER.encode("user: q\n")]


def digit(d: int | str) -> int:
    return int(TOKENIZER.encode(str(d))[0])


class DigitEngine(ScriptedEngine):
    """Writes lines of one digit, drawn from ``weights``; ends after ``lines`` of them. Never closes a line where ``lines`` is 0."""

    def __init__(self, weights: Sequence[float] = (0.5, 0.3, 0.2), lines: int = 3, seed: int = 0) -> None:
        super().__init__(lambda _: ([EOS], "stop"))
        self.weights, self.lines, self.random = list(weights), lines, random.Random(seed)
        self.at_once = self.most_at_once = 0

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        self.calls.append((list(prompt), sampling, n, order))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return [self._one(list(prompt), sampling) for _ in range(n)]

    def _one(self, prompt: list[int], sampling: Sampling) -> Generation:
        tokens: list[int] = []
        logprobs: list[float] = []
        reason = "length"
        while len(tokens) < sampling.max_new_tokens:
            so_far = prompt[len(PROMPT) :] + tokens
            done = so_far.count(NEWLINE)
            if len(so_far) % 2 == 0 or not self.lines:
                d = self.random.choices(range(len(self.weights)), self.weights)[0] if sampling.temperature else self.greedy
                tokens.append(digit(d))
                logprobs.append(math.log(self.weights[d] / sum(self.weights)))
            else:
                tokens.append(EOS if done == self.lines - 1 else NEWLINE)
                logprobs.append(0.0)
            if tokens[-1] == EOS or (tokens[-1] == NEWLINE and "\n" in sampling.stop):
                reason = "stop"
                break
        cached = len(prompt) // 4 * 4
        return Generation(tokens=tokens, logprobs=logprobs, versions=[3] * len(tokens), finish_reason=reason, cached=cached)  # type: ignore[arg-type]

    @property
    def greedy(self) -> int:
        return max(range(len(self.weights)), key=self.weights.__getitem__)


def read_digits(text: str) -> str:
    return text.replace("\n", "")


def job(method: str, settings: dict[str, Any] | None = None, **search: Any) -> JobConfig:
    scorer = search.pop("scorer", {"name": "function", "args": {"path": "tests.search.step_functions:right_so_far"}})
    return parse_config(
        {
            "name": "toy",
            "search": {"method": method, "settings": settings or {}, "step_tokens": 4, "scorer": scorer, **search},
        }
    )


def make(config: JobConfig, engine: Any, *, tokens: int = 16, seed: int = 0, clock: Callable[[], float] = time.perf_counter) -> Search[Any]:
    method = get_method(config.search)
    policy = StepPolicy(
        engine,
        TOKENIZER,
        sampling=Sampling(max_new_tokens=tokens, temperature=config.search.temperature),
        separator=config.search.separator,
        step_tokens=config.search.step_tokens,
        max_context=64,
    )
    context = StepScorerContext(config=config, engine=engine, tokenizer=TOKENIZER, known_logprobs=policy.known_logprobs)
    scorer = STEP_SCORERS.get(config.search.scorer.name)(context, **config.search.scorer.args)
    return Search(
        prompt=tuple(PROMPT),
        policy=policy,
        scorer=scorer,
        meter=Meter(config.search.budget, policy.cost, scorer, clock),
        config=config.search,
        options=method.settings(config.search.settings),
        read_answer=read_digits,
        group_answers=partial(group_answers, mathematical=False),
        source=np.random.default_rng(seed),
        scored=method.uses_scorer(config.search),
    )


def solve(
    method: str,
    settings: dict[str, Any] | None = None,
    *,
    engine: Any = None,
    seed: int = 0,
    tokens: int = 16,
    clock: Callable[[], float] = time.perf_counter,
    **search: Any,
) -> tuple[SearchResult, Search[Any]]:
    config = job(method, settings, **search)
    made = make(config, engine or DigitEngine(seed=seed), seed=seed, tokens=tokens, clock=clock)
    return asyncio.run(run_search(made, get_method(config.search))), made
