"""Packing: many trajectories as one row of tokens in which every shared prefix is computed once.

The trajectories of a batch form a forest: a node is a token in its context, children follow different
continuations. A batch is that forest in depth-first order. With ``subtree_end[j]`` one past the last
descendant of token j, token i may attend to token j exactly where ``j <= i < subtree_end[j]``, that is,
where j is i itself or one of its ancestors: each token sees the very context it has in its own
trajectory. Plain packing is the same structure with a forest of chains.

A trajectory is never cut: all its tokens lie in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch

from reasoner_ray.trajectory import Status, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One row of N packed tokens that carries K trainable tokens: what one forward pass computes."""

    tokens: torch.Tensor  # int64 [N]; depth-first order of the forest
    position_ids: torch.Tensor  # int64 [N]; depth, the token's index in its trajectory
    subtree_end: torch.Tensor  # int64 [N]; i attends to j iff j <= i < subtree_end[j]
    predictors: torch.Tensor  # int64 [K]; packed index of the token whose hidden state predicts the target
    targets: torch.Tensor  # int64 [K]; the trainable token's id
    stream_index: torch.Tensor  # int64 [K]; its place in the flat order of ``flatten``; a trajectory's are adjacent
    bootstrap: torch.Tensor  # int64 [b]; packed index of the last token of a truncated trajectory
    bootstrap_trajectory: torch.Tensor  # int64 [b]; that trajectory's number in the packed set
    unshared_tokens: int = 0  # tokens that plain packing would have computed

    @property
    def n_packed(self) -> int:
        """N: tokens that the trunk computes."""
        return len(self.tokens)

    @property
    def n_trained(self) -> int:
        """K: tokens that carry a gradient."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unshared_tokens"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

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
            bootstrap=none,
            bootstrap_trajectory=none,
        )


@dataclass(frozen=True, slots=True)
class _Item:
    """A trajectory as packing sees it."""

    number: int  # place in the packed set
    group: str
    tokens: np.ndarray  # int64; the tokens that must be computed
    predictors: np.ndarray  # int64; positions that predict a trainable token
    targets: np.ndarray  # int64
    stream_start: int  # index of its first trainable token in the flat streams
    bootstraps: bool  # the value after its last token is wanted


def pack(
    trajectories: Sequence[Trajectory], *, tokens_per_microbatch: int, share_prefixes: bool = True, bootstrap: bool = True
) -> list[Batch]:
    """Pack ``trajectories`` into rows of at most ``tokens_per_microbatch`` computed tokens.

    Trajectories are sorted by their tokens, so that shared prefixes are neighbours and each is computed once a row;
    neighbours of one group stay in one row where they fit. A single trajectory beyond the budget gets a row of its own.
    Tokens after the last trainable one predict nothing and are not computed, nor is that last token itself, except
    where the trajectory was truncated and ``bootstrap`` asks for the value of the state after it. A trajectory without
    trainable tokens is left out.

    Raises ``ValueError`` where the budget is below one token.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be at least 1, got {tokens_per_microbatch}")
    items = _items(trajectories, bootstrap)
    if share_prefixes:
        items.sort(key=lambda item: item.tokens.astype(">u4").tobytes())  # big-endian bytes sort like the integers
    shared = [0] * len(items)
    if share_prefixes:
        shared[1:] = [_common_prefix(a.tokens, b.tokens) for a, b in pairwise(items)]
    return [_build(items[a:b], shared[a:b]) for a, b in _cut(items, shared, tokens_per_microbatch)]


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


def _items(trajectories: Sequence[Trajectory], bootstrap: bool) -> list[_Item]:
    items, stream_start = [], 0
    for number, trajectory in enumerate(trajectories):
        trained = np.flatnonzero(trajectory.loss_mask)
        if len(trained) == 0:
            continue
        bootstraps = bootstrap and trajectory.status is Status.TRUNCATED
        tokens = trajectory.tokens.astype(np.int64)
        items.append(
            _Item(
                number=number,
                group=trajectory.group_id,
                tokens=tokens if bootstraps else tokens[: trained[-1]],
                predictors=trained - 1,
                targets=tokens[trained],
                stream_start=stream_start,
                bootstraps=bootstraps,
            )
        )
        stream_start += len(trained)
    return items


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def _cut(items: Sequence[_Item], shared: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``items`` that make one row each."""
    start, used, i = 0, 0, 0
    while i < len(items):
        end = i + 1
        while end < len(items) and items[end].group == items[i].group:
            end += 1
        alone = len(items[i].tokens) + sum(len(items[j].tokens) - shared[j] for j in range(i + 1, end))
        if used and used + alone - shared[i] > budget >= alone:  # the run of a group fits a row of its own: do not split it
            yield start, i
            start, used = i, 0
        for j in range(i, end):
            cost = len(items[j].tokens) - (shared[j] if used else 0)
            if used and used + cost > budget:
                yield start, j
                start, used, cost = j, 0, len(items[j].tokens)
            used += cost
        i = end
    if start < len(items):
        yield start, len(items)


def _build(items: Sequence[_Item], shared: Sequence[int]) -> Batch:
    """The forest of sorted ``items`` in depth-first order; item i begins with ``shared[i]`` tokens of item i - 1."""
    tokens, positions, predictors, closed, bootstrap = [], [], [], [], []
    path = np.zeros(0, dtype=np.int64)  # packed index of each token of the current item
    size = 0
    for i, item in enumerate(items):
        keep = shared[i] if i else 0
        closed.append((path[keep:], size))  # these tokens get no further descendants
        grown = len(item.tokens) - keep
        path = np.concatenate([path[:keep], np.arange(size, size + grown)])
        size += grown
        tokens.append(item.tokens[keep:])
        positions.append(np.arange(keep, len(item.tokens)))
        predictors.append(path[item.predictors])
        if item.bootstraps:
            bootstrap.append((path[-1], item.number))
    subtree_end = np.full(size, size)
    for indices, end in closed:
        subtree_end[indices] = end

    def tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))

    last = np.array(bootstrap, dtype=np.int64).reshape(-1, 2)
    return Batch(
        tokens=tensor(tokens),
        position_ids=tensor(positions),
        subtree_end=torch.from_numpy(subtree_end),
        predictors=tensor(predictors),
        targets=tensor([item.targets for item in items]),
        stream_index=tensor([np.arange(item.stream_start, item.stream_start + len(item.targets)) for item in items]),
        bootstrap=torch.from_numpy(last[:, 0].copy()),
        bootstrap_trajectory=torch.from_numpy(last[:, 1].copy()),
        unshared_tokens=sum(len(item.tokens) for item in items),
    )
