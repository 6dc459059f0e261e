"""One search: what a method works with, what it leaves behind, and how an answer is made of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from reasoner_ray.errors import ConfigError, ScorerGaveUp
from reasoner_ray.registry import Registry, suggest
from reasoner_ray.scoring.step_scorers import StepScorer, score_steps
from reasoner_ray.search.aggregate import Choice, choose_answer, solution_value
from reasoner_ray.search.answers import GroupAnswers, ReadAnswer
from reasoner_ray.search.cost import Cost, Meter, Resource
from reasoner_ray.search.policy import Continuation, StepPolicy
from reasoner_ray.search.settings import AnswersBy, SearchConfig
from reasoner_ray.search.stopping import is_settled
from reasoner_ray.search.tree import Node
from reasoner_ray.section import Section
from reasoner_ray.steps import Partial

if TYPE_CHECKING:
    import numpy as np

Ended = Literal["done", "settled", "failed"] | Resource
"""The method came to its end, the belief over answers was settled, the scorer gave a solution up, or a budget was used up."""
S = TypeVar("S", bound=Section)


@dataclass(slots=True, eq=False)
class Solution:
    """A whole solution that a search found; the same node may be found several times."""

    node: Node
    text: str
    answer: str  # '' where none could be read
    value: float  # of the whole solution; without a scorer exp of its mean log-prob
    group: int = 0  # which answers are the same


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found and what it cost."""

    solutions: tuple[Solution, ...]
    choice: Choice | None  # None: no solution came to its end
    unfinished: Node | None  # the best that there is where no solution came to its end
    cost: Cost
    ended: Ended
    root: Node
    failure: ScorerGaveUp | None = None  # why there is no choice where the search failed
    cut_samples: tuple[tuple[int, int], ...] = ()  # see ``Search``

    @property
    def chosen(self) -> Node | None:
        """The chosen solution, else the best unfinished one, else None."""
        return self.solutions[self.choice.index].node if self.choice is not None else self.unfinished

    @property
    def answer(self) -> str:
        """The chosen answer, '' where there is none."""
        return self.solutions[self.choice.index].answer if self.choice is not None else ""

    @property
    def confidence(self) -> float:
        """The chosen answer's share of the votes; 0 without a solution."""
        return self.choice.confidence if self.choice is not None else 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class Search(Generic[S]):
    """A search under way. It sees a prompt, never an item: the right answer is not within its reach."""

    prompt: tuple[int, ...]
    policy: StepPolicy
    scorer: StepScorer
    meter: Meter
    config: SearchConfig
    options: S  # the method's own settings
    read_answer: ReadAnswer
    group_answers: GroupAnswers
    source: np.random.Generator
    scored: bool = True  # whether the method reads the scorer's values
    found: list[Solution] = field(default_factory=list)
    cut_samples: list[tuple[int, int]] = field(default_factory=list)  # whole samples that a limit cut: place among all, tokens
    root: Node = field(init=False)
    _settled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.root = Node(Partial.root(self.prompt))

    @property
    def spent(self) -> bool:
        """Whether a budget is used up."""
        return self.meter.spent is not None

    def wants_more(self, solutions: int) -> bool:
        """Whether to look for more: fewer than ``solutions`` found, budget left, and the belief over answers not settled."""
        return len(self.found) < solutions and not self.spent and not self._settled

    @property
    def ended(self) -> Ended:
        """Why the method stopped."""
        return "settled" if self._settled else self.meter.spent or "done"

    async def expand(self, node: Node, width: int) -> list[Node]:
        """Sample and score the next steps of ``node``; its new children, none where it cannot go on (it is then dead)."""
        return self.adopt(node, await self.next_steps(node, width))

    async def next_steps(self, node: Node, width: int) -> list[Node]:
        """Scored next steps of ``node``, not yet its children; none at the greatest depth, or where no step came to an end."""
        steps = await self.policy.steps(node.partial, width) if node.depth < self.config.depth else []
        return await self.attach(node, steps)

    async def attach(self, parent: Node, steps: Sequence[Continuation], action: str = "") -> list[Node]:
        """Scored nodes below ``parent``, in order, not yet its children. What a limit cut is not scored."""
        whole = [step for step in steps if step.end != "cut"] if self.scored else []
        scores = dict(zip(map(id, whole), await score_steps(self.scorer, [step.partial for step in whole]), strict=True))
        return [self._node(parent, step, scores.get(id(step), []), action) for step in steps]

    def _node(self, parent: Node, step: Continuation, scores: Sequence[float], action: str) -> Node:
        return Node(
            step.partial,
            prior=step.prior,
            value=solution_value(scores, self.config.node_value) if scores else 0.0,
            scores=tuple(scores),
            given=len(step.lead),
            logprobs=step.logprobs,
            versions=step.versions,
            action=action,
            terminal=step.end == "solution",
            parent=parent,
        )

    def adopt(self, node: Node, children: list[Node]) -> list[Node]:
        """Make nodes the children of ``node``; without any it is dead."""
        node.children = children
        if not children:
            node.close()
        return children

    async def sample(self, n: int, *, temperature: float | None = None) -> None:
        """``n`` whole solutions from the prompt, as children of the root; those that a limit cut are no solutions."""
        nodes = await self.attach(self.root, await self.policy.complete(self.root.partial, n, temperature=temperature))
        before = self.root.children or []
        self.cut_samples += [(len(before) + i, len(node.own_tokens)) for i, node in enumerate(nodes) if not node.terminal]
        self.root.children = [*before, *nodes]
        await self.add(*(node for node in nodes if node.terminal))

    async def add(self, *nodes: Node) -> None:
        """Note solutions, and whether the belief over answers is settled with them."""
        for node in nodes:
            text = self.policy.text(node.partial)
            value = solution_value(node.scores, self.config.steps) if node.scores else path_likelihood(node)
            self.found.append(Solution(node, text, self.read_answer(text), value))
        if nodes and self.config.stopping is not None:
            await self.group()
            self._settled = is_settled([s.group for s in self.found if s.answer], self.config.stopping)

    async def group(self) -> None:
        """Say of all solutions which give the same answer. In a thread, for comparing formulas takes its time."""
        groups = await asyncio.to_thread(self.group_answers, [solution.answer for solution in self.found])
        for solution, group in zip(self.found, groups, strict=True):
            solution.group = group


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to search: fills ``search.found``. What it is, when to use it and its source: the function's docstring."""

    name: str
    run: Callable[[Search[Any]], Awaitable[None]]
    options: type[Section]
    answers: AnswersBy  # how it makes an answer of its solutions, unless ``search.answers`` says otherwise
    scored: bool | Callable[[Any], bool]  # whether its way depends on the step scorer; a function of its settings where that decides

    def uses_scorer(self, config: SearchConfig) -> bool:
        """Whether steps are scored: to guide the search, or because the answer is to be chosen by values.

        A method whose settings decide has values of its own for its solutions where they say no.
        """
        if callable(self.scored):
            return self.scored(self.settings(config.settings))
        return self.scored or config.answers in ("vote", "max")

    def settings(self, raw: dict[str, Any]) -> Section:
        """Validated settings; raises ``ConfigError`` with the key's path and a suggestion."""
        try:
            return self.options.model_validate(raw)
        except ValidationError as error:
            raise ConfigError("\n".join(self._explain(e["type"], e["loc"], e["msg"], e["input"]) for e in error.errors())) from None

    def _explain(self, kind: str, location: tuple[int | str, ...], message: str, given: Any) -> str:
        key = ".".join(map(str, location))
        if kind == "extra_forbidden":
            return f"search.settings.{key}: unknown setting of {self.name}; {suggest(key, list(self.options.model_fields))}"
        return f"search.settings.{key}: {message} (got {given!r})"


