"""What labelling leaves: solutions with a label a step, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from reasoner_ray.steps import Partial

Target = Literal["soft", "hard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSolution:
    """A solution of T closed steps. Raises ``ValueError`` where the number of labels is not that of the steps."""

    partial: Partial
    soft: tuple[float | None, ...]  # [T], share of right completions after each step; None: not estimated
    hard: tuple[bool | None, ...]  # [T], whether any completion was right; None: not known
    right: bool | None  # of the final answer; None for a solution that a limit cut

    def __post_init__(self) -> None:
        if not len(self.soft) == len(self.hard) == len(self.partial.ends):
            raise ValueError(f"{len(self.soft)} soft and {len(self.hard)} hard labels for {len(self.partial.ends)} steps")

    @property
    def first_error(self) -> int | None:
        """The first step (from 0) whose hard label is false; None where there is none."""
        return next((i for i, label in enumerate(self.hard) if label is False), None)

    def as_record(self, target: Target, steps: Sequence[str]) -> dict[str, Any]:
        """Plain data, readable as a record of ``kind: prm`` and ``kind: value``; ``steps`` are the texts."""
        labels = self.soft if target == "soft" else tuple(None if label is None else float(label) for label in self.hard)
        return {
            "tokens": list(self.partial.tokens),
            "start": self.partial.start,
            "ends": list(self.partial.ends),
            "steps": list(steps),
            "labels": list(labels),
            "soft": list(self.soft),
            "hard": list(self.hard),
            "first_error": self.first_error,
            "right": self.right,
            "reward": None if self.right is None else float(self.right),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionLabels:
    """What one question gave."""

    status: Literal["labelled", "all right", "all wrong", "nothing closed", "not graded"]
    solutions: tuple[LabelledSolution, ...]
    estimates: int  # states that were estimated
    cut: int = 0  # solutions, out of which labelled ones were to be made, that a limit of tokens cut
    graded: int = 0
    grader_failures: int = 0
    states: tuple[dict[str, Any], ...] = field(default=())  # omega_prm: each state's ``steps``, ``tokens``, ``mc`` and ``visits``
