"""The ``search`` section of a job. What one method alone reads is in ``settings``, see ``methods.py``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reasoner_ray.section import Section
from reasoner_ray.steps import CutSetting

StepsAs = Literal["last", "min", "mean", "product"]
AnswersBy = Literal["vote", "max", "majority"]
SameAnswers = Literal["auto", "exact", "math"]


class StepScorerSpec(Section):
    """What values steps."""

    name: str = Field("likelihood", description="likelihood, function, prm, or module:class of your own")
    args: dict[str, Any] = Field(default_factory=dict)


class BudgetConfig(Section):
    """A search stops once one of these is used up and gives the best it has; what is under way is let finish. None: no limit."""

    generated: int | None = Field(None, ge=1, description="tokens sampled")
    prompt: int | None = Field(None, ge=1, description="prompt tokens computed, those in the engine's cache left out")
    scorer: int | None = Field(None, ge=1, description="tokens the scorer's model computes")
    seconds: float | None = Field(None, gt=0)


class StoppingConfig(Section):
    """Stop sampling when the belief over answers is settled (see ``stopping.py``)."""

    threshold: float = Field(0.5, ge=0, description="nats: entropy of the belief at or below which sampling stops")
    unseen: float = Field(1.0, gt=0, le=1, description="weight of the answers not seen yet, in samples")
    least: int = Field(2, ge=1, description="solutions below which it never stops")


class SearchConfig(Section):
    """`reasoner search`, and `rollout.episode: search`."""

    method: str = Field("best_of_n", description="see `reasoner search --list`, or module:function of your own")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own; each left out takes its vetted default")
    separator: CutSetting = Field(
        "\n", description="text that ends a step, or the number of tokens of each, or {before: REGEX} or {function: module:function}"
    )
    step_tokens: int = Field(64, ge=1, description="tokens within which a step must end")
    depth: int = Field(32, ge=1, description="steps a solution may have")
    temperature: float = Field(1.0, gt=0, le=2, description="of the samples of a search; rollout.temperature is that of plain rollouts")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no truncation")
    scorer: StepScorerSpec = StepScorerSpec()
    node_value: StepsAs = Field("last", description="a partial solution's value, out of its steps' scores: what guides the search")
    steps: StepsAs = Field("last", description="a whole solution's value, out of its steps' scores")
    answers: AnswersBy | None = Field(
        None, description="vote: sum of values an answer; max: the best solution's; majority: by number; None: the method's own"
    )
    read_answer: str = Field("auto", description="auto: the task's own way; or module:function of your own, text -> answer")
    same_answers: SameAnswers = Field(
        "auto", description="which answers vote together: equal texts, or equal values (1/2 and 0.5); auto: as the task's scorer judges"
    )
    right_from: float = Field(
        1.0, description="the score (of scoring.scorers, weighted) from which on an answer counts as right in figures and calibration"
    )
    budget: BudgetConfig = BudgetConfig()
    stopping: StoppingConfig | None = Field(None, description="None: all paths are sampled")
    split: Literal["held_out", "train"] = Field("held_out", description="the items `reasoner search` works on")
    items: int = Field(128, ge=1, description="the first so many of them")
    save_trees: bool = Field(False, description="write the trees of tree searches to RUN/trees/")
    save_tokens: bool = Field(
        False, description="each solution in results.jsonl has its tokens and the ends of its steps, to be learnt from"
    )
