"""Passes that go on where earlier ones ended: the keys and values of known tokens are given, the rest of a packed forest is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

_QUERY_BLOCK = 128  # queries that share one gather of their keys


@dataclass
class Resumed:
    """The rule of ``TreeMask`` for a row of N tokens of which only ``fresh`` ones run through the trunk.

    Handed to the trunk as ``tree=TreeMask(..., resumed=this)``. Afterwards ``joined`` holds every layer's keys and values
    of the whole row, so that they can be known next time.
    """

    subtree_end: torch.Tensor  # int64 [N]
    position_ids: torch.Tensor  # int64 [N]
    fresh: torch.Tensor  # int64 [n], ascending
    known: torch.Tensor  # int64 [m]; with ``fresh`` all of the row
    states: torch.Tensor  # [2, layers, Hkv, m, D]; keys (rotated) and values of ``known``; empty where m is 0
    joined: list[torch.Tensor] = field(default_factory=list)  # a layer each: [2, Hkv, N, D]
    _blocks: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of the fresh tokens of the next layer: query [1, H, n, D], key and value [1, Hkv, n, D] -> [1, n, H, D]."""
        layer = len(self.joined)
        whole = key.new_empty(2, key.shape[1], len(self.subtree_end), key.shape[3])
        whole[:, :, self.fresh] = torch.cat([key, value])
        if len(self.known):
            whole[:, :, self.known] = self.states[:, layer].to(whole.dtype)
        self.joined.append(whole)
        parts = []
        for q, (keys, allowed) in zip(query.split(_QUERY_BLOCK, dim=2), self._masks(window), strict=True):
            k, v = whole[:, None, :, keys].unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(out.transpose(1, 2))
        return torch.cat(parts, dim=1)

    def _masks(self, window: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each block of queries the keys that it needs (int64 [k]) and which query sees which (bool [queries, k])."""
        if window not in self._blocks:
            self._blocks[window] = [self._block(queries, window) for queries in self.fresh.split(_QUERY_BLOCK)]
        return self._blocks[window]

    def _block(self, queries: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = int(queries[0]), int(queries[-1])
        ends = self.subtree_end
        # As in TreeMask: ancestors of a later query before the first one are ancestors of the first one, too.
        before = (ends[:first] > first).nonzero().squeeze(1)
        keys = torch.cat([before, torch.arange(first, last + 1, device=ends.device)])
        allowed = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[keys][None, :])
        if window is not None:
            allowed &= self.position_ids[queries][:, None] - self.position_ids[keys][None, :] < window
        return keys, allowed


def known_states(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys and values [2, layers, Hkv, m, D] of several pieces of text, one after another; empty for none."""
    return torch.cat(list(parts), dim=3) if parts else torch.zeros(0)
