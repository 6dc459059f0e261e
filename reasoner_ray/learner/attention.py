"""Attention over a packed forest: token i attends to token j exactly where ``j <= i < subtree_end[j]``.

Registered with transformers as the attention implementation ``reasoner_tree``. The trunk is called with
``tree=TreeMask(...)``, which the models pass through to every layer.

Depth-first order makes the rule cheap without a special kernel: the tokens before a that any of the tokens
a..b may attend to are the ancestors of a, because a later token's ancestors before a are ancestors of a too.
So a block of B queries needs its own B keys and at most ``depth`` others, and a row of N tokens costs
N * (B + depth) instead of N * N; no [N, N] mask exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from reasoner_ray.errors import ModelError
from reasoner_ray.learner.resumed import Resumed

TREE_ATTENTION = "reasoner_tree"
Backend = Literal["sdpa", "flex"]

_QUERY_BLOCK = 128  # queries that share one gather of their keys; 64 to 256 measured alike on a CPU


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A row's queries, ``_QUERY_BLOCK`` at a time, with the keys that each block needs."""

    keys: torch.Tensor  # int64, of all blocks one after another
    sizes: list[int]  # keys of each block
    biases: list[torch.Tensor]  # of each block, [1, 1, queries, keys]; 0 where attended, -inf elsewhere


class TreeMask:
    """The attention rule of one packed row, prepared once a forward pass and used by every layer.

    ``subtree_end`` and ``position_ids`` are int64 [N]. ``backend`` "sdpa" runs PyTorch's scaled dot-product attention
    block by block; "flex" runs FlexAttention, compiled on a GPU.
    """

    def __init__(
        self, subtree_end: torch.Tensor, position_ids: torch.Tensor, backend: Backend = "sdpa", resumed: Resumed | None = None
    ) -> None:
        """``resumed`` knows keys and values of a part of the row, and computes the attention of the rest."""
        self.resumed = resumed
        self.subtree_end = subtree_end
        self.position_ids = position_ids
        self.backend = backend
        self.is_chain = bool((subtree_end == len(subtree_end)).all())  # one trajectory alone: plain causal attention
        self._blocks: dict[tuple[int | None, torch.dtype], _Blocks] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def blocks(self, window: int | None, dtype: torch.dtype) -> _Blocks:
        """Query blocks with their keys and additive masks; ``window`` limits the distance of a sliding layer."""
        if (window, dtype) not in self._blocks:
            n = len(self.subtree_end)
            pairs = [self._block(a, min(a + _QUERY_BLOCK, n), window, dtype) for a in range(0, n, _QUERY_BLOCK)]
            keys, biases = [k for k, _ in pairs], [b for _, b in pairs]
            self._blocks[window, dtype] = _Blocks(torch.cat(keys), [len(k) for k in keys], biases)
        return self._blocks[window, dtype]

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's form of the same rule."""
        if window not in self._block_masks:
            n, ends, depth = len(self.subtree_end), self.subtree_end, self.position_ids

            def rule(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                allowed = (key <= query) & (query < ends[key])
                return allowed if window is None else allowed & (depth[query] - depth[key] < window)

            device = ends.device
            self._block_masks[window] = create_block_mask(rule, None, None, n, n, device=str(device), _compile=device.type == "cuda")
        return self._block_masks[window]

    def _block(self, start: int, end: int, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (int64 [k]) that queries ``start..end`` need, and the additive mask [1, 1, end - start, k]."""
        ends, device = self.subtree_end, self.subtree_end.device
        ancestors = (ends[:start] > start).nonzero().squeeze(1)
        queries = torch.arange(start, end, device=device)
        keys = torch.cat([ancestors, queries])
        allowed = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[keys][None, :])
        if window is not None:
            allowed &= self.position_ids[queries][:, None] - self.position_ids[keys][None, :] < window
        bias = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))
        return keys, bias[None, None]


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    tree: TreeMask | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row: query [1, H, N, D], key and value [1, Hkv, N, D] -> [1, N, H, D].

    Attention dropout is not applied: it would make log-probs disagree with the rollout's.
    Raises ``ModelError`` where the layer asks for what the rule cannot express (soft-capped scores, attention sinks).
    """
    if tree is None:
        raise ModelError(f"attention {TREE_ATTENTION!r} needs a packed row: call the trunk with tree=TreeMask(...)")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses {name}, which packed attention does not support")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions leave float32 under autocast
    if tree.resumed is not None:
        return tree.resumed.attend(query, key, value, scaling, sliding_window), None
    if tree.backend == "flex":
        return _flex(query, key, value, tree.block_mask(sliding_window), scaling), None
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = _repeat_heads(key, repeats), _repeat_heads(value, repeats)
    if tree.is_chain and sliding_window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None
    # The backward pass of short blocks in bfloat16 takes several times as long on a CPU (torch 2.13, with AMX).
    if value.device.type == "cpu" and value.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):  # or it would be cast back
            return _by_blocks(query.float(), key.float(), value.float(), tree, scaling, sliding_window).to(value.dtype), None
    return _by_blocks(query, key, value, tree, scaling, sliding_window), None


def _by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: TreeMask, scaling: float | None, window: int | None
) -> torch.Tensor:
    blocks = tree.blocks(window, query.dtype)
    # One gather and one split for all blocks: the backward pass of a slice a block would fill and add a row each time.
    queries = query.split(_QUERY_BLOCK, dim=2)
    keys, values = (x.index_select(2, blocks.keys).split(blocks.sizes, dim=2) for x in (key, value))
    parts = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling).transpose(1, 2)
        for q, k, v, bias in zip(queries, keys, values, blocks.biases, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _repeat_heads(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """[1, Hkv, N, D] -> [1, Hkv * repeats, N, D], each head next to its copies."""
    _, heads, n, d = x.shape
    return x[:, :, None].expand(1, heads, repeats, n, d).reshape(1, heads * repeats, n, d)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float | None) -> torch.Tensor:
    run: Any = _compiled_flex() if query.is_cuda else flex_attention
    out = run(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(TREE_ATTENTION, tree_attention)
