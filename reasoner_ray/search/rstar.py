"""rStar (arXiv 2408.06195): a tree of five human-like actions, and a check that another go at half of a solution agrees with it.

A prompt is not an instruction in a context of its own: it is the beginning of a step, which the policy then goes on writing. So a
node is a partial solution as in every other search, and a model that pays no heed to a prompt has written a step all the same.

    action            what is added                                           allowed after
    step         A1   the next thought                                        all but a sub-question
    rest         A2   the remaining thoughts; of several the likeliest of     all but a sub-question
                      those that give the most frequent answer
    subquestion  A3   a sub-question, whose ``answer`` is a child of it       the question, its rephrasing, an answer
    again        A4   another answer to the sub-question, by another prompt   a sub-question
    rephrase     A5   the question in other words                             the question
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from reasoner_ray.actor_calls import together
from reasoner_ray.search.core import Search, Solution, search_method
from reasoner_ray.search.tree import Node, backup, uct_score
from reasoner_ray.section import Section
from reasoner_ray.tokens import continuation

Action = Literal["step", "rest", "subquestion", "again", "rephrase"]
_THINK: tuple[str, ...] = ("step", "rest")
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "": (*_THINK, "subquestion", "rephrase"),  # the question itself
    "rephrase": (*_THINK, "subquestion"),
    "step": _THINK,
    "subquestion": ("answer", "again"),
    "answer": (*_THINK, "subquestion"),
    "again": (*_THINK, "subquestion"),
}


class RstarPrompts(Section):
    """How the steps of each action begin; an empty text leaves the beginning to the policy. Each stands on a line of its own."""

    step: str = ""
    rest: str = ""
    subquestion: str = "Sub-question:"
    answer: str = "Answer to the sub-question:"
    again: str = "The sub-question answered anew, step by step:"
    rephrase: str = "The question in other words:"


class RstarOptions(Section):
    """Settings of rStar."""

    rollouts: int = Field(16, ge=1, description="ways gone from the root to a solution")
    actions: tuple[Action, ...] = Field(
        ("step", "rest", "subquestion", "again", "rephrase"), description="those of the five that are taken; see the prompts"
    )
    prompts: RstarPrompts = RstarPrompts()
    width: int = Field(3, ge=1, description="step: next steps sampled from each partial solution")
    direct: int = Field(8, ge=0, description="rest: completions sampled, of which the most frequent answer is a child; 0: none")
    subquestions: int = Field(3, ge=1, description="subquestion: sampled at once")
    again: int = Field(1, ge=1, description="again: answers beside the first one to each sub-question")
    rephrased: int = Field(1, ge=1, description="rephrase: wordings of the question")
    weight: float = Field(2.0, ge=0, description="of exploration in UCT")
    reward: Literal["agreement", "scorer"] = Field("agreement", description="of a solution: share of the answers that agree, or its value")
    checks: int = Field(2, ge=0, description="completions that must agree with a solution; 0: no check")
    mask: tuple[float, float] = Field((0.2, 0.8), description="share of the steps that a check keeps, drawn between these")

    @field_validator("actions")
    @classmethod
    def _leads_to_an_end(cls, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        if not {"step", "rest"} & {*actions}:
            raise ValueError("no action ends a solution: take step or rest as well")
        if "again" in actions and "subquestion" not in actions:
            raise ValueError("again answers a sub-question anew: take subquestion as well")
        return actions

    def width_of(self, action: str) -> int:
        """How many nodes (of ``rest``: samples) an action makes at once."""
        widths = {"step": self.width, "rest": self.direct, "subquestion": self.subquestions, "answer": 1}
        return widths.get(action, self.again if action == "again" else self.rephrased)


@search_method("rstar", RstarOptions, scored=lambda options: options.reward == "scorer")
async def rstar(search: Search[RstarOptions]) -> None:
    """UCT over five actions (thoughts, sub-questions, rephrasing); a solution counts reward times mutual consistency.

    The check hides the end of a solution and has it completed; here by the policy itself, where the paper takes a second model.
    Needs no trained scorer; costs many samples. ``actions: [step, rest]`` needs no prompts, for policies that know one form alone.
    """
    options = search.options
    for _ in range(options.rollouts):
        if search.root.dead or not search.wants_more(options.rollouts):
            break
        leaf = await _descend(search)
        if leaf.terminal:
            await search.add(leaf)
            backup(leaf, await _reward(search, leaf))
    await _check(search)


async def _descend(search: Search[RstarOptions]) -> Node:
    node, options = search.root, search.options
    while not node.terminal and not search.spent:
        if node.children is None:
            await _expand(search, node)
        if node.dead:
            break
        fresh = [child for child in node.open_children if not child.visits]
        if fresh:
            node = fresh[int(search.source.integers(len(fresh)))]
        else:
            parent = node
            node = max(parent.open_children, key=lambda child: uct_score(parent, child, options.weight))
    return node


async def _expand(search: Search[RstarOptions], node: Node) -> None:
    """A child or more for each action that may follow; without any the node is dead."""
    taken = {*search.options.actions, "answer"}
    found = await together(_take(search, node, action) for action in _FOLLOWS[node.action] if action in taken)
    search.adopt(node, [child for children in found for child in children])


async def _take(search: Search[RstarOptions], node: Node, action: str) -> Sequence[Node]:
    """The nodes that an action leads to."""
    width, lead = search.options.width_of(action), _lead(search, node, action)
    if action == "rest":
        return await _direct_answer(search, node, width, lead) if width else []
    if node.depth >= search.config.depth:
        return []
    steps = await search.policy.steps(node.partial, width, lead=lead)
    if action in ("subquestion", "rephrase"):  # they answer nothing, so they end no solution
        steps = [step for step in map(search.policy.reopened, steps) if step is not None]
    return await search.attach(node, steps, action)


def _lead(search: Search[RstarOptions], node: Node, action: str) -> list[int]:
    """Token ids of an action's prompt, on a new line."""
    prompt = getattr(search.options.prompts, action)
    if not prompt:
        return []
    tokenizer = search.policy.tokenizer
    before = str(tokenizer.decode(list(node.partial.tokens[-4:]), skip_special_tokens=True))
    text = prompt if not before or before.endswith("\n") else f"\n{prompt}"
    return list(continuation(tokenizer, text))


