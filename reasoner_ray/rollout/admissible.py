"""Scoring every candidate of a list with the engine, so that an action is chosen from the list's own distribution.

The candidates of a list form a tree of tokens. Each inner node of it is one request for the log-probs of its few next
tokens: the prompt is in the engine's cache after the first, a node costs the tokens after the last whole block, and
the nodes of all running episodes make one batch. Episodes that meet the same state under the same weights share the
scores.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from reasoner_ray.choices import Candidates, candidate_logprobs, edge_logprobs, make_forest, make_trie

if TYPE_CHECKING:
    from reasoner_ray.rollout.engine import Engine

TOKENS_A_REQUEST = 128
"""Most next tokens that vLLM returns for one request."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A list of candidates under one policy version."""

    logprobs: np.ndarray  # float64 [C]; log pi(a|o)
    token_logprobs: tuple[tuple[float, ...], ...]  # of each candidate, one entry a token; they add up to ``logprobs``
    version: int

    def draw(self, source: np.random.Generator) -> int:
        """A candidate, sampled."""
        p = np.exp(self.logprobs)
        return int(source.choice(len(p), p=p / p.sum()))

    def best(self) -> int:
        """The likeliest candidate."""
        return int(self.logprobs.argmax())


Key = tuple[tuple[int, ...], Candidates, tuple[float, ...]]


class CandidateScorer:
    """Lists of candidates after a prompt, scored by the language model. Used from one event loop."""

    def __init__(self, engine: Engine, temperature: float = 1.0, capacity: int = 4096) -> None:
        """``capacity`` is how many lists' scores are kept, the least recently used going first."""
        self._engine = engine
        self._temperature = temperature
        self._capacity = capacity
        self._known: OrderedDict[Key, asyncio.Task[Scored]] = OrderedDict()
        self._loads = engine.loads

    async def score(self, prompt: Sequence[int], candidates: Candidates, divisors: Sequence[float]) -> Scored:
        """The distribution over ``candidates`` (token ids of each), whose summed log-probs are divided by ``divisors``.

        Raises ``ValueError`` where a list cannot be chosen from or a candidate leaves the context, ``RequestAborted``
        where the engine dropped its requests.
        """
        if self._engine.loads != self._loads:
            self._known.clear()
            self._loads = self._engine.loads
        key = (tuple(prompt), candidates, tuple(divisors))
        task = self._known.get(key)
        if task is None:
            task = self._known[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return await asyncio.shield(task)

    def _forget_failure(self, key: Key, task: asyncio.Task[Scored]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._known.get(key) is task:
            del self._known[key]

    async def _ask(self, key: Key) -> Scored:
        prompt, candidates, divisors = key
        trie, version = make_trie(candidates), self._engine.version
        raw = torch.tensor(await self.token_logprobs(prompt, candidates), dtype=torch.float64)
        forest, _ = make_forest([(candidates, divisors)])
        edges = edge_logprobs(raw, forest).tolist()
        return Scored(
            logprobs=candidate_logprobs(raw, forest).numpy(),
            token_logprobs=tuple(tuple(edges[e] for e in path) for path in trie.paths),
            version=version,
        )

    async def token_logprobs(self, prompt: Sequence[int], candidates: Candidates) -> list[float]:
        """The language model's log p(w^j | prompt, w^{<j}), candidate by candidate, token by token; nothing is remembered."""
        nodes: dict[tuple[int, ...], dict[int, None]] = {}
        for candidate in candidates:
            for j, token in enumerate(candidate):
                nodes.setdefault(candidate[:j], {})[token] = None
        found = await asyncio.gather(*(self._next([*prompt, *prefix], list(tokens)) for prefix, tokens in nodes.items()))
        known = dict(zip(nodes, found, strict=True))
        return [known[candidate[:j]][token] for candidate in candidates for j, token in enumerate(candidate)]

    async def _next(self, prompt: list[int], tokens: list[int]) -> dict[int, float]:
        parts = [tokens[i : i + TOKENS_A_REQUEST] for i in range(0, len(tokens), TOKENS_A_REQUEST)]
        found = await asyncio.gather(*(self._engine.next_logprobs(prompt, part, self._temperature) for part in parts))
        return {token: value for part, values in zip(parts, found, strict=True) for token, value in zip(part, values, strict=True)}
