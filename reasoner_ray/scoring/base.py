"""What a scorer is. Nothing here, nor in the scorers themselves, imports torch, Ray or vLLM: grader processes start fast."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from reasoner_ray.data.tasks import TASKS, Item
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import Registry, check_arguments

if TYPE_CHECKING:
    from reasoner_ray.config import ScoringConfig, TaskConfig

ScoreStatus = Literal["ok", "error", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score and whether it means anything: ``value`` is NaN unless ``status`` is ok, so a failure is never a silent 0."""

    value: float
    status: ScoreStatus = "ok"
    error_type: str | None = None  # name of the exception, or GraderDied, Timeout, ...
    detail: str = ""
    parts: dict[str, float] = field(default_factory=dict)  # unweighted value of each term of a weighted sum

    def __post_init__(self) -> None:
        if self.status == "ok" and not math.isfinite(self.value):
            raise ValueError(f"a score must be finite (got {self.value})")

    @classmethod
    def failed(cls, status: Literal["error", "timeout"], error_type: str, detail: str) -> Score:
        """The outcome of an answer that could not be scored."""
        return cls(value=math.nan, status=status, error_type=error_type, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a scorer judges."""

    text: str  # the policy's last turn, decoded without special tokens
    n_tokens: int = 0  # tokens the policy sampled in the whole trajectory
    truncated: bool = False  # a limit cut the answer


class AnswerScorer(ABC):
    """Judges one answer to one item. Instances live in grader processes; their keyword arguments come from the job."""

    @abstractmethod
    def score(self, answer: Answer, item: Item) -> float | Score:
        """The answer's worth, usually in [0, 1]. Whatever it raises becomes a score with status ``error``."""


ScorerFunction = Callable[..., float | Score]
"""A user's ``function(answer: str, item: Item, **args)``."""

SCORERS: Registry[type[AnswerScorer] | ScorerFunction] = Registry("scorer", "scoring.scorers.name")


def register_scorer(name: str) -> Callable[[type[AnswerScorer]], type[AnswerScorer]]:
    """Class decorator: enter a scorer under ``name`` (for ``scoring.scorers`` in a job)."""

    def enter(cls: type[AnswerScorer]) -> type[AnswerScorer]:
        SCORERS.register(name)(cls)
        return cls

    return enter


class FunctionScorer(AnswerScorer):
    """A user's plain function as a scorer."""

    def __init__(self, function: ScorerFunction, arguments: dict[str, Any]) -> None:
        self._function, self._arguments = function, arguments

    def score(self, answer: Answer, item: Item) -> float | Score:
        """What the function says of the answer's text."""
        return self._function(answer.text, item, **self._arguments)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a reward, as plain data that any process can build a scorer from."""

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


def check_terms(terms: Sequence[Term]) -> None:
    """Raises ``ConfigError`` where a scorer is unknown or does not take its arguments; builds nothing."""
    for term in terms:
        entry = SCORERS.get(term.name)
        reserved = () if isinstance(entry, type) else ("answer", "item")
        check_arguments(entry, term.args, f"scoring.scorers.{term.name}.args", reserved=reserved)


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """A job's reward: terms that judge the answer, and the weight of rewards that an environment gave during the episode."""

    terms: tuple[Term, ...]
    environment_weight: float = 1.0


def reward_terms(scoring: ScoringConfig, task: TaskConfig) -> RewardTerms:
    """The reward a job asks for, with ``task`` replaced by the task's own scorer and ``environment`` set apart.

    Rewards of an environment lie on the tokens that earned them and stay there, multiplied by the weight of the
    ``environment`` term (1 where it is not listed). Raises ``ConfigError`` where a scorer is unknown or, of the registered
    ones, does not take the values of its arguments (a user's own may be dear to build: its actor finds out).
    """
    terms, environment = [], []
    for spec in scoring.scorers:
        name = _own_scorer(task) if spec.name == "task" else spec.name
        if name == "environment":
            check_arguments(lambda: None, spec.args, "scoring.scorers.environment.args")
            environment.append(spec.weight)
        else:
            terms.append(Term(name, spec.weight, dict(spec.args)))
    check_terms(terms)
    for term in terms:
        if term.name in SCORERS.names():
            build_scorer(term)
    return RewardTerms(tuple(terms), sum(environment) if environment else 1.0)


def _own_scorer(task: TaskConfig) -> str:
    name = getattr(TASKS.get(task.name), "default_scorer", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"scoring.scorers.name: {task.name} names no scorer of its own; set scoring.scorers to one, for example exact_match"
        )
    return name


def build_scorer(term: Term) -> AnswerScorer:
    """The scorer a term names: a registered one, a class, or a function by ``module:attribute``. Raises ``ConfigError``."""
    check_terms([term])
    entry = SCORERS.get(term.name)
    if not isinstance(entry, type):
        return FunctionScorer(entry, term.args)
    try:
        return entry(**term.args)
    except (TypeError, ValueError, ArithmeticError) as error:  # a value of the wrong type, or out of range
        raise ConfigError(f"scoring.scorers.{term.name}.args: {term.args} is not taken ({type(error).__name__}: {error})") from error


class CompositeScorer:
    """The weighted sum of terms. One term that fails makes the whole score fail, naming the term."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = [(name, term.weight, build_scorer(term)) for name, term in zip(_own_names(terms), terms, strict=True)]

    def score(self, answer: Answer, item: Item) -> Score:
        """Never raises: an exception of a term is a score with status ``error``."""
        total, parts = 0.0, {}
        for name, weight, scorer in self._terms:
            score = _score_term(name, scorer, answer, item)
            if score.status != "ok":
                return score
            parts[name] = score.value
            total += weight * score.value
        return Score(value=total, parts=parts)


def _own_names(terms: Sequence[Term]) -> list[str]:
    """Each term's name; one that comes again (with other arguments) gets its number: ``format``, ``format.2``."""
    before = [sum(other.name == term.name for other in terms[:i]) for i, term in enumerate(terms)]
    return [f"{term.name}.{n + 1}" if n else term.name for term, n in zip(terms, before, strict=True)]


def _score_term(name: str, scorer: AnswerScorer, answer: Answer, item: Item) -> Score:
    try:
        result = scorer.score(answer, item)
        score = result if isinstance(result, Score) else Score(value=float(result))
    except Exception as error:  # noqa: BLE001 (a user's scorer may raise anything; here it becomes a status)
        return Score.failed("error", type(error).__name__, f"{name}: {error}"[:500])
    if score.status == "ok":
        return score
    return Score.failed(score.status, score.error_type or "Unnamed", f"{name}: {score.detail}"[:500])