async def _direct_answer(search: Search[RstarOptions], node: Node, samples: int, lead: list[int]) -> list[Node]:
    """The likeliest of the completions that give the most frequent answer; without a scorer its value is their share of all."""
    whole = [c for c in await search.policy.complete(node.partial, samples, lead=lead) if c.end == "solution"]
    answers = {i: answer for i, c in enumerate(whole) if (answer := search.read_answer(search.policy.text(c.partial)))}
    if not answers:
        return []
    groups = dict(zip(answers, await asyncio.to_thread(search.group_answers, list(answers.values())), strict=True))
    (group, number), *_ = Counter(groups.values()).most_common(1)
    best = max((whole[i] for i, g in groups.items() if g == group), key=lambda c: c.likelihood)
    share = number / len(whole)
    nodes = await search.attach(node, [replace(best, prior=share)], "rest")
    if not search.scored:
        nodes[0].value = share
    return nodes


async def _reward(search: Search[RstarOptions], leaf: Node) -> float:
    """Of the solution found last: 0 where no answer can be read."""
    mine = search.found[-1]
    if not mine.answer:
        return 0.0
    if search.options.reward == "scorer":
        return leaf.value
    await search.group()
    answered = [solution for solution in search.found if solution.answer]
    return sum(solution.group == mine.group for solution in answered) / len(answered)


async def _check(search: Search[RstarOptions]) -> None:
    """Each solution's value becomes its mean reward times the share of the checks that agree with it.

    Its reward alone where there are no checks, or the budget was used up before the first.
    """
    agreed: dict[int, float] = {}
    checks = search.options.checks if not search.spent else 0
    for solution in search.found:
        if checks and id(solution.node) not in agreed:
            agreed[id(solution.node)] = await _agreement(search, solution)
    for solution in search.found:
        solution.value = solution.node.q * agreed.get(id(solution.node), 1.0)


async def _agreement(search: Search[RstarOptions], solution: Solution) -> float:
    """Share of the completions of a solution's beginning that come to the same answer; 0 where it has none."""
    if search.spent or not solution.answer:
        return 0.0  # beside those that were checked, what could not be does not count
    low, high = search.options.mask
    steps = len(solution.node.partial.ends)
    kept = min(steps - 1, math.ceil(steps * float(search.source.uniform(low, high))))
    again = await search.policy.complete(solution.node.partial.until(kept), search.options.checks)
    read = [search.read_answer(search.policy.text(c.partial)) for c in again if c.end == "solution"]
    answers = [answer for answer in read if answer]
    if not answers:
        return 0.0
    groups = await asyncio.to_thread(search.group_answers, [solution.answer, *answers])
    return sum(group == groups[0] for group in groups[1:]) / len(again)
