"""Where a step's value is read: at its last token. The one convention of training, of scoring and of rewards in RL.

A trajectory's trainable token is predicted by the state of the token before it, and that state is what a value head
reads. So a step that ends one before place p marks p, and whatever token stands there, or would stand there, is marked
and never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reasoner_ray.steps import Partial
from reasoner_ray.trajectory import ENV_VERSION, Span, Trajectory


def read_at(tokens: Sequence[int], places: Sequence[int], targets: Sequence[float], *, behind: int = 0, name: str = "") -> Trajectory:
    """A trajectory whose trainable tokens stand at ``places`` and whose states there are those of the tokens before them.

    ``places`` are ascending, from 1 to ``len(tokens)`` (one past the last token of a step, ``Partial.ends``); ``targets``,
    one each, lie where rewards lie. ``behind`` is the token behind the last place, for readers of its log-prob.
    """
    length = max(places, default=0) + 1
    row = np.full(length, behind, dtype=np.int32)
    row[: length - 1] = tokens[: length - 1]
    mask, rewards = np.zeros(length, dtype=bool), np.zeros(length, dtype=np.float32)
    mask[list(places)] = True
    rewards[list(places)] = targets
    return _trajectory(row, mask, rewards, name)


def imitate(partial: Partial, *, name: str = "") -> Trajectory:
    """A trajectory that trains on every token of the solution and on none of the prompt."""
    row = np.array(partial.tokens, dtype=np.int32)
    return _trajectory(row, np.arange(len(row)) >= partial.start, np.zeros(len(row), dtype=np.float32), name)


def _trajectory(tokens: np.ndarray, mask: np.ndarray, rewards: np.ndarray, name: str) -> Trajectory:
    return Trajectory(
        id=name,
        group_id=name,
        task="supervised",
        tokens=tokens,
        loss_mask=mask,
        behaviour_logprobs=np.zeros(len(tokens), dtype=np.float32),
        policy_versions=np.full(len(tokens), ENV_VERSION, dtype=np.int32),
        rewards=rewards,
        spans=(Span(kind="model", start=0, end=len(tokens)),),
    )
