"""An engine without a model, for tests of what stands around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from reasoner_ray.rollout.engine import EngineStats, Generation, Sampling


class ScriptedEngine:
    """Answers each prompt by ``answer(tokens) -> (tokens, finish_reason)``; log-prob of token t is -t/100."""

    def __init__(self, answer: Callable[[Sequence[int]], tuple[list[int], Any]]) -> None:
        self.answer = answer
        self.version = 3
        self.loads = 0
        self.calls: list[tuple[list[int], Sampling, int, str]] = []
        self.scored: list[list[int]] = []
        self.running = asyncio.Event()
        self.running.set()
        self.stats = EngineStats()

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        self.calls.append((list(prompt), sampling, n, order))
        await self.running.wait()
        generations = []
        for _ in range(n):
            tokens, reason = self.answer(prompt)
            generations.append(
                Generation(tokens=tokens, logprobs=[-t / 100 for t in tokens], versions=[self.version] * len(tokens), finish_reason=reason)
            )
        return generations

    async def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
        return [0.0] * (len(tokens) - 1)

    async def next_logprobs(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        self.scored.append(list(prompt))
        return [-(token % 7) / 2 / temperature for token in tokens]

    async def ping(self) -> None: ...

    async def abort(self) -> None: ...

    async def pause(self) -> None:
        self.running.clear()

    async def resume(self, seed: int | None = None) -> None:
        self.running.set()

    async def update_weights(self, buckets: AsyncIterator[Any], version: int) -> None:
        await self.set_version(version)

    async def transfer(self, method: str, info: dict[str, Any] | None = None) -> None: ...

    async def set_version(self, version: int) -> None:
        self.version = version
        self.loads += 1

    def shutdown(self) -> None: ...
