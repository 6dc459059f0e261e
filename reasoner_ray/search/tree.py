"""The tree of a search: statistics of nodes, how a path is chosen, how values go back, and its JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from reasoner_ray.errors import DataError
from reasoner_ray.steps import Partial

C_BASE = 19652.0
"""PUCT's c_base (AlphaZero)."""


@dataclass(slots=True, eq=False)
class Node:
    """A partial solution. Its own tokens are those that its parent's lacks."""

    partial: Partial
    prior: float = 1.0  # P, a share among its siblings
    value: float = 0.0  # v0, what the scorer says of it
    scores: tuple[float, ...] = ()  # the scorer's values of all its steps
    given: int = 0  # of its own tokens the first ones, which the search wrote and not the policy
    logprobs: tuple[float, ...] = ()  # of its other own tokens, nats
    versions: tuple[int, ...] = ()  # policy versions of these
    action: str = ""  # the kind of step, where a method has several
    terminal: bool = False  # the policy ended the solution here
    parent: Node | None = field(default=None, repr=False)
    children: list[Node] | None = field(default=None, repr=False)  # None: not expanded
    visits: int = 0  # N
    total: float = 0.0  # W, sum of the values that went through it
    dead: bool = False  # no solution can come of it: nothing more follows, here or below all its children

    @property
    def q(self) -> float:
        """Mean value: W / N, or v0 where no value went through it."""
        return self.total / self.visits if self.visits else self.value

    @property
    def own_tokens(self) -> tuple[int, ...]:
        """Tokens that the parent's solution lacks."""
        return self.partial.tokens[len(self.parent.partial.tokens) :] if self.parent is not None else ()

    @property
    def depth(self) -> int:
        """Edges from the root."""
        return len(self.path) - 1

    @property
    def path(self) -> list[Node]:
        """From the root to this node."""
        path: list[Node] = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]

    @property
    def open_children(self) -> list[Node]:
        """Children that are not dead."""
        return [child for child in self.children or () if not child.dead]

    def close(self) -> None:
        """Nothing follows this node: it is dead, and so is each above it whose children now all are."""
        node: Node | None = self
        while node is not None and all(child.dead for child in node.children or ()):
            node.dead = True
            node = node.parent

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children or ()))


def puct_score(node: Node, child: Node, c_init: float, c_base: float = C_BASE) -> float:
    """Q(c) + P(c) * (ln((N + c_base + 1) / c_base) + c_init) * sqrt(N) / (1 + N(c)) (AlphaZero; TS-LLM, arXiv 2309.17179).

    Where the parent has no visit it is v0 of the child.
    """
    weight = math.log((node.visits + c_base + 1) / c_base) + c_init
    return child.q + child.prior * weight * math.sqrt(node.visits) / (1 + child.visits)


def puct(node: Node, c_init: float, c_base: float = C_BASE) -> Node:
    """The child with the highest PUCT score, the likelier one where two are equal; dead ones are left out."""
    return max(node.open_children, key=lambda child: (puct_score(node, child, c_init, c_base), child.prior))


def uct_score(node: Node, child: Node, weight: float) -> float:
    """Q(c) + weight * sqrt(ln N / N(c)) (UCB1); infinite for a child without a visit."""
    return child.q + weight * math.sqrt(math.log(node.visits) / child.visits) if child.visits else math.inf


def backup(leaf: Node, value: float) -> None:
    """Add a value to the leaf and everything above it: no discount, one player."""
    for node in leaf.path:
        node.visits += 1
        node.total += value


def clear_statistics(root: Node) -> None:
    """Forget all visits and values that went through the tree, and keep the nodes (TS-LLM's intra-tree repetition)."""
    for node in root.walk():
        node.visits, node.total = 0, 0.0


def to_json(root: Node, chosen: Node | None, text: Callable[[Partial, int], str], **about: Any) -> dict[str, Any]:
    """The tree as plain data; ``text(partial, start)`` is what a node's own tokens say.

    ``chosen`` are the indices of children from the root to the chosen solution; ``about`` is kept beside the tree.
    """
    path = chosen.path if chosen is not None else [root]
    steps = [(parent.children or []).index(child) for parent, child in pairwise(path)]
    tree = {"prompt_tokens": list(root.partial.tokens), "start": root.partial.start, "ends": list(root.partial.ends)}
    return {"format": 1, **about, **tree, "chosen": steps, "root": _node_json(root, text)}


def _node_json(root: Node, text: Callable[[Partial, int], str]) -> dict[str, Any]:
    def one(node: Node) -> dict[str, Any]:
        before = len(node.partial.tokens) - len(node.own_tokens)
        return {
            "tokens": list(node.own_tokens),
            "ends": list(node.partial.ends),
            "text": text(node.partial, before) if node.parent is not None else "",
            "prior": node.prior,
            "value": node.value,
            "scores": list(node.scores),
            "given": node.given,
            "action": node.action,
            "logprobs": list(node.logprobs),
            "versions": list(node.versions),
            "terminal": node.terminal,
            "visits": node.visits,
            "total": node.total,
            "children": None if node.children is None else [],
        }

    plain = {id(root): one(root)}
    for node in root.walk():  # parents come before their children
        if node is not root:
            plain[id(node)] = one(node)
            plain[id(node.parent)]["children"].append(plain[id(node)])
    return plain[id(root)]


def from_json(tree: dict[str, Any], source: str = "the tree") -> tuple[Node, Node]:
    """The root and the chosen node (the root where nothing was chosen). Raises ``DataError`` naming ``source``."""
    try:
        partial = Partial(tuple(tree["prompt_tokens"]), tuple(tree["ends"]), int(tree["start"]))
        root = _node(tree["root"], partial, None)
        stack = [(root, tree["root"])]
        while stack:
            node, plain = stack.pop()
            if plain["children"] is not None:
                node.children = [_node(child, _grown(node, child), node) for child in plain["children"]]
                stack.extend(zip(node.children, plain["children"], strict=True))
                if not node.children:
                    node.close()
        chosen = root
        for index in tree["chosen"]:
            chosen = (chosen.children or [])[index]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{source} is not a search tree that `reasoner search` wrote ({type(error).__name__}: {error})") from error
    return root, chosen


def _grown(parent: Node, plain: dict[str, Any]) -> Partial:
    return Partial((*parent.partial.tokens, *plain["tokens"]), tuple(plain["ends"]), parent.partial.start)


def _node(plain: dict[str, Any], partial: Partial, parent: Node | None) -> Node:
    return Node(
        partial,
        prior=float(plain["prior"]),
        value=float(plain["value"]),
        scores=tuple(plain["scores"]),
        given=int(plain.get("given", 0)),  # trees that were written before have neither
        action=str(plain.get("action", "")),
        logprobs=tuple(plain["logprobs"]),
        versions=tuple(plain["versions"]),
        terminal=bool(plain["terminal"]),
        parent=parent,
        visits=int(plain["visits"]),
        total=float(plain["total"]),
    )
