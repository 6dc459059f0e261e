"""Scored solutions for a policy that is told what to earn, and for one that learns the best alone (kind sft).

Return-conditioned fine-tuning is the Decision Transformer of language: a control text that says how good a solution is stands before
its prompt (after a token that begins a text), and the policy that samples is told the best there is (``task.control``). Learning the
best share alone is its honest baseline (%BC).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reasoner_ray.data.tasks import with_control
from reasoner_ray.errors import DataError
from reasoner_ray.prm.examples import Example
from reasoner_ray.steps import Partial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.prm.settings import ConditionConfig


def bucket_of(reward: float, above: Sequence[float]) -> int:
    """How many of the rising thresholds ``above`` a reward exceeds."""
    return bisect_left(above, reward)


def control_text(bucket: int, condition: ConditionConfig) -> str:
    """What stands before a prompt; the best bucket is ``len(condition.above)``."""
    return condition.text.format(bucket=bucket, top=len(condition.above))


def conditioned(examples: Sequence[Example], condition: ConditionConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The same solutions, each behind the control text of its reward, which belongs to the prompt. Raises ``DataError``."""
    found = []
    for example in examples:
        partial, control = example.partial, control_text(bucket_of(_reward(example), condition.above), condition)
        tokens = tuple(with_control(partial.tokens, control, tokenizer))
        n = len(tokens) - len(partial.tokens)
        told = Partial(tokens, tuple(end + n for end in partial.ends), partial.start + n)
        found.append(replace(example, partial=told))
    return found


def best_control(condition: ConditionConfig) -> str:
    """What a policy taught so is to be told."""
    return control_text(len(condition.above), condition)


def best_examples(examples: Sequence[Example], share: float) -> list[Example]:
    """The ``share`` of the solutions with the highest rewards, rounded up, in their order. Raises ``DataError``."""
    wanted = math.ceil(share * len(examples))
    ranked = sorted(range(len(examples)), key=lambda i: (-_reward(examples[i]), i))
    return [examples[i] for i in sorted(ranked[:wanted])]


def _reward(example: Example) -> float:
    if example.reward is None:
        raise DataError(f"{example.where}: no `reward`, which supervised.condition and supervised.keep_top go by")
    return example.reward
