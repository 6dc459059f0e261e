"""The ``labels`` section of a job (`reasoner label`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reasoner_ray.section import Section
from reasoner_ray.steps import CutSetting


class OmegaConfig(Section):
    """OmegaPRM (arXiv:2406.06592); the symbols are the paper's."""

    alpha: float = Field(0.5, gt=0, le=1, description="weight of a state's MC value: alpha^(1 - MC), high where a usually good state erred")
    beta: float = Field(0.9, gt=0, le=1, description="weight of a rollout's length: beta^(length / length_scale)")
    length_scale: int = Field(500, ge=1, description="L, tokens")
    c_puct: float = Field(0.125, ge=0, description="how much states that were seldom chosen are preferred")
    searches: int = Field(20, ge=1, description="rollouts of a question whose first error is looked for")
    estimates: int | None = Field(100, ge=1, description="Monte Carlo estimates a question may take; null: no limit")
    keep_right: int = Field(4, ge=0, description="right solutions a question that are kept beside those searched")


class LabelConfig(Section):
    """`reasoner label`: process labels for the training questions."""

    method: Literal["math_shepherd", "omega_prm"] = Field("omega_prm", description="math_shepherd estimates every step, omega_prm searches")
    separator: CutSetting = Field(
        "\n", description="text that ends a step, or the number of tokens of each, or {before: REGEX} or {function: module:function}"
    )
    completions: int = Field(8, ge=1, description="K: completions an estimate")
    solutions: int = Field(4, ge=1, description="math_shepherd: solutions of a question that are labelled")
    omega: OmegaConfig = OmegaConfig()
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no truncation")
    right_from: float = Field(1.0, description="the score (of scoring.scorers) from which on an answer counts as right")
    target: Literal["soft", "hard"] = Field(
        "soft", description="what `labels` of a record holds: the share of right completions, or 1 where any was right and 0 elsewhere"
    )
    split: Literal["train", "held_out"] = Field("train", description="the items to label")
    items: int | None = Field(None, ge=1, description="the first so many of them; null: all")
    format: Literal["jsonl", "parquet"] = Field("jsonl", description="of RUN/labels.*, one record a solution")
