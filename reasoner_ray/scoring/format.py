"""Form rather than content: patterns, boxes, tags, length."""

from __future__ import annotations

import re

from reasoner_ray.data.math import last_boxed
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import suggest
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer

STYLES = {
    "think": re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\S\s*", re.DOTALL),
    "answer": re.compile(r"(?:(?!</?answer>).)*<answer>(?:(?!</?answer>).)*\S\s*</answer>\s*", re.DOTALL),
}


@register_scorer("format")
class Format(AnswerScorer):
    """1 where the whole answer has the wanted form.

    ``style``: ``boxed`` (a non-empty ``\\boxed{}``), ``think`` (one ``<think>`` block, then the answer), ``answer`` (ends with
    one ``<answer>`` block); or ``pattern``, a regular expression that must match the whole text (``.`` matches new lines).
    """

    def __init__(self, *, style: str | None = None, pattern: str | None = None) -> None:
        if (style is None) == (pattern is None):
            raise ConfigError("scoring.scorers.format.args: give either style or pattern")
        if style is not None and style != "boxed" and style not in STYLES:
            raise ConfigError(f"scoring.scorers.format.args.style: unknown {style!r}; {suggest(style, ['boxed', *STYLES])}")
        self._pattern = None if style == "boxed" else STYLES[style] if style is not None else _compiled(pattern or "")

    def score(self, answer: Answer, item: Item) -> float:
        """1.0 or 0.0."""
        if self._pattern is None:
            return float(bool(last_boxed(answer.text)))
        return float(self._pattern.fullmatch(answer.text) is not None)


@register_scorer("overlong")
class Overlong(AnswerScorer):
    """Soft penalty of long answers (DAPO, arXiv:2503.14476, eq. 13), in [-1, 0].

    0 up to ``limit - margin`` sampled tokens, falling linearly to -1 at ``limit``.
    """

    def __init__(self, *, limit: int, margin: int) -> None:
        if not 0 < margin <= limit:
            raise ConfigError(f"scoring.scorers.overlong.args.margin: must be in 1..limit={limit} (got {margin})")
        self._limit, self._margin = limit, margin

    def score(self, answer: Answer, item: Item) -> float:
        """Penalty for ``answer.n_tokens``."""
        return -min(1.0, max(0.0, (answer.n_tokens - self._limit + self._margin) / self._margin))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"scoring.scorers.format.args.pattern: not a regular expression ({error})") from error
