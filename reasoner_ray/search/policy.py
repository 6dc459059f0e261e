"""The policy as a search sees it: next steps and whole continuations of partial solutions, sampled by the engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from reasoner_ray.search.cost import Cost
from reasoner_ray.steps import Cut, Partial, decode_piece, only_special, segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.rollout.engine import Engine, Generation, Sampling

End = Literal["step", "solution", "cut"]
"""A step was closed; the policy ended its solution; a limit of tokens cut it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """L tokens that the policy added to a partial solution."""

    partial: Partial  # the solution with them
    lead: tuple[int, ...] = ()  # what was written for the policy before them; also in ``partial``
    tokens: tuple[int, ...]  # [L]
    logprobs: tuple[float, ...]  # [L], nats, of the distribution sampled from
    versions: tuple[int, ...]  # [L], policy version that sampled each token
    end: End
    prior: float = 1.0  # exp of the mean log-prob, as a share among the steps kept beside it

    @property
    def likelihood(self) -> float:
        """exp of the mean log-prob of a token."""
        return math.exp(fmean(self.logprobs))


class StepPolicy:
    """Samples next steps and whole continuations. Used by one search; counts into its ``cost``."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling,
        separator: Cut,
        step_tokens: int,
        max_context: int,
        cost: Cost | None = None,
        order: str = "",
        on_request: Callable[[], None] = lambda: None,
        remembers: bool = True,
    ) -> None:
        """``sampling`` is of a whole solution: the tokens it may have, and the strings that end it.

        A step ends with ``separator`` (see ``steps.segment``); one that has not within ``step_tokens`` is cut. Where a function
        cuts the text, so many tokens are sampled, and those behind the step's end are discarded. ``order`` is the order of its
        requests in the engine, ``on_request`` is called before each. ``remembers``: whether the likelihoods of steps are wanted.
        """
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.separator = separator
        self.cost = cost if cost is not None else Cost()
        self.known_logprobs: dict[tuple[int, ...], float] = {}  # see StepScorerContext
        self._remembers = remembers
        self._engine, self._order, self._on_request = engine, order, on_request
        self._step_tokens = separator if isinstance(separator, int) else step_tokens
        self._max_context = max_context

    async def steps(self, partial: Partial, n: int, *, lead: Sequence[int] = (), temperature: float | None = None) -> list[Continuation]:
        """Up to ``n`` next steps, different from each other, likeliest first, with priors that add up to 1.

        Each begins with the tokens ``lead``, which the policy finds written. Steps that a limit cut are left out and counted
        (``cost.cut``), so there may be none.
        """
        stop = (self.separator,) if isinstance(self.separator, str) else ()
        room = min(self._step_tokens, self._room(partial) - len(lead))
        generations = await self._sample((*partial.tokens, *lead), n, room, stop, temperature)
        kept: dict[tuple[int, ...], Continuation] = {}
        for generation in generations:
            step = self._as_step(partial, tuple(lead), generation)
            if step.end == "cut" or step.tokens in kept:
                self.cost.discarded += len(step.tokens)
                self.cost.cut += step.end == "cut"
                continue
            kept[step.tokens] = step
            self._remember(partial, step, temperature)
        total = sum(step.likelihood for step in kept.values())
        steps = [replace(step, prior=step.likelihood / total) for step in kept.values()]
        return sorted(steps, key=lambda step: -step.prior)

    async def complete(self, partial: Partial, n: int, *, lead: Sequence[int] = (), temperature: float | None = None) -> list[Continuation]:
        """``n`` whole continuations; one whose ``end`` is ``cut`` did not come to an end within the limit, and is counted."""
        found, begin = [], len(partial.tokens) + len(lead)
        for generation in await self._sample((*partial.tokens, *lead), n, self._room(partial) - len(lead), (), temperature):
            tokens = (*partial.tokens, *lead, *generation.tokens)
            joined = bool(partial.ends) and not lead and only_special(generation.tokens, self.tokenizer)
            before = partial.ends[:-1] if joined else partial.ends
            whole = Partial(tokens, (*before, *self._new_ends(tokens, partial.start, begin)), partial.start)
            cut = generation.finish_reason == "length"
            self.cost.cut += cut
            found.append(_continuation(whole, tuple(lead), generation, "cut" if cut else "solution"))
            self._remember(partial, found[-1], temperature)
        return found

    def reopened(self, step: Continuation) -> Continuation | None:
        """A step that ends its solution without the end-of-text that does, so that more can follow; None where that is not possible."""
        if step.end != "solution":
            return step
        kept = len(step.tokens)
        while kept and only_special(step.tokens[kept - 1 : kept], self.tokenizer):
            kept -= 1
        dropped = len(step.tokens) - kept
        if not kept or not dropped:  # nothing was said, or a text ended it, which would end all that follows
            return None
        self.cost.discarded += dropped
        tokens = step.partial.tokens[:-dropped]
        partial = Partial(tokens, (*step.partial.ends[:-1], len(tokens)), step.partial.start)
        return replace(
            step, partial=partial, tokens=step.tokens[:kept], logprobs=step.logprobs[:kept], versions=step.versions[:kept], end="step"
        )

    def text(self, partial: Partial) -> str:
        """The solution's text, special tokens left out, as scorers of answers read it."""
        return str(self.tokenizer.decode(list(partial.solution), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _room(self, partial: Partial) -> int:
        """Tokens that the solution may still grow by."""
        return min(self.sampling.max_new_tokens - len(partial.solution), self._max_context - len(partial.tokens))

    def _new_ends(self, tokens: tuple[int, ...], start: int, begin: int) -> list[int]:
        """Where the steps of the solution ``tokens[start:]`` end that were written from ``begin`` on; a structure sees the whole text."""
        if callable(self.separator):
            return [end for end in segment(tokens, self.tokenizer, self.separator, start) if end > begin]
        return segment(tokens, self.tokenizer, self.separator, begin)

    async def _sample(
        self, prompt: tuple[int, ...], n: int, limit: int, stop: tuple[str, ...], temperature: float | None
    ) -> Sequence[Generation]:
        if limit < 1:  # as if the sequences had been cut at once
            self.cost.cut += n
            return []
        sampling = replace(self.sampling, max_new_tokens=limit, stop=(*stop, *self.sampling.stop))
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        self._on_request()
        # A request each: vLLM makes the same of n sequences, but then does not tell what each found in the cache.
        answers = await asyncio.gather(*(self._engine.generate(prompt, sampling, order=self._order) for _ in range(n)))
        generations = [generation for answer in answers for generation in answer]
        for generation in generations:
            self.cost.requests += 1
            self.cost.generated += len(generation.tokens)
            self.cost.prompt += len(prompt)
            self.cost.prompt_cached += generation.cached or 0
        return generations

    def _as_step(self, partial: Partial, lead: tuple[int, ...], generation: Generation) -> Continuation:
        generation, end = self._first_step(partial.start, (*partial.tokens, *lead), generation)
        joined = bool(partial.ends) and not lead and only_special(generation.tokens, self.tokenizer)
        return _continuation(partial.then((*lead, *generation.tokens), joined=joined), lead, generation, end)

    def _first_step(self, start: int, before: tuple[int, ...], generation: Generation) -> tuple[Generation, End]:
        """What of a generation is the next step, and how that ends: by a structure it may end before all that was sampled."""
        tokens = (*before, *generation.tokens)
        if callable(self.separator):
            kept = min(self._new_ends(tokens, start, len(before)), default=len(tokens)) - len(before)
            if kept < len(generation.tokens):
                self.cost.discarded += len(generation.tokens) - kept
                return _shortened(generation, kept), "step"
        if generation.finish_reason == "length":
            return generation, "step" if len(generation.tokens) == self.separator else "cut"
        if only_special(tokens[-1:], self.tokenizer) or self._is_stopped(tokens, start, len(before)):
            return generation, "solution"
        closed = isinstance(self.separator, str) and self.separator in decode_piece(self.tokenizer, tokens, len(before), len(tokens))
        return generation, "step" if closed else "solution"

    def _is_stopped(self, tokens: tuple[int, ...], start: int, begin: int) -> bool:
        """Whether a stop string ends in what was written from ``begin`` on; what the search wrote before may hold one."""
        if not self.sampling.stop:
            return False
        known, solution = (decode_piece(self.tokenizer, tokens, start, end) for end in (begin, len(tokens)))
        return any(solution.find(stop, max(0, len(known) - len(stop) + 1)) >= 0 for stop in self.sampling.stop)

    def _remember(self, before: Partial, after: Continuation, temperature: float | None) -> None:
        """Keep what the likelihood of each new step is, where the sampling distribution is the model's own."""
        sampling = self.sampling if temperature is None else replace(self.sampling, temperature=temperature)
        if not self._remembers or sampling.temperature not in (0.0, 1.0) or sampling.top_p < 1 or sampling.top_k or sampling.min_p:
            return
        if after.lead:  # nobody knows the log-probs of what was written for the policy
            return
        start = len(before.tokens)
        for end, step in zip(after.partial.ends, after.partial.steps, strict=True):
            new = after.logprobs[max(end - len(step) - start, 0) : max(end - start, 0)]
            old = len(step) - len(new)  # of a step made longer by an end-of-text token
            if new and (not old or before.tokens in self.known_logprobs):
                known = self.known_logprobs[before.tokens] * old if old else 0.0
                self.known_logprobs[after.partial.tokens[:end]] = (known + sum(new)) / len(step)


def _shortened(generation: Generation, kept: int) -> Generation:
    """Its first ``kept`` tokens."""
    return replace(generation, tokens=generation.tokens[:kept], logprobs=generation.logprobs[:kept], versions=generation.versions[:kept])


def _continuation(partial: Partial, lead: tuple[int, ...], generation: Generation, end: End) -> Continuation:
    return Continuation(
        partial=partial,
        lead=lead,
        tokens=tuple(generation.tokens),
        logprobs=tuple(generation.logprobs),
        versions=tuple(generation.versions),
        end=end,
    )
