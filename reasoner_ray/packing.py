"""Packing: many trajectories as one row of tokens in which every shared prefix is computed once.

The contexts of a batch form a forest: a node is a token in its context, children follow different
continuations. A batch is that forest in depth-first order. With ``subtree_end[j]`` one past the last
descendant of token j, token i may attend to token j exactly where ``j <= i < subtree_end[j]``, that is,
where j is i itself or one of its ancestors: each token sees the very context it has in its own
trajectory. Plain packing is the same structure with a forest of chains.

The unit of packing is a context of a trajectory (most have one). It is never cut: all its tokens, and all
candidates of the lists that its actions were chosen from, lie in one batch. Candidates that were not chosen
are branches of the forest like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import numpy as np
import torch

from reasoner_ray.choices import Candidates, Choice, ChoiceForest, edge_logprobs, expectation, make_forest, make_trie
from reasoner_ray.trajectory import Bootstrap, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One row of N packed tokens that carries K trainable tokens: what one forward pass computes.

    The model predicts P distinct (position, token) pairs. A trainable token of free text is one of them; a token of an
    action that was chosen from a list is an edge of ``choices``, whose log-prob follows from the pairs of all candidates.
    """

    tokens: torch.Tensor  # int64 [N]; depth-first order of the forest
    position_ids: torch.Tensor  # int64 [N]; depth, the token's index in its context
    subtree_end: torch.Tensor  # int64 [N]; i attends to j iff j <= i < subtree_end[j]
    predictors: torch.Tensor  # int64 [P]; packed index of the token whose hidden state predicts the target
    targets: torch.Tensor  # int64 [P]; the predicted token's id
    stream_index: torch.Tensor  # int64 [K]; place in the flat order of ``flatten``; a context's are adjacent
    source: torch.Tensor  # int64 [K]; which pair (below P), or P plus which edge of ``choices``
    states: torch.Tensor  # int64 [K]; packed index of the token whose hidden state predicts the trainable token
    bootstrap: torch.Tensor  # int64 [b]; packed index of the last token of a truncated trajectory
    bootstrap_trajectory: torch.Tensor  # int64 [b]; that trajectory's number in the packed set
    choices: ChoiceForest | None = None
    choice_pairs: torch.Tensor | None = None  # int64 [tokens of all candidates]; their pairs
    unshared_tokens: int = 0  # tokens that plain packing would have computed

    @property
    def n_packed(self) -> int:
        """N: tokens that the trunk computes."""
        return len(self.tokens)

    @property
    def n_trained(self) -> int:
        """K: tokens that carry a gradient."""
        return len(self.stream_index)

    def of_stream(self, logprobs: torch.Tensor, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropies [K] of the trainable tokens from those of the pairs [P].

        A pair's entropy is that of the whole vocabulary; a token of a chosen action was drawn from what its list allows.
        """
        if self.choices is None or self.choice_pairs is None:
            return logprobs[self.source], None if entropy is None else entropy[self.source]
        edges = edge_logprobs(logprobs[self.choice_pairs], self.choices)
        if entropy is not None:
            entropy = torch.cat([entropy, -expectation(edges, edges, self.choices)])[self.source]
        return torch.cat([logprobs, edges])[self.source], entropy

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("unshared_tokens", "choices")}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in values.items() if tensor is not None}
        return replace(self, **moved, choices=None if self.choices is None else self.choices.to(device))

    def padded(self, multiple: int) -> Batch:
        """The same batch with N rounded up to a multiple of ``multiple`` by tokens that nothing attends to or reads."""
        extra = -self.n_packed % multiple
        ends = torch.arange(self.n_packed, self.n_packed + extra, device=self.tokens.device) + 1
        none = torch.zeros_like(ends)
        return replace(
            self,
            tokens=torch.cat([self.tokens, none]),
            position_ids=torch.cat([self.position_ids, none]),
            subtree_end=torch.cat([self.subtree_end, ends]),
        )

    @staticmethod
    def empty() -> Batch:
        """A batch that trains on nothing: what a rank computes while the others have one micro-batch more."""
        none = torch.zeros(0, dtype=torch.int64)
        zero = torch.zeros(1, dtype=torch.int64)
        return Batch(
            tokens=zero,
            position_ids=zero,
            subtree_end=zero + 1,
            predictors=none,
            targets=none,
            stream_index=none,
            source=none,
            states=none,
            bootstrap=none,
            bootstrap_trajectory=none,
        )


@dataclass(frozen=True, slots=True)
class _Pick:
    """An action of a context that was chosen from a list."""

    start: int  # its first token's place in the context
    choice: Choice
    stream_start: int

    def sequences(self, context: np.ndarray) -> list[np.ndarray]:
        """What must be computed to score each candidate: the context up to its last but one token."""
        before = context[: self.start]
        return [np.concatenate([before, np.array(c[:-1], dtype=np.int64)]) for c in self.choice.candidates]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A context of a trajectory as packing sees it."""

    number: int  # of the trajectory in the packed set
    group: str
    tokens: np.ndarray  # int64; the tokens that must be computed
    predictors: np.ndarray  # int64; positions that predict a trainable token of free text
    targets: np.ndarray  # int64
    streams: np.ndarray  # int64; their places in the flat streams
    picks: tuple[_Pick, ...]
    bootstraps: bool  # the value after its last token is wanted

    def branches(self) -> Iterator[tuple[tuple[bytes, Candidates], int, int]]:
        """For each list: what makes it distinct, and an upper bound of the tokens its other candidates add, shared and not."""
        for pick in self.picks:
            inner = [len(c) - 1 for i, c in enumerate(pick.choice.candidates) if i != pick.choice.chosen]
            key = (self.tokens[: pick.start].tobytes(), pick.choice.candidates)
            yield key, sum(inner), sum(inner) + pick.start * len(inner)


def pack(
    trajectories: Sequence[Trajectory], *, tokens_per_microbatch: int, share_prefixes: bool = True, bootstrap: Bootstrap = "truncated"
) -> list[Batch]:
    """Pack ``trajectories`` into rows of at most ``tokens_per_microbatch`` computed tokens.

    Contexts are sorted by their tokens, so that shared prefixes are neighbours and each is computed once a row;
    neighbours of one group stay in one row where they fit. A single context beyond the budget gets a row of its own.
    Tokens after the last trainable one predict nothing and are not computed, nor is that last token itself, except
    where ``bootstrap`` asks for the value of the state after it. A trajectory without trainable tokens is left out.

    Raises ``ValueError`` where the budget is below one token.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be at least 1, got {tokens_per_microbatch}")
    units = _units(trajectories, bootstrap)
    if share_prefixes:
        units.sort(key=lambda unit: _sort_key(unit.tokens))
    shared = _shared_prefixes([unit.tokens for unit in units], share_prefixes)
    return [_build(units[a:b], share_prefixes) for a, b in _cut(units, shared, tokens_per_microbatch, share_prefixes)]


def unpack(batches: Sequence[Batch], parts: Sequence[torch.Tensor], n_tokens: int) -> torch.Tensor:
    """Per-token results of each batch ([K] each) as one flat stream in the order of ``flatten``: [n_tokens], on the CPU."""
    streams = torch.zeros(n_tokens, dtype=parts[0].dtype if parts else torch.float32)
    for batch, part in zip(batches, parts, strict=True):
        streams[batch.stream_index.cpu()] = part.detach().cpu()
    return streams


def unpack_bootstrap(batches: Sequence[Batch], parts: Sequence[torch.Tensor], n_trajectories: int) -> torch.Tensor:
    """Values after the last token ([b] each) by trajectory: float32 [n_trajectories]; 0 where none was asked for."""
    values = torch.zeros(n_trajectories)
    for batch, part in zip(batches, parts, strict=True):
        values[batch.bootstrap_trajectory.cpu()] = part.detach().float().cpu()
    return values


def _units(trajectories: Sequence[Trajectory], bootstrap: Bootstrap) -> list[_Unit]:
    units, stream_start = [], 0
    for number, trajectory in enumerate(trajectories):
        trained = np.flatnonzero(trajectory.loss_mask)
        if len(trained) == 0:
            continue
        bootstraps = trajectory.goes_on(bootstrap)
        for a, b in pairwise([*trajectory.context_starts, len(trajectory.tokens)]):
            last = b == len(trajectory.tokens)
            inside = trained[(trained >= a) & (trained < b)]
            if len(inside) or (last and bootstraps):
                streams = stream_start + np.arange(len(inside))
                units.append(_unit(trajectory, number, (a, b), inside, streams, bootstraps and last))
                stream_start += len(inside)
    return units


def _unit(trajectory: Trajectory, number: int, span: tuple[int, int], trained: np.ndarray, streams: np.ndarray, bootstraps: bool) -> _Unit:
    """The context ``span`` of a trajectory, whose trainable tokens are ``trained`` with places ``streams``."""
    start, end = span
    tokens = trajectory.tokens[start:end].astype(np.int64)
    trained = trained - start
    picks = []
    free = np.ones(len(trained), dtype=bool)
    for s in trajectory.spans:
        if s.choice is not None and s.context_start == start:
            first = int(np.searchsorted(trained, s.start - start))
            picks.append(_Pick(s.start - start, s.choice, int(streams[first])))
            free[first : first + s.end - s.start] = False
    return _Unit(
        number=number,
        group=trajectory.group_id,
        tokens=tokens if bootstraps else tokens[: trained[-1]],
        predictors=trained[free] - 1,
        targets=tokens[trained[free]],
        streams=streams[free],
        picks=tuple(picks),
        bootstraps=bootstraps,
    )


def _sort_key(tokens: np.ndarray) -> bytes:
    return tokens.astype(">u4").tobytes()  # big-endian bytes sort like the integers


def _shared_prefixes(sequences: Sequence[np.ndarray], share: bool) -> list[int]:
    """How many tokens each sequence shares with the one before it."""
    shared = [0] * len(sequences)
    if share:
        shared[1:] = [_common_prefix(a, b) for a, b in pairwise(sequences)]
    return shared


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


class _Row:
    """How full a row is while units are put into it."""

    def __init__(self, units: Sequence[_Unit], shared: Sequence[int], share: bool) -> None:
        self._units, self._shared, self._share = units, shared, share
        self._lists: set[tuple[bytes, Candidates]] = set()
        self.used = 0

    def cost(self, first: int, last: int) -> int:
        """Tokens that units ``first`` to ``last - 1`` would add."""
        total, new = 0, set(self._lists)
        for j in range(first, last):
            total += len(self._units[j].tokens) - (self._shared[j] if self.used or j > first else 0)
            for key, among_shared, alone in self._units[j].branches():
                total += 0 if self._share and key in new else among_shared if self._share else alone
                new.add(key)
        return total

    def add(self, j: int) -> None:
        """Put unit ``j`` in."""
        self.used += self.cost(j, j + 1)
        self._lists.update(key for key, _, _ in self._units[j].branches())


def _cut(units: Sequence[_Unit], shared: Sequence[int], budget: int, share: bool) -> Iterator[tuple[int, int]]:
    """Ranges of ``units`` that make one row each."""
    start, row, i = 0, _Row(units, shared, share), 0
    while i < len(units):
        end = i + 1
        while end < len(units) and units[end].group == units[i].group:
            end += 1
        fits_alone = _Row(units, shared, share).cost(i, end) <= budget
        if row.used and fits_alone and row.used + row.cost(i, end) > budget:  # do not split the run of a group
            yield start, i
            start, row = i, _Row(units, shared, share)
        for j in range(i, end):
            if row.used and row.used + row.cost(j, j + 1) > budget:
                yield start, j
                start, row = j, _Row(units, shared, share)
            row.add(j)
        i = end
    if start < len(units):
        yield start, len(units)


@dataclass(slots=True)
class _Reads:
    """What is read from the hidden states of a row."""

    predictors: list[np.ndarray] = field(default_factory=list)  # pairs, in the order they come
    targets: list[np.ndarray] = field(default_factory=list)
    streams: list[np.ndarray] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)  # the pair, or -1 minus the edge
    states: list[np.ndarray] = field(default_factory=list)
    n_pairs: int = 0

    def pairs(self, predictors: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Note pairs; returns their numbers."""
        self.predictors.append(predictors)
        self.targets.append(targets)
        numbers = np.arange(self.n_pairs, self.n_pairs + len(targets))
        self.n_pairs += len(targets)
        return numbers

    def stream(self, streams: np.ndarray, source: np.ndarray, states: np.ndarray) -> None:
        """Note trainable tokens."""
        self.streams.append(streams)
        self.source.append(source)
        self.states.append(states)


def _build(units: Sequence[_Unit], share: bool) -> Batch:
    """One row that computes ``units`` and the candidates of their lists."""
    sequences = [unit.tokens for unit in units]
    lists: dict[object, tuple[_Pick, int]] = {}  # a list's key -> who has it, and the sequence of its first candidate
    keys: list[list[object]] = []
    for u, unit in enumerate(units):
        keys.append([])
        for n, (pick, (content, _, _)) in enumerate(zip(unit.picks, unit.branches(), strict=True)):
            key: object = (content, pick.choice.divisors) if share else (u, n)
            keys[-1].append(key)
            if key not in lists:
                lists[key] = (pick, len(sequences))
                sequences += pick.sequences(unit.tokens)
    forest = Forest(sequences, share)
    reads = _Reads()
    for unit, path in zip(units, forest.paths, strict=False):
        at = path[unit.predictors]
        reads.stream(unit.streams, reads.pairs(at, unit.targets), at)
    choices, choice_pairs, first_edges = None, None, dict[object, int]()
    if lists:
        made = [_list_pairs(reads, pick, forest.paths[first:]) for pick, first in lists.values()]
        choices, firsts = make_forest([(pick.choice.candidates, pick.choice.divisors) for pick, _ in lists.values()])
        choice_pairs, first_edges = np.concatenate(made), dict(zip(lists, firsts, strict=True))
    for unit, own in zip(units, keys, strict=True):
        for pick, key in zip(unit.picks, own, strict=True):
            _, first = lists[key]
            n, edges = len(pick.choice.tokens), make_trie(pick.choice.candidates).paths[pick.choice.chosen]
            path = forest.paths[first + pick.choice.chosen]
            reads.stream(pick.stream_start + np.arange(n), -1 - first_edges[key] - np.array(edges), path[pick.start - 1 :][:n])
    last = [(path[-1], unit.number) for unit, path in zip(units, forest.paths, strict=False) if unit.bootstraps]
    unshared = sum(len(unit.tokens) + sum(alone for _, _, alone in unit.branches()) for unit in units)
    return _batch(forest, reads, np.array(last, dtype=np.int64).reshape(-1, 2), choices, choice_pairs, unshared)


def _list_pairs(reads: _Reads, pick: _Pick, paths: Sequence[np.ndarray]) -> np.ndarray:
    """Note the pairs of all candidates of a list, whose sequences have these packed ``paths``; returns their numbers."""
    numbers = [reads.pairs(path[pick.start - 1 :][: len(c)], np.array(c)) for c, path in zip(pick.choice.candidates, paths, strict=False)]
    return np.concatenate(numbers)


class Forest:
    """Sequences as one forest in depth-first order; equal prefixes of neighbours are one path where ``share`` allows."""

    def __init__(self, sequences: Sequence[np.ndarray], share: bool) -> None:
        order = list(range(len(sequences)))
        if share:
            order.sort(key=lambda i: _sort_key(sequences[i]))
        shared = _shared_prefixes([sequences[i] for i in order], share)
        tokens, positions, closed = [], [], []
        self.paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(sequences)  # packed index of each token
        path, size = np.zeros(0, dtype=np.int64), 0
        for i, keep in zip(order, shared, strict=True):
            sequence = sequences[i]
            closed.append((path[keep:], size))  # these tokens get no further descendants
            grown = len(sequence) - keep
            path = np.concatenate([path[:keep], np.arange(size, size + grown)])
            size += grown
            tokens.append(sequence[keep:])
            positions.append(np.arange(keep, len(sequence)))
            self.paths[i] = path
        self.tokens, self.positions = np.concatenate(tokens), np.concatenate(positions)
        self.subtree_end = np.full(size, size)
        for indices, end in closed:
            self.subtree_end[indices] = end


def _batch(
    forest: Forest, reads: _Reads, last: np.ndarray, choices: ChoiceForest | None, choice_pairs: np.ndarray | None, unshared: int
) -> Batch:
    """The batch, each pair once however often it is read."""
    predictors, targets = np.concatenate(reads.predictors), np.concatenate(reads.targets)
    source = np.concatenate(reads.source)
    width = int(targets.max()) + 1 if len(targets) else 1
    distinct, number = np.unique(predictors * width + targets, return_inverse=True)
    # Edges come after the pairs.
    source = np.where(source >= 0, number[np.maximum(source, 0)] if len(number) else source, len(distinct) - 1 - source)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

    return Batch(
        tokens=tensor(forest.tokens),
        position_ids=tensor(forest.positions),
        subtree_end=tensor(forest.subtree_end),
        predictors=tensor(distinct // width),
        targets=tensor(distinct % width),
        stream_index=tensor(np.concatenate(reads.streams)),
        source=tensor(source),
        states=tensor(np.concatenate(reads.states)),
        bootstrap=tensor(last[:, 0]),
        bootstrap_trajectory=tensor(last[:, 1]),
        choices=choices,
        choice_pairs=None if choice_pairs is None else tensor(number[choice_pairs]),
        unshared_tokens=unshared,
    )
