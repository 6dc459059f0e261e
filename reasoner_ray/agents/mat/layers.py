"""Attention, blocks and the cache of the Multi-Agent Transformer: post-norm, with observations as the decoder's residual."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

RELU_GAIN = 2.0**0.5
"""Of layers before an activation; the others start with ``SMALL_GAIN``."""
SMALL_GAIN = 0.01


def linear(inputs: int, outputs: int, *, activated: bool = False, bias: bool = True) -> nn.Linear:
    """A linear layer, orthogonal with gain sqrt(2) before an activation and 0.01 elsewhere; its bias starts at 0."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.orthogonal_(layer.weight, gain=RELU_GAIN if activated else SMALL_GAIN)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def output_layers(width: int, outputs: int) -> nn.Sequential:
    """What reads values, logits or means of a representation [..., width]: Linear, GELU, LayerNorm, Linear."""
    return nn.Sequential(linear(width, width, activated=True), nn.GELU(), nn.LayerNorm(width), linear(width, outputs))


class Attention(nn.Module):
    """Multi-head scaled dot-product attention of ``query`` [B, q, width] over ``memory`` [B, m, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))

    def forward(self, query: torch.Tensor, memory: torch.Tensor, *, causal: bool) -> torch.Tensor:
        """[B, q, width]; ``causal``: place m of the query sees places 0 to m of the memory."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)), self._split(self.key(memory)), self._split(self.value(memory)), is_causal=causal
        )
        return self._joined(mixed)

    def step(self, query: torch.Tensor, memory: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, place: int) -> torch.Tensor:
        """Place ``place`` of the causal ``forward``, [B, 1, width]; its key and value join ``keys`` and ``values`` [B, h, n, width/h]."""
        keys[:, :, place : place + 1] = self._split(self.key(memory))
        values[:, :, place : place + 1] = self._split(self.value(memory))
        mixed = F.scaled_dot_product_attention(self._split(self.query(query)), keys[:, :, : place + 1], values[:, :, : place + 1])
        return self._joined(mixed)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.transpose(1, 2).flatten(2))


class _Feedforward(nn.Sequential):
    def __init__(self, width: int, expansion: int) -> None:
        super().__init__(linear(width, width * expansion, activated=True), nn.GELU(), linear(width * expansion, width))


class EncoderBlock(nn.Module):
    """``x = LN(x + MHA(x, x, x)); x = LN(x + MLP(x))``, every agent seeing every other."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), _Feedforward(width, expansion)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, width] to the same."""
        x = self.norms[0](x + self.attention(x, x, causal=False))
        return self.norms[1](x + self.mlp(x))


class DecoderBlock(nn.Module):
    """``x = LN(x + MHA(x, x, x)); x = LN(rep + MHA(rep, x, x)); x = LN(x + MLP(x))``, both causal.

    The second attention asks with the agent's observation and answers with the actions before it.
    """

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.attention, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = _Feedforward(width, expansion)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, rep: torch.Tensor) -> torch.Tensor:
        """Actions ``x`` and observations ``rep``, both [B, n, width], to [B, n, width]."""
        x = self.norms[0](x + self.attention(x, x, causal=True))
        x = self.norms[1](rep + self.cross(rep, x, causal=True))
        return self.norms[2](x + self.mlp(x))

    def step(self, x: torch.Tensor, rep: torch.Tensor, cache: torch.Tensor, place: int) -> torch.Tensor:
        """Place ``place`` of ``forward``, [B, 1, width], by what ``cache`` [4, B, h, n, width/h] keeps of the places before."""
        x = self.norms[0](x + self.attention.step(x, x, cache[0], cache[1], place))
        x = self.norms[1](rep + self.cross.step(rep, x, cache[2], cache[3], place))
        return self.norms[2](x + self.mlp(x))


class Decoder(nn.Module):
    """Blocks over the actions of earlier agents."""

    def __init__(self, token: int, width: int, heads: int, expansion: int, blocks: int, outputs: int, *, token_bias: bool) -> None:
        """``token`` numbers describe an earlier action; ``outputs`` are said of the next one."""
        super().__init__()
        self.heads, self.width = heads, width
        self.embedding = nn.Sequential(linear(token, width, activated=True, bias=token_bias), nn.GELU(), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, expansion) for _ in range(blocks))
        self.head = output_layers(width, outputs)

    def forward(self, tokens: torch.Tensor, rep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [B, n, outputs] and hidden states [B, n, width] of tokens [B, n, token] already shifted by one agent."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rep)
        return self.head(x), x

    def new_cache(self, rows: int, agents: int, like: torch.Tensor) -> torch.Tensor:
        """Room for the keys and values of ``agents`` places: [blocks, 4, rows, h, agents, width/h]."""
        return like.new_empty(len(self.blocks), 4, rows, self.heads, agents, self.width // self.heads)

    def step(self, token: torch.Tensor, rep: torch.Tensor, cache: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Place ``place`` of ``forward`` from token [B, 1, token] and rep [B, 1, width]; both results [B, 1, ...]."""
        x = self.embedding(token)
        for block, kept in zip(self.blocks, cache, strict=True):
            x = cast(DecoderBlock, block).step(x, rep, kept, place)
        return self.head(x), x
