"""Methods guided by values of steps without backing them up: beam search (BFS-V) and depth-first search (DFS-V)."""

from __future__ import annotations

from pydantic import Field

from reasoner_ray.actor_calls import together
from reasoner_ray.search.core import Search, search_method
from reasoner_ray.search.tree import Node
from reasoner_ray.section import Section


class BeamOptions(Section):
    """Settings of beam search. Its budget in answers is ``paths * width``."""

    paths: int = Field(4, ge=1, description="partial solutions kept at each depth, and solutions found")
    width: int = Field(4, ge=1, description="steps sampled from each of them")


class DfsOptions(Section):
    """Settings of depth-first search."""

    paths: int = Field(1, ge=1, description="solutions after which it stops")
    width: int = Field(6, ge=1, description="steps sampled from each partial solution")
    prune_ratio: float = Field(0.7, ge=0, le=1, description="of each node's children, the share never visited: the least valuable")
    prune_value: float | None = Field(None, description="children of a lower value are not visited; null: all may be")


@search_method("beam", BeamOptions)
async def beam(search: Search[BeamOptions]) -> None:
    """The ``paths`` most valuable partial solutions at each depth (BFS-V; OpenR, TS-LLM).

    All of a depth are sampled at once. One that ends leaves the beam, which then is one narrower. Shines where early steps can be
    judged; a scorer that errs early loses the right way for good.
    """
    live, room = [search.root], search.options.paths
    while live and room and search.wants_more(search.options.paths):
        children = await together(search.expand(node, search.options.width) for node in live)
        best = sorted((child for some in children for child in some), key=lambda node: -node.value)[:room]
        ended = [node for node in best if node.terminal]
        await search.add(*ended)
        live, room = [node for node in best if not node.terminal], room - len(ended)


@search_method("dfs", DfsOptions)
async def dfs(search: Search[DfsOptions]) -> None:
    """Children in the order of their values, going back where a way ends (DFS-V; TS-LLM, Tree of Thoughts).

    Cheap for a first solution; the value decides alone, and what was pruned is looked at only
    where nothing else was found.
    """
    stack = [search.root]
    while stack and search.wants_more(search.options.paths):
        node = stack.pop()
        if node.terminal:
            await search.add(node)
            continue
        children = sorted(await search.expand(node, search.options.width), key=lambda child: -child.value)
        stack.extend(reversed(_kept(children, search.options)))


def _kept(children: list[Node], options: DfsOptions) -> list[Node]:
    """Children, best first, that are worth a visit: rank i <= (1 - prune_ratio) * n, i from 0, so the best is always among them."""
    last = (1 - options.prune_ratio) * len(children)
    return [c for i, c in enumerate(children) if i <= last and (options.prune_value is None or c.value >= options.prune_value)]
