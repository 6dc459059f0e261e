"""A policy without a model whose errors are known: what labels are measured against."""

from __future__ import annotations

import random
from collections.abc import Sequence

from reasoner_ray.search.cost import Cost
from reasoner_ray.search.policy import Continuation
from reasoner_ray.steps import Partial

PROMPT = (1, 2, 3)
RIGHT, WRONG, END = 1, 2, 0
"""The first token of a step says whether it errs; the rest are random, so that no two solutions are the same by chance."""


class PlantedPolicy:
    """Writes solutions of ``steps`` steps of ``step_tokens`` tokens; each step errs with probability ``error``.

    After an error the answer is never right again. With ``cut_after`` solutions are cut after so many tokens.
    """

    def __init__(self, *, steps: int, error: float, seed: int = 0, step_tokens: int = 4, cut_after: int | None = None) -> None:
        self.n_steps, self.error, self.step_tokens, self.cut_after = steps, error, step_tokens, cut_after
        self.cost = Cost()
        self.calls: list[tuple[tuple[int, ...], int]] = []
        self._source = random.Random(seed)

    async def complete(self, partial: Partial, n: int) -> Sequence[Continuation]:
        self.calls.append((partial.tokens, n))
        return [self._continue(partial) for _ in range(n)]

    def _continue(self, partial: Partial) -> Continuation:
        written, ends, cut = list(partial.tokens), list(partial.ends), False
        while len(ends) < self.n_steps and not cut:
            kind = WRONG if self._source.random() < self.error else RIGHT
            written += [kind, *self._source.choices(range(10, 10**6), k=self.step_tokens - 2), END]
            ends.append(len(written))
            cut = self.cut_after is not None and len(written) - partial.start >= self.cut_after
        whole = Partial(tuple(written), tuple(ends), partial.start)
        tokens = whole.tokens[len(partial.tokens) :]
        self.cost.generated += len(tokens)
        self.cost.requests += 1
        self.cost.cut += cut
        zeros = (0.0,) * len(tokens)
        return Continuation(partial=whole, tokens=tokens, logprobs=zeros, versions=(0,) * len(tokens), end="cut" if cut else "solution")


def true_first_error(partial: Partial) -> int | None:
    """The step, from 0, that was planted wrong first."""
    return next((i for i, step in enumerate(partial.steps) if step[0] == WRONG), None)


async def grade(partial: Partial, cut: bool) -> bool:
    """Right where no step errs and the solution came to its end."""
    return not cut and true_first_error(partial) is None


def root() -> Partial:
    return Partial.root(PROMPT)
