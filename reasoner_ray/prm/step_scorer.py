"""The step scorers ``prm`` (a process reward or value model in actors of its own) and ``judge`` (the policy's own engine is asked)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from reasoner_ray.errors import ConfigError
from reasoner_ray.prm.texts import JUDGE_PROMPT, judge_context, read_pattern, single_token, texts_of
from reasoner_ray.scoring.step_scorers import StepScorerContext, register_step_scorer

if TYPE_CHECKING:
    from reasoner_ray.prm.pool import Format
    from reasoner_ray.steps import Partial


@register_step_scorer("prm")
class PrmStepScorer:
    """Scores of a process reward model, a value model, or a judge, loaded once in Ray actors that the whole job shares.

    ``model`` is a folder that ``kind: prm`` or ``kind: value`` wrote, a checkpoint of Qwen2.5-Math-PRM's format, Math-Shepherd's
    (``peiyi9979/math-shepherd-mistral-7b-prm``), or with ``format`` math_shepherd or judge another model; ``question`` is the
    regular expression that finds the question in the policy's prompt, for models that read text; ``yes`` and ``no`` are a judge's
    verdicts. An answer may take ``timeout_s``, the wait for others' included. See ``StepModelSpec``.
    """

    name = "prm"

    def __init__(
        self,
        context: StepScorerContext,
        *,
        model: str,
        format: Format = "auto",
        question: str | None = None,
        yes: str = "Yes",
        no: str = "No",
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        tokens_per_microbatch: int = 8192,
        kept_tokens: int = 16_384,
        workers: int = 1,
        cpus: float = 0.0,
        gpus: float | None = None,
        threads: int | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        from reasoner_ray.prm.pool import StepModelSpec, shared_pool

        spec = StepModelSpec(
            model=model,
            policy=context.config.model.path,
            format=format,
            question=question,
            yes=yes,
            no=no,
            dtype=dtype,
            tokens_per_microbatch=tokens_per_microbatch,
            kept_tokens=kept_tokens,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            threads=threads,
        )
        if not (isinstance(timeout_s, int | float) and timeout_s > 0):
            raise ConfigError(f"the step model's args.timeout_s must be above 0 (got {timeout_s!r})")
        self._timeout = timeout_s
        self._pool = shared_pool(spec)
        self.tokens = 0

    async def start(self) -> None:
        """Start the actors and wait until they are ready. Raises ``ReasonerError``."""
        await self._pool.start()

    async def forget(self) -> None:
        """Let the actors forget all that they scored. Not while others score."""
        await self._pool.forget()

    async def stop(self) -> None:
        """End the actors."""
        await self._pool.stop()

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """See ``StepScorer.score``."""
        scores, tokens = await self._pool.score(partials, self._timeout)
        self.tokens += tokens
        return scores


@register_step_scorer("judge")
class JudgeStepScorer:
    """The policy as its own judge: in a chat it is asked whether a step is correct, and the score is p(Yes) / (p(Yes) + p(No))."""

    name = "judge"

    def __init__(
        self,
        context: StepScorerContext,
        *,
        yes: str = "Yes",
        no: str = "No",
        question: str | None = None,
        instruction: str = JUDGE_PROMPT,
    ) -> None:
        """Raises ``ModelError`` where an answer is not one token, ``ScoringError`` for a broken pattern."""
        self._engine, self._tokenizer = context.engine, context.tokenizer
        self._answers = [single_token(self._tokenizer, text, context.config.model.path) for text in (yes, no)]
        self._pattern, self._instruction = read_pattern(question), instruction
        self._known: dict[Partial, float] = {}  # by what is asked about: where steps end is part of it
        self.tokens = 0

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        """See ``StepScorer.score``."""
        wanted = [[partial.until(i + 1) for i in range(len(partial.ends))] for partial in partials]
        new = dict.fromkeys(part for each in wanted for part in each if part not in self._known)
        values = await asyncio.gather(*map(self._ask, new))
        self._known.update(zip(new, values, strict=True))
        return [[self._known[part] for part in each] for each in wanted]

    async def _ask(self, partial: Partial) -> float:
        asked = judge_context(self._tokenizer, *texts_of(partial, self._tokenizer, self._pattern), self._instruction)
        self.tokens += len(asked)
        yes, no = await self._engine.next_logprobs(asked, self._answers)
        return 1 / (1 + math.exp(min(no - yes, 700.0)))
