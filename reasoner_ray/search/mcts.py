"""Monte Carlo tree search over steps: whole paths, MCTS-alpha, MCTS-Rollout (TS-LLM, arXiv 2309.17179).

Simulations of one tree follow each other, since each looks at what the last one found; trees run side by side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import Field

from reasoner_ray.search.core import Search, search_method
from reasoner_ray.search.tree import Node, backup, clear_statistics, puct
from reasoner_ray.section import Section


class MctsOptions(Section):
    """Settings of path-wise MCTS."""

    paths: int = Field(4, ge=1, description="ways gone from the root to a solution, each a vote")
    width: int = Field(4, ge=1, description="steps sampled from each partial solution")
    c_init: float = Field(1.25, ge=0, description="weight of the prior in PUCT")


class CotScTreeOptions(Section):
    """Settings of self-consistency in a tree."""

    paths: int = Field(8, ge=1, description="ways drawn from the root to a solution")
    width: int = Field(4, ge=1, description="steps sampled from each partial solution")


class AlphaOptions(Section):
    """Settings of MCTS-alpha."""

    paths: int = Field(1, ge=1, description="solutions")
    width: int = Field(6, ge=1, description="steps sampled from each partial solution")
    simulations: int = Field(10, ge=1, description="before each step is chosen")
    c_init: float = Field(3.0, ge=0, description="weight of the prior in PUCT")
    sample_moves: bool = Field(
        False, description="draw steps by their visits, with noise on the priors, instead of taking the most visited"
    )
    move_temperature: float = Field(1.0, gt=0, description="of that draw: probabilities are visits to the power of 1 / temperature")
    noise: float = Field(0.25, ge=0, le=1, description="share of Dirichlet noise in the priors where steps are drawn")
    noise_alpha: float = Field(0.3, gt=0, description="its concentration")
    new_tree: bool = Field(False, description="begin each further solution with a new tree; false: same tree, its statistics cleared")


class RolloutOptions(Section):
    """Settings of MCTS-Rollout."""

    paths: int = Field(8, ge=1, description="solutions reached after which it stops; reaching one again counts again")
    width: int = Field(6, ge=1, description="steps sampled from each partial solution")
    simulations: int = Field(64, ge=1, description="at most")
    c_init: float = Field(3.0, ge=0, description="weight of the prior in PUCT")


@search_method("mcts", MctsOptions)
async def mcts(search: Search[MctsOptions]) -> None:
    """Ways from the root to a solution by PUCT, each backed up before the next (OpenR's MCTS, TS-LLM's RAP-like one).

    Every node met is expanded, so the first way is greedy in the value; later ones weigh values, priors and visits.
    """
    await _go_paths(search, search.options.paths, search.options.width, lambda node: puct(node, search.options.c_init))


@search_method("cot_sc_tree", CotScTreeOptions, answers="majority", scored=False)
async def cot_sc_tree(search: Search[CotScTreeOptions]) -> None:
    """Self-consistency over a shared tree: children are drawn by their priors alone (TS-LLM's CoT-SC-Tree)."""

    def draw(node: Node) -> Node:
        children = node.open_children
        total = sum(child.prior for child in children)
        return children[int(search.source.choice(len(children), p=[child.prior / total for child in children]))]

    await _go_paths(search, search.options.paths, search.options.width, draw)


async def _go_paths(search: Search[MctsOptions] | Search[CotScTreeOptions], paths: int, width: int, select: Callable[[Node], Node]) -> None:
    while not search.root.dead and search.wants_more(paths):
        node = search.root
        while not node.terminal and not search.spent:
            if node.children is None:
                await search.expand(node, width)
            if node.dead:  # this way is closed; the next one avoids it
                break
            node = select(node)
        if node.terminal:
            backup(node, node.value)
            await search.add(node)


async def simulate(search: Search[Any], start: Node, width: int, select: Callable[[Node], Node]) -> Node | None:
    """Descend from ``start`` to a leaf and back its value up; the leaf, or None where the way turned out to be closed.

    Steps are sampled late, for they are what costs: a leaf is expanded when it is reached a second time, and the value that then
    goes back is that of the child chosen first.
    """
    node = start
    while node.children:
        node = select(node)
    if node.visits and not node.terminal:
        if not await search.expand(node, width):
            return None
        node = select(node)
    backup(node, node.value)
    return node


@search_method("mcts_alpha", AlphaOptions)
async def mcts_alpha(search: Search[AlphaOptions]) -> None:
    """Before each step ``simulations`` simulations, then the most visited child, for good (AlphaZero; TS-LLM's MCTS-alpha).

    The subtree is kept. For deep trees; it cannot go back on a step.
    """
    await step_by_step(search, search.options.paths, lambda node: _move(search, node), new_tree=search.options.new_tree)


async def step_by_step(search: Search[Any], paths: int, move: Callable[[Node], Awaitable[Node | None]], *, new_tree: bool = False) -> None:
    """``paths`` solutions, each made of steps that ``move`` chooses for good (None where there is none to choose).

    Each further solution begins with the same tree, its statistics cleared, or with a new one.
    """
    for number in range(paths):
        if not search.wants_more(paths):
            break
        if number and new_tree:
            search.root = Node(search.root.partial)
        elif number:
            clear_statistics(search.root)
        node: Node | None = search.root
        while node is not None and not node.terminal and not search.spent:
            node = await move(node)
        if node is not None and node.terminal:
            await search.add(node)


async def _move(search: Search[AlphaOptions], node: Node) -> Node | None:
    """The child that the simulations lead to, the most visited or one drawn by its visits (``move_shares``); None where there is none."""
    options = search.options
    if node.children is None:
        await search.expand(node, options.width)
    priors = _with_noise(search, node) if options.sample_moves else None
    for _ in range(options.simulations):
        if node.dead or search.spent:
            break
        await simulate(search, node, options.width, lambda n: puct(n, options.c_init))
    if priors is not None:
        for child, prior in zip(node.children or [], priors, strict=True):
            child.prior = prior
    children = node.open_children
    if not children:
        return None
    if not options.sample_moves:
        return max(children, key=lambda child: (child.visits, child.q, child.prior))
    shares = move_shares([child.visits for child in children], options.move_temperature)
    return children[int(search.source.choice(len(children), p=shares))]


def move_shares(visits: Sequence[int], temperature: float) -> list[float]:
    """Probabilities of moves, N^(1/T) / sum (TS-LLM): 0 without a visit. Equal ones where no move has any, so that one can be drawn."""
    most = max(visits)
    weights = [(n / most) ** (1 / temperature) for n in visits] if most else [1.0] * len(visits)  # n / most: large powers overflow
    return [weight / sum(weights) for weight in weights]


def _with_noise(search: Search[AlphaOptions], node: Node) -> list[float]:
    """Mix noise into the priors of the children, so that a repeated search sees other ways; returns the priors before."""
    children, share = node.children or [], search.options.noise
    priors = [child.prior for child in children]
    if children:
        noise = search.source.dirichlet([search.options.noise_alpha] * len(children))
        for child, extra in zip(children, noise, strict=True):
            child.prior = (1 - share) * child.prior + share * float(extra)
    return priors


@search_method("mcts_rollout", RolloutOptions)
async def mcts_rollout(search: Search[RolloutOptions]) -> None:
    """Simulations from the root, every solution reached is a vote (TS-LLM's MCTS-Rollout). Can go back on everything; costs most."""
    options = search.options
    await search.expand(search.root, options.width)
    for _ in range(options.simulations):
        if search.root.dead or not search.wants_more(options.paths):
            break
        leaf = await simulate(search, search.root, options.width, lambda node: puct(node, options.c_init))
        if leaf is not None and leaf.terminal:
            await search.add(leaf)
