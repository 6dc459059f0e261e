"""Scorers of steps: how good is each step of a partial solution? What guides a search and labels a process.

A scorer gives one value a step, read at the step's last token, higher for better. Which scorers there are: ``STEP_SCORERS``.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from reasoner_ray.child_process import ChildDied
from reasoner_ray.errors import ConfigError, ScorerGaveUp, ScoringError
from reasoner_ray.registry import Registry
from reasoner_ray.scoring.calls import CallRaised, failure_name
from reasoner_ray.scoring.step_function import function_pool
from reasoner_ray.steps import Partial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import JobConfig
    from reasoner_ray.rollout.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScorerContext:
    """What a scorer may use. The item's answer is not among it: a search never sees the truth."""

    config: JobConfig
    engine: Engine  # the policy's, of the worker the search runs in
    tokenizer: PreTrainedTokenizerBase
    known_logprobs: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Mean log-prob (nats, temperature 1) of the last step of a solution, by all its tokens, for steps the policy sampled here."""


class StepScorer(Protocol):
    """Values of the steps of partial solutions. One object serves one search (a tree), so ``tokens`` is what that search cost."""

    tokens: int
    """Tokens that a model computed for scores so far; 0 for a scorer without a model. What a cache held does not count."""

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """One value a step: entry i has ``len(partials[i].ends)`` finite values."""
        ...


StepScorerFactory = Callable[..., StepScorer]
"""``factory(context, **args)``, called once for each search in the worker's process: what is heavy it must share between calls."""

STEP_SCORERS: Registry[StepScorerFactory] = Registry("step scorer", "search.scorer.name")
register_step_scorer = STEP_SCORERS.register


async def score_steps(scorer: StepScorer, partials: Sequence[Partial]) -> list[list[float]]:
    """The scorer's values, checked: raises ``ScoringError`` where their number is not that of the steps, or one is not finite."""
    if not partials:
        return []
    scores = await scorer.score(partials)
    if len(scores) != len(partials):
        raise ScoringError(f"the step scorer {_name(scorer)} answered {len(partials)} solutions with {len(scores)} lists of scores")
    for partial, values in zip(partials, scores, strict=True):
        if len(values) != len(partial.ends):
            raise ScoringError(
                f"the step scorer {_name(scorer)} gave {len(values)} scores for a solution of {len(partial.ends)} steps; "
                "a scorer must give one score a step (is its separator the one of the search?)"
            )
        if not all(map(math.isfinite, values)):
            raise ScoringError(f"the step scorer {_name(scorer)} gave a score that is not finite: {values}")
    return scores


def _name(scorer: StepScorer) -> str:
    return str(getattr(scorer, "name", type(scorer).__name__))


@register_step_scorer("likelihood")
class Likelihood:
    """The policy's own opinion: exp of the mean log-prob of a step's tokens, in (0, 1].

    Steps that the policy sampled at temperature 1 were scored while they were sampled; others are computed by the engine.
    """

    name = "likelihood"

    def __init__(self, context: StepScorerContext) -> None:
        self._engine, self._known = context.engine, context.known_logprobs
        self.tokens = 0

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """See ``StepScorer.score``."""
        means = await asyncio.gather(*(self._means(partial) for partial in partials))
        return [[math.exp(value) for value in values] for values in means]

    async def _means(self, partial: Partial) -> list[float]:
        keys = [partial.tokens[:end] for end in partial.ends]
        if not all(key in self._known for key in keys):
            logprobs = await self._engine.prompt_logprobs(partial.tokens)  # entry t - 1 is of token t
            self.tokens += len(partial.tokens)
            for key, step in zip(keys, partial.steps, strict=True):
                self._known.setdefault(key, fmean(logprobs[len(key) - len(step) - 1 : len(key) - 1]))
        return [self._known[key] for key in keys]


@register_step_scorer("function")
class FunctionStepScorer:
    """One's own function: ``path: module:function``, called as ``function(prompt, steps, **args)`` with texts, one score a step back.

    Special tokens are left out of the texts. It runs in ``processes`` of its own beside the search, which all searches of a worker
    share; a call that takes longer than ``timeout_s`` is killed, and that solution has no score.
    """

    def __init__(
        self, context: StepScorerContext, *, path: str, args: dict[str, Any] | None = None, timeout_s: float = 10.0, processes: int = 1
    ) -> None:
        """Raises ``ConfigError`` for a time or a number of processes that cannot be; a wrong ``path`` shows with ``start``."""
        if timeout_s <= 0 or processes < 1:
            raise ConfigError(f"search.scorer.args: timeout_s must be above 0 and processes at least 1 (got {timeout_s}, {processes})")
        self._pool = function_pool(path, json.dumps(args or {}, sort_keys=True), processes, timeout_s)
        self._decode = context.tokenizer.decode
        self.name = path
        self.tokens = 0

    async def start(self) -> None:
        """Find out whether the function is there. Raises ``ReasonerError``."""
        await asyncio.wrap_future(self._pool.submit(None))

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """See ``StepScorer.score``. Raises ``ScoringError`` where the function raises, ``ScorerGaveUp`` where it hangs or dies."""
        calls = [asyncio.wrap_future(self._pool.submit(self._texts(partial))) for partial in partials]
        try:
            return await asyncio.gather(*calls)
        except CallRaised as error:
            raise ScoringError(f"the step scorer {self.name} raised {error}") from error
        except (TimeoutError, ChildDied) as error:
            raise ScorerGaveUp(f"the step scorer {self.name}: {failure_name(error)}: {error}", failure_name(error)) from error

    def _texts(self, partial: Partial) -> tuple[str, list[str]]:
        prompt, *steps = (str(self._decode(list(t), skip_special_tokens=True)) for t in (partial.prompt, *partial.steps))
        return prompt, steps
