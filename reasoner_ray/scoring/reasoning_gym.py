"""The verifier that each reasoning-gym data set brings along."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from reasoner_ray.data.reasoning_gym import make_dataset
from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import suggest
from reasoner_ray.scoring.answers import tagged_answer
from reasoner_ray.scoring.base import Answer, AnswerScorer, register_scorer

EXTRACTIONS = ("tag", "last_line", "all")


@register_scorer("reasoning_gym")
class ReasoningGymScorer(AnswerScorer):
    """The data set's own score of the extracted answer, in [0, 1] (many sets give part marks).

    ``extract``: the last ``<answer>`` block (``tag``), the ``last_line``, or ``all`` of the text, trimmed.
    """

    def __init__(self, *, extract: str = "tag") -> None:
        if extract not in EXTRACTIONS:
            raise ConfigError(f"scoring.scorers.reasoning_gym.args.extract: unknown {extract!r}; {suggest(extract, list(EXTRACTIONS))}")
        self._extract = extract

    def score(self, answer: Answer, item: Item) -> float:
        """0 where no answer can be extracted; an item of another task is an error (``KeyError``)."""
        text = extract_answer(answer.text, self._extract)
        if text is None:
            return 0.0
        verifier = _verifier(item.info["dataset"], json.dumps(item.info["config"], sort_keys=True))
        return float(verifier.score_answer(text, item.info["entry"]))


def extract_answer(text: str, how: str = "tag") -> str | None:
    """What of ``text`` is judged, by one of ``EXTRACTIONS``; None where there is nothing."""
    if how == "tag":
        return tagged_answer(text)
    lines = text.strip().splitlines() if how == "last_line" else [text]
    return lines[-1].strip() if lines else None


@lru_cache(maxsize=64)
def _verifier(dataset: str, config: str) -> Any:
    return make_dataset(dataset, json.loads(config), seed=0, size=1)
