"""A generative judge: the chat model itself is taught to say whether a step is right, asked as the judge that scores is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reasoner_ray.prm.readings import read_at
from reasoner_ray.prm.texts import judge_context, read_pattern, single_token, texts_of
from reasoner_ray.registry import check_arguments
from reasoner_ray.trajectory import Span, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.prm.settings import SupervisedConfig
    from reasoner_ray.steps import Partial


@dataclass(frozen=True, slots=True)
class Asked:
    """A solution as a judge is asked about it."""

    contexts: tuple[tuple[int, ...], ...]  # one a step: the chat up to where the verdict begins
    answers: tuple[int, int]  # the tokens of the verdicts: right, wrong

    @property
    def longest(self) -> int:
        """Tokens of the longest context with its verdict."""
        return max(map(len, self.contexts)) + 1

    def trajectory(self, steps: Sequence[int], targets: Sequence[float], *, name: str = "") -> Trajectory:
        """Both verdicts on each of ``steps``, the right one first, with ``targets`` p and 1 - p where rewards lie.

        Every verdict has a context of its own; packing computes what they share once.
        """
        rows = [
            read_at(self.contexts[step], [len(self.contexts[step])], [weight], behind=answer)
            for step, p in zip(steps, targets, strict=True)
            for answer, weight in zip(self.answers, (p, 1 - p), strict=True)
        ]
        starts = np.cumsum([0, *(len(row.tokens) for row in rows)]).tolist()
        streams = ("tokens", "loss_mask", "behaviour_logprobs", "policy_versions", "rewards")
        return Trajectory(
            id=name,
            group_id=name,
            task="supervised",
            **{stream: np.concatenate([getattr(row, stream) for row in rows]) for stream in streams},
            spans=tuple(Span(kind="model", start=a, end=b, context_start=a, turn=i) for i, (a, b) in enumerate(pairwise(starts))),
        )


class Asker:
    """Asks about solutions as ``JudgeModel`` does under the same ``supervised.scorer``."""

    def __init__(self, settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, name: str = "the model") -> None:
        """Raises ``ModelError`` where a verdict is not one token, ``ScoringError`` for a broken pattern, ``ConfigError``."""
        from reasoner_ray.prm.pool import StepModelSpec

        check_arguments(StepModelSpec, settings.scorer, "supervised.scorer", reserved=("model", "policy"))
        spec = StepModelSpec(model=name, policy=name, **judge_args(settings))
        self._answers = (single_token(tokenizer, spec.yes, name), single_token(tokenizer, spec.no, name))
        self._tokenizer, self._pattern = tokenizer, read_pattern(spec.question)

    def ask(self, partial: Partial) -> Asked:
        """The contexts of all steps. Raises ``ScoringError`` without a chat template, or where the pattern finds no question."""
        question, steps = texts_of(partial, self._tokenizer, self._pattern)
        contexts = (judge_context(self._tokenizer, question, steps[: i + 1]) for i in range(len(steps)))
        return Asked(tuple(map(tuple, contexts)), self._answers)


def judge_args(settings: SupervisedConfig) -> dict[str, Any]:
    """Arguments of the step scorer that asks the model of ``settings``: a judge is not known by its folder."""
    return {**settings.scorer, "format": "judge"}


def verdict_logits(said: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of "this step is right" and its labels, [steps] each, from log-probs and targets [2 steps] in ``Asked.trajectory``'s order."""
    yes, no = said.view(-1, 2).unbind(1)
    return yes - no, targets.view(-1, 2)[:, 0]
