"""Scoring that computes new steps alone: keys and values of earlier ones are kept, as an engine keeps its prefix cache.

A piece is the prompt or one step, known by the digest of everything up to its end; a search that adds a step to hundreds
of partial solutions computes those steps in one packed row, each behind its own known pieces.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from reasoner_ray.learner.resumed import Resumed, known_states
from reasoner_ray.packing import Forest
from reasoner_ray.steps import Partial

PieceKey = tuple[bytes, int]
"""Digest of all tokens up to the piece's end, and where it begins."""
Rows = Sequence[tuple[Partial, list[int]]]
"""Partial solutions with the numbers of the steps to be scored, ascending."""
Run = Callable[[torch.Tensor, Resumed, torch.Tensor], torch.Tensor]
"""``PolicyModel.resumed_values``."""


class PieceMemory:
    """Keys and values of pieces, at most ``tokens`` tokens of them; those used least recently go first."""

    def __init__(self, tokens: int) -> None:
        self._room, self._held = tokens, 0
        self._pieces: OrderedDict[PieceKey, torch.Tensor] = OrderedDict()

    def get(self, key: PieceKey) -> torch.Tensor | None:
        """[2, layers, Hkv, tokens of the piece, D], or None."""
        found = self._pieces.get(key)
        if found is not None:
            self._pieces.move_to_end(key)
        return found

    def put(self, key: PieceKey, states: torch.Tensor) -> None:
        """Keep a piece's keys and values."""
        if key in self._pieces:
            return
        self._pieces[key] = states
        self._held += states.shape[3]
        while self._held > self._room:
            _, dropped = self._pieces.popitem(last=False)
            self._held -= dropped.shape[3]

    def clear(self) -> None:
        """Drop all of them."""
        self._pieces.clear()
        self._held = 0


def prefix_digests(partial: Partial) -> list[bytes]:
    """A digest of all tokens up to the prompt's end, and up to each step's."""
    tokens = np.array(partial.tokens, dtype=np.int64)
    digest, found, at = hashlib.blake2b(digest_size=16), [], 0
    for end in (partial.start, *partial.ends):
        digest.update(tokens[at:end].tobytes())
        found.append(digest.digest())
        at = end
    return found


def score_rows(rows: Rows, memory: PieceMemory, run: Run, *, budget: int, device: torch.device) -> tuple[list[float], int]:
    """What the head says at the ends of the wanted steps, in order, and the tokens computed; a pass has at most about ``budget``."""
    values: list[float] = []
    computed = 0
    for group in _cut(rows, memory, budget):
        found, n = _score(group, memory, run, device)
        values += found
        computed += n
    return values, computed


def _pieces(partial: Partial, steps: int) -> list[tuple[PieceKey, int, int]]:
    """The prompt and the first ``steps`` steps: key, first token, one past the last."""
    borders, digests = (0, partial.start, *partial.ends[:steps]), prefix_digests(partial)
    return [((digests[i], a), a, b) for i, (a, b) in enumerate(pairwise(borders))]


def _cut(rows: Rows, memory: PieceMemory, budget: int) -> Iterator[Rows]:
    """Rows in groups whose new tokens fit the budget, siblings' shared ones counted each time."""
    group: list[tuple[Partial, list[int]]] = []
    used = 0
    for partial, steps in rows:
        new = 0
        for key, a, b in _pieces(partial, steps[-1] + 1):
            new += 0 if not new and memory.get(key) is not None else b - a
        if group and used + new > budget:
            yield group
            group, used = [], 0
        group.append((partial, steps))
        used += new
    if group:
        yield group


def _score(rows: Rows, memory: PieceMemory, run: Run, device: torch.device) -> tuple[list[float], int]:
    """One pass over the forest of ``rows``."""
    sequences = [np.array(partial.tokens[: partial.ends[steps[-1]]], dtype=np.int64) for partial, steps in rows]
    forest = Forest(sequences, share=True)
    places = np.concatenate([path[[p.ends[s] - 1 for s in steps]] for (p, steps), path in zip(rows, forest.paths, strict=True)])
    old: dict[PieceKey, tuple[np.ndarray, torch.Tensor]] = {}
    new: dict[PieceKey, np.ndarray] = {}
    for (partial, steps), path in zip(rows, forest.paths, strict=True):
        known = True
        for key, a, b in _pieces(partial, steps[-1] + 1):
            states = memory.get(key) if known else None
            known = states is not None
            if states is not None:
                old[key] = path[a:b], states
            else:
                new[key] = path[a:b]
    at = np.concatenate([path for path, _ in old.values()]) if old else np.zeros(0, dtype=np.int64)
    index, first = np.unique(at, return_index=True)  # one token may lie in two pieces, where steps were cut differently
    kept = ~np.isin(index, places)  # what is to be read must be computed
    index, first = index[kept], first[kept]
    fresh = np.setdiff1d(np.arange(len(forest.tokens)), index)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    states = known_states([states for _, states in old.values()])
    states = states.index_select(3, tensor(first)) if len(index) else states
    resumed = Resumed(tensor(forest.subtree_end), tensor(forest.positions), tensor(fresh), tensor(index), states)
    values: list[float] = run(tensor(forest.tokens), resumed, tensor(places)).tolist()
    whole = torch.stack(resumed.joined, dim=1)
    for key, path in new.items():
        memory.put(key, whole.index_select(3, tensor(path)))
    return values, len(fresh)