SEARCHES: Registry[Method] = Registry("search method", "search.method")
Run = Callable[[Search[Any]], Awaitable[None]]


def search_method(
    name: str, options: type[Section], *, answers: AnswersBy = "vote", scored: bool | Callable[[Any], bool] = True
) -> Callable[[Run], Method]:
    """Decorator: enter ``async def method(search)`` under ``name``; its settings are ``search.options``."""

    def enter(run: Run) -> Method:
        return SEARCHES.register(name)(Method(name=name, run=run, options=options, answers=answers, scored=scored))

    return enter


async def run_search(search: Search[Any], method: Method) -> SearchResult:
    """Search, and choose an answer. Raises ``ScoringError`` where the scorer's values do not fit, ``RequestAborted`` from the engine.

    A search whose scorer gave a solution up is a result with a ``failure``: without its value the others' mean nothing. Where it
    ends with nothing found (a budget, a way that closed), the solutions that its tree holds are found then, the most valuable first.
    """
    try:
        await method.run(search)
    except ScorerGaveUp as error:
        cost, found = search.meter.cost, tuple(search.found)
        return SearchResult(solutions=found, choice=None, unfinished=None, cost=cost, ended="failed", root=search.root, failure=error)
    ended, choice = search.ended, None
    if not search.found:
        await search.add(*sorted((node for node in search.root.walk() if node.terminal), key=lambda node: -node.value))
    if search.found:
        await search.group()
        choice = choose_answer(
            [s.group for s in search.found],
            [s.value for s in search.found],
            search.config.answers or method.answers,
            [bool(s.answer) for s in search.found],
        )
    return SearchResult(
        solutions=tuple(search.found),
        choice=choice,
        unfinished=None if search.found else _best_unfinished(search.root),
        cost=search.meter.cost,
        ended=ended,
        cut_samples=tuple(search.cut_samples),
        # A method may begin with new trees; the chosen solution's is the one to look at.
        root=search.found[choice.index].node.path[0] if choice is not None else search.root,
    )


def path_likelihood(node: Node) -> float:
    """exp of the mean log-prob of all tokens of a solution."""
    return math.exp(fmean([logprob for step in node.path for logprob in step.logprobs]))


def _best_unfinished(root: Node) -> Node | None:
    """The most valuable way that was gone, the longest where several are worth the same; None where no step was ever made."""
    nodes = [node for node in root.walk() if node is not root]
    return max(nodes, key=lambda node: (node.value, len(node.partial.ends)), default=None)
