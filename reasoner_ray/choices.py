"""Actions chosen from a list: the distribution over the list, and its exact decomposition into tokens (torch only).

A policy that scores every candidate ``a`` of a list (TWOSOME, Tan et al. 2024, arXiv 2401.14151, eq. 2-4) acts by

    pi(a|o) = softmax over the list of  (1/N(a)) sum_j log p_LM(w^j | o, w^{<j})

with N(a) the number of words, of tokens, or 1. The chain rule over the tree of the candidates' tokens turns it into
token probabilities, whatever N is:

    pi(w^j | o, w^{<j}) = sum of pi(a) over candidates that begin with w^{<=j} / the same sum for w^{<j}

so the log-probs of an action's tokens add up to log pi(a|o): rollout and learner, action-level and token-level
algorithms all speak of the distribution that was sampled from. The last token of a candidate also decides to stop
there, which matters where one candidate is the beginning of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

Normalisation = Literal["word", "token", "sum"]
Candidates = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One action and the list that it was chosen from."""

    candidates: Candidates  # token ids of each; distinct, none empty
    divisors: tuple[float, ...]  # N(a) of each
    chosen: int

    def __post_init__(self) -> None:
        if len(self.divisors) != len(self.candidates) or not 0 <= self.chosen < len(self.candidates):
            raise ValueError(f"choice {self.chosen} of {len(self.candidates)} candidates with {len(self.divisors)} divisors")

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the action."""
        return self.candidates[self.chosen]


def divisor(text: str, tokens: Sequence[int], how: Normalisation) -> float:
    """N(a): the words of ``text`` (TWOSOME's default), its tokens, or 1."""
    if how == "word":
        return float(max(len(text.split()), 1))
    return float(len(tokens)) if how == "token" else 1.0


@dataclass(frozen=True, slots=True)
class Trie:
    """The tree of a candidate list. An edge is a token at its place; it leaves the node that its parent edge leads to.

    A candidate's last token is an edge of its own, apart from the same token inside a longer candidate.
    """

    parent: np.ndarray  # int64 [E]; the edge before it, -1 at the root
    node: np.ndarray  # int64 [E]; the node it leaves
    edge_token: np.ndarray  # int64 [E]; a place where it stands in the candidates' tokens, joined one candidate after the other
    member_edge: np.ndarray  # int64 [M]; (edge, candidate) for every candidate that passes an edge
    member_candidate: np.ndarray  # int64 [M]
    paths: tuple[tuple[int, ...], ...]  # the edges of each candidate, one a token
    n_nodes: int


@lru_cache(maxsize=4096)
def make_trie(candidates: Candidates) -> Trie:
    """The tree of ``candidates``. Raises ``ValueError`` where the list, or one of them, is empty, or two are the same."""
    if not candidates or not all(candidates) or len(set(candidates)) < len(candidates):
        raise ValueError("a list of candidates needs at least one, none of them empty, no two the same")
    edges: dict[tuple[int, int, bool], int] = {}  # (parent edge, token, is the last one) -> edge
    nodes: dict[int, int] = {}  # edge that leads to it -> node
    members: list[tuple[int, int]] = []
    paths = []
    for c, tokens in enumerate(candidates):
        path: list[int] = []
        for j, token in enumerate(tokens):
            before = path[-1] if path else -1
            nodes.setdefault(before, len(nodes))
            edge = edges.setdefault((before, token, j == len(tokens) - 1), len(edges))
            members.append((edge, c))
            path.append(edge)
        paths.append(tuple(path))
    parent = np.array([before for before, _, _ in edges], dtype=np.int64)
    pairs = np.array(members, dtype=np.int64)
    node = np.array([nodes[before] for before in parent.tolist()], dtype=np.int64)
    first = np.unique(pairs[:, 0], return_index=True)[1]  # members are in the order of the tokens
    return Trie(parent, node, first, pairs[:, 0], pairs[:, 1], tuple(paths), len(nodes))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceForest:
    """Many lists, flat: P tokens of C candidates of L lists, whose trees have E edges and n_nodes nodes in all."""

    token_candidate: torch.Tensor  # int64 [P]; the candidate of each candidate token, list by list, candidate by candidate
    divisors: torch.Tensor  # float32 [C]
    candidate_list: torch.Tensor  # int64 [C]
    member_edge: torch.Tensor  # int64 [M]
    member_candidate: torch.Tensor  # int64 [M]
    parent: torch.Tensor  # int64 [E]; -1 at a root
    node: torch.Tensor  # int64 [E]
    edge_token: torch.Tensor  # int64 [E]; one of the P candidate tokens that the edge stands for
    n_lists: int
    n_nodes: int

    @property
    def n_edges(self) -> int:
        """E."""
        return len(self.parent)

    def to(self, device: torch.device | str) -> ChoiceForest:
        """The same forest with its tensors on ``device``."""
        tensors: dict[str, Any] = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def make_forest(lists: Sequence[tuple[Candidates, Sequence[float]]]) -> tuple[ChoiceForest, list[int]]:
    """The forest of (candidates, divisors) lists, and the number of the first edge of each list."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("token", "divisors", "list", "edge", "member", "parent", "node", "place")}
    first_edges, edges, nodes, seen, tokens = [], 0, 0, 0, 0
    for number, (candidates, divisors) in enumerate(lists):
        trie = make_trie(candidates)
        first_edges.append(edges)
        parts["token"].append(np.repeat(np.arange(len(candidates)) + seen, [len(c) for c in candidates]))
        parts["divisors"].append(np.asarray(divisors, dtype=np.float32))
        parts["list"].append(np.full(len(candidates), number))
        parts["edge"].append(trie.member_edge + edges)
        parts["member"].append(trie.member_candidate + seen)
        parts["parent"].append(np.where(trie.parent < 0, -1, trie.parent + edges))
        parts["node"].append(trie.node + nodes)
        parts["place"].append(trie.edge_token + tokens)
        edges, nodes, seen = edges + len(trie.parent), nodes + trie.n_nodes, seen + len(candidates)
        tokens += len(trie.member_edge)

    def join(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts[name]))

    forest = ChoiceForest(
        token_candidate=join("token"),
        divisors=join("divisors"),
        candidate_list=join("list"),
        member_edge=join("edge"),
        member_candidate=join("member"),
        parent=join("parent"),
        node=join("node"),
        edge_token=join("place"),
        n_lists=len(lists),
        n_nodes=nodes,
    )
    return forest, first_edges


def candidate_logprobs(token_logprobs: torch.Tensor, forest: ChoiceForest) -> torch.Tensor:
    """log pi(a|o) [C] from the language model's log-probs [P] of all candidates' tokens, nats."""
    scores = token_logprobs.new_zeros(len(forest.divisors)).index_add(0, forest.token_candidate, token_logprobs) / forest.divisors
    return scores - segment_logsumexp(scores, forest.candidate_list, forest.n_lists)[forest.candidate_list]


def edge_logprobs(token_logprobs: torch.Tensor, forest: ChoiceForest) -> torch.Tensor:
    """log pi(w^j | o, w^{<j}) of every edge, nats [E]; differentiable in ``token_logprobs`` [P]."""
    actions = candidate_logprobs(token_logprobs, forest)
    mass = segment_logsumexp(actions[forest.member_candidate], forest.member_edge, forest.n_edges)
    before = torch.where(forest.parent >= 0, mass[forest.parent.clamp(min=0)], 0.0)
    return mass - before


def expectation(values: torch.Tensor, logprobs: torch.Tensor, forest: ChoiceForest) -> torch.Tensor:
    """``sum over the edges of a node of exp(logprobs) * values``, for the node that each edge leaves: [E] from [E] and [E]."""
    totals = values.new_zeros(forest.n_nodes).index_add(0, forest.node, logprobs.exp() * values)
    return totals[forest.node]


def segment_logsumexp(x: torch.Tensor, segment: torch.Tensor, n: int) -> torch.Tensor:
    """``log sum exp`` of the entries of each of ``n`` segments: [n] from x [k] and segment int64 [k]; no segment is empty."""
    top = x.detach().new_full((n,), -torch.inf).scatter_reduce(0, segment, x.detach(), "amax")
    return x.new_zeros(n).index_add(0, segment, (x - top[segment]).exp()).log() + top
