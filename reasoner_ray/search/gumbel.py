"""Gumbel root sampling with sequential halving (Danihelka et al. 2022; for language models ReSCALE, arXiv 2603.21162)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from reasoner_ray.search.core import Search, search_method
from reasoner_ray.search.mcts import simulate, step_by_step
from reasoner_ray.search.tree import Node
from reasoner_ray.section import Section


class GumbelOptions(Section):
    """Settings of the Gumbel search."""

    paths: int = Field(1, ge=1, description="solutions, each with its own noise")
    width: int = Field(8, ge=1, description="steps sampled from each partial solution")
    considered: int = Field(8, ge=1, description="of them, how many are compared before a step is chosen")
    simulations: int = Field(24, ge=1, description="before each step is chosen")
    c_visit: float = Field(50.0, gt=0, description="how far values count before there are visits")
    c_scale: float = Field(0.1, gt=0, description="weight of values against priors")


@search_method("gumbel", GumbelOptions)
async def gumbel(search: Search[GumbelOptions]) -> None:
    """Each step is chosen among children drawn without replacement, of which every round of simulations keeps the better half.

    Spends its simulations where the choice is still open, and improves on the policy in expectation, whatever their number: where
    PUCT with Dirichlet noise gets worse with a larger budget, this one does not (ReSCALE).
    """
    await step_by_step(search, search.options.paths, lambda node: _move(search, node))


async def _move(search: Search[GumbelOptions], node: Node) -> Node | None:
    """The child that survives the halving; None where there is none."""
    options = search.options
    if node.children is None:
        await search.expand(node, options.width)
    children = node.open_children
    noise = {id(child): float(g) for child, g in zip(children, search.source.gumbel(size=len(children)), strict=True)}

    def rank(child: Node) -> float:
        return noise[id(child)] + math.log(child.prior) + sigma(node, child, options)

    left = sorted(children, key=lambda child: -(noise[id(child)] + math.log(child.prior)))[: options.considered]
    for visits in halving_visits(len(left), options.simulations):
        for _ in range(visits):
            for child in left:
                if not child.dead and not search.spent:
                    await simulate(search, child, options.width, lambda n: interior(n, options))
        left = sorted((child for child in left if not child.dead), key=lambda child: -rank(child))[: math.ceil(len(left) / 2)]
    # All that were compared may have turned out to lead nowhere, and others not.
    return max([child for child in left if not child.dead] or node.open_children, key=rank, default=None)


def halving_visits(candidates: int, simulations: int) -> list[int]:
    """Visits of each candidate that is left, round by round: about as many simulations a round, at least one visit each."""
    rounds = math.ceil(math.log2(candidates)) if candidates > 1 else 0
    visits = []
    for i in range(rounds):
        left = math.ceil(candidates / 2**i)
        visits.append(max(1, simulations // ((rounds - i) * left)))
        simulations -= left * visits[-1]
    return visits


def sigma(node: Node, child: Node, options: GumbelOptions) -> float:
    """(c_visit + max_b N(b)) * c_scale * q, with q the child's value between the lowest and highest of its siblings."""
    siblings: Sequence[Node] = node.children or []
    low, high = min(s.q for s in siblings), max(s.q for s in siblings)
    scaled = (child.q - low) / (high - low) if high > low else 0.0
    return (options.c_visit + max(s.visits for s in siblings)) * options.c_scale * scaled


def interior(node: Node, options: GumbelOptions) -> Node:
    """Below the root: argmax of pi'(a) - N(a) / (1 + sum N), with pi' = softmax(ln P + sigma(q)), so visits follow pi'."""
    children = node.open_children
    logits = np.array([math.log(child.prior) + sigma(node, child, options) for child in children])
    improved = np.exp(logits - logits.max())
    improved /= improved.sum()
    visits = np.array([child.visits for child in children])
    return children[int(np.argmax(improved - visits / (1 + visits.sum())))]
