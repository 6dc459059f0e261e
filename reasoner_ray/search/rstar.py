"""rStar (arXiv 2408.06195): a tree of the policy's own steps, and a check that another go at half of a solution agrees with it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from typing import Literal

from pydantic import Field

from reasoner_ray.search.core import Search, Solution, search_method
from reasoner_ray.search.tree import Node, backup, uct_score
from reasoner_ray.section import Section


class RstarOptions(Section):
    """Settings of rStar."""

    rollouts: int = Field(16, ge=1, description="ways gone from the root to a solution")
    width: int = Field(3, ge=1, description="next steps sampled from each partial solution")
    direct: int = Field(8, ge=0, description="direct completions sampled from each, of which the most frequent answer is a child; 0: none")
    weight: float = Field(2.0, ge=0, description="of exploration in UCT")
    reward: Literal["agreement", "scorer"] = Field("agreement", description="of a solution: share of the others that agree, or its value")
    checks: int = Field(2, ge=0, description="completions that must agree with a solution; 0: no check")
    mask: tuple[float, float] = Field((0.2, 0.8), description="share of the steps that a check keeps, drawn between these")


@search_method("rstar", RstarOptions)
async def rstar(search: Search[RstarOptions]) -> None:
    """UCT over one-step thoughts and direct answers; a solution counts reward times mutual consistency.

    Two of rStar's five actions, those that need no prompts of their own. The check hides the end of a solution and has it completed;
    here by the policy itself, where the paper takes a second model. Needs no trained scorer; costs many samples.
    """
    options = search.options
    search.scored = options.reward == "scorer"
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
    """Next steps, and the direct answer that most completions give, worth the share of them."""
    steps = await search.next_steps(node, search.options.width)
    direct = [] if search.spent or not search.options.direct else await _direct_answer(search, node)
    search.adopt(node, steps + direct)


async def _direct_answer(search: Search[RstarOptions], node: Node) -> list[Node]:
    whole = [c for c in await search.policy.complete(node.partial, search.options.direct) if c.end == "solution"]
    answers = [search.read_answer(search.policy.text(c.partial)) for c in whole]
    if not any(answers):
        return []
    (answer, number), *_ = Counter(a for a in answers if a).most_common(1)
    best = max((c for c, a in zip(whole, answers, strict=True) if a == answer), key=lambda c: c.likelihood)
    return await search.attach(node, [replace(best, prior=number / len(answers))])


async def _reward(search: Search[RstarOptions], leaf: Node) -> float:
    if search.options.reward == "scorer":
        return leaf.value
    await search.group()
    mine = search.found[-1].group
    return sum(solution.group == mine for solution in search.found) / len(search.found)


async def _check(search: Search[RstarOptions]) -> None:
    """Each solution's value becomes its mean reward times the share of the checks that agree with it."""
    agreed: dict[int, float] = {}
    for solution in search.found:
        if search.options.checks and id(solution.node) not in agreed:
            agreed[id(solution.node)] = await _agreement(search, solution)
    for solution in search.found:
        solution.value = solution.node.q * agreed.get(id(solution.node), 1.0)


async def _agreement(search: Search[RstarOptions], solution: Solution) -> float:
    """Share of the completions of a solution's beginning that come to the same answer."""
    if search.spent:
        return 0.0  # what could not be checked does not count; where nothing could, all count alike
    low, high = search.options.mask
    steps = len(solution.node.partial.ends)
    kept = min(steps - 1, math.ceil(steps * float(search.source.uniform(low, high))))
    again = await search.policy.complete(solution.node.partial.until(kept), search.options.checks)
    answers = [search.read_answer(search.policy.text(c.partial)) for c in again if c.end == "solution"]
    if not answers:
        return 0.0
    groups = await asyncio.to_thread(search.group_answers, [solution.answer, *answers])
    return sum(group == groups[0] for group in groups[1:]) / len(again)
