"""Log-probs and entropies of single tokens without a [tokens, vocabulary] tensor.

The logits are computed tile by tile, a tile being some positions times a range of the vocabulary, small enough for a
CPU's cache, with running maxima and sums (online softmax, Milakov and Gimelshein 2018). Tiles are kept for the backward
pass up to a limit and computed again beyond it. Positions that predict several tokens (the branching points of a packed
forest) are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_TILE_ROWS = 8192  # positions of a tile at most: enough to make its matrix products efficient
_TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}  # logits of a tile: 16 MiB fit a CPU's cache, 128 MiB fill a GPU


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    predictors: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    bias: torch.Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``log softmax(hidden[predictors] @ weight.T / temperature)[targets]`` and the entropies of those distributions.

    Args:
        hidden: last hidden states, [N, d].
        weight: LM head, [V, d].
        predictors: int64 [K], rows of ``hidden``.
        targets: int64 [K], token ids.
        temperature: of the sampling, so that the log-probs are those of the distribution that was sampled from.
        chunk: positions' worth of logits kept for the backward pass. Peak memory is [chunk, V] and a few tiles; up to
            ``chunk`` distinct predictors nothing is computed twice, beyond them one matrix product in four.
        bias: of the LM head, [V] or None.
        with_entropy: False skips the entropy and returns zeros for it.

    Returns:
        Log-probs and entropies in nats, float32 [K] each; both differentiable in ``hidden``, ``weight`` and ``bias``.

    Matrix products run in autocast's type where autocast is on and in the weight's type elsewhere; everything after
    them is float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, row_of = torch.unique(predictors, return_inverse=True)
    order = torch.argsort(row_of, stable=True)  # the tokens of one tile's rows lie together
    owner = row_of[order]
    room = chunk * len(weight) if torch.is_grad_enabled() else 0
    logprobs, entropy = _TiledLogprobs.apply(
        hidden.index_select(0, rows), weight, bias, owner, targets[order], 1.0 / temperature, room, dtype, with_entropy
    )
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return logprobs[back], entropy[row_of]


class _TiledLogprobs(torch.autograd.Function):
    """rows [U, d], token k predicted by row ``owner[k]`` (ascending) -> log-probs [K], entropies [U]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        owner: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        room: int,
        dtype: torch.dtype,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy, lse = (rows.new_zeros(n, dtype=torch.float32) for n in (len(targets), len(rows), len(rows)))
        kept: list[torch.Tensor] = []
        with torch.autocast(rows.device.type, enabled=False):
            tiles = _Tiles(rows, weight, bias, scale, dtype)
            for r, t in tiles.row_ranges(owner):
                softmax = _OnlineSoftmax(r.stop - r.start, rows.device, with_entropy)
                local, wanted, chosen = owner[t] - r.start, targets[t], logprobs[t]
                for v in tiles.vocabulary_ranges(r):
                    keep = room >= (r.stop - r.start) * (v.stop - v.start)
                    product = tiles.product(r, v, fresh=keep)
                    room = room - product.numel() if keep else 0  # the tiles kept are the first ones
                    if keep:
                        kept.append(product)
                    logits = product.float()
                    inside = logits[local, (wanted - v.start).clamp(0, v.stop - v.start - 1)]
                    chosen.copy_(torch.where((wanted >= v.start) & (wanted < v.stop), inside, chosen))
                    softmax.add(logits, tiles.scratch(logits))
                chosen.sub_(softmax.top[local]).sub_(softmax.total.log()[local])
                lse[r], entropy[r] = softmax.lse(), softmax.entropy()
        ctx.save_for_backward(rows, weight, bias, owner, targets, lse, entropy, *kept)
        ctx.settings = scale, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """d logits = g_k (onehot - p) - g_H p (log p + H), summed over the tokens of a row.

        The onehot part is added in [k, d] products, and where no entropy gradient flows the factor of a row too.
        """
        rows, weight, bias, owner, targets, lse, entropy, *kept = ctx.saved_tensors
        scale, dtype = ctx.settings
        grad_logprobs = torch.zeros_like(targets, dtype=torch.float32) if grad_logprobs is None else grad_logprobs
        row_grad = torch.zeros_like(entropy).index_add_(0, owner, grad_logprobs)
        grad_rows = torch.zeros_like(rows, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if ctx.needs_input_grad[2] else None
        saved = iter(kept)
        with torch.autocast(rows.device.type, enabled=False):
            tiles = _Tiles(rows, weight, bias, scale, dtype)
            for r, t in tiles.row_ranges(owner):
                factor = -row_grad[r, None] if grad_entropy is None else torch.full_like(row_grad[r, None], -1.0)
                scaled = (tiles.rows[r].float() * factor).to(dtype)
                for v in tiles.vocabulary_ranges(r):
                    product = next(saved, None)
                    logits = (tiles.product(r, v) if product is None else product).float()
                    spread = torch.sub(logits, lse[r, None], out=tiles.scratch(logits))
                    if grad_entropy is None:
                        spread.exp_()
                    else:
                        probabilities = spread.exp()
                        spread.add_(entropy[r, None]).mul_(grad_entropy[r, None]).add_(row_grad[r, None]).mul_(probabilities)
                    if grad_bias is not None:
                        grad_bias[v] += factor.squeeze(1) @ spread
                    spread = spread.to(dtype)
                    _accumulate(grad_rows[r], spread, tiles.weight[v])
                    if grad_weight is not None:
                        _accumulate(grad_weight[v], spread.T, scaled)
                grad_rows[r] *= factor
                local, wanted, g = owner[t], targets[t], grad_logprobs[t, None]
                grad_rows.index_add_(0, local, tiles.weight[wanted].float() * g)
                if grad_weight is not None:
                    grad_weight.index_add_(0, wanted, tiles.rows[local].float() * g)
                if grad_bias is not None:
                    grad_bias.index_add_(0, wanted, g.squeeze(1))
        return (
            grad_rows.mul_(scale).to(rows.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.mul_(scale).to(bias.dtype),
            *[None] * 6,
        )


class _Tiles:
    """The logits [U, V] as tiles, with buffers that every tile uses again: fresh memory is dear on a CPU.

    The temperature is in ``rows`` and ``bias``.
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, dtype: torch.dtype) -> None:
        self.rows = (rows if scale == 1.0 else rows * scale).to(dtype)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else (bias * scale).to(dtype)
        self._elements = _TILE_ELEMENTS[rows.device.type]
        self._product = torch.empty(0, dtype=dtype, device=rows.device)
        self._scratch = torch.empty(0, dtype=torch.float32, device=rows.device)

    def row_ranges(self, owner: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Ranges of rows with the ranges of the tokens that they predict."""
        edges = torch.arange(0, len(self.rows) + _TILE_ROWS, _TILE_ROWS, device=owner.device)
        bounds = torch.searchsorted(owner, edges).tolist()
        for i, start in enumerate(range(0, len(self.rows), _TILE_ROWS)):
            yield slice(start, min(start + _TILE_ROWS, len(self.rows))), slice(bounds[i], bounds[i + 1])

    def vocabulary_ranges(self, r: slice) -> Iterator[slice]:
        """Ranges of the vocabulary that make tiles with the rows ``r``."""
        width = max(1, self._elements // (r.stop - r.start))
        for start in range(0, len(self.weight), width):
            yield slice(start, min(start + width, len(self.weight)))

    def product(self, r: slice, v: slice, *, fresh: bool = False) -> torch.Tensor:
        """The tile's logits in the type of the factors: ``fresh``, or valid until the next such call."""
        shape = (r.stop - r.start, v.stop - v.start)
        if not fresh and self._product.numel() < shape[0] * shape[1]:
            self._product = self._product.new_empty(shape[0] * shape[1])
        out = self._product.new_empty(shape) if fresh else self._product[: shape[0] * shape[1]].view(shape)
        torch.mm(self.rows[r], self.weight[v].T, out=out)
        return out if self.bias is None else out.add_(self.bias[v])

    def scratch(self, like: torch.Tensor) -> torch.Tensor:
        """Float32 memory of that shape; valid until the next call."""
        if self._scratch.numel() < like.numel():
            self._scratch = self._scratch.new_empty(like.numel())
        return self._scratch[: like.numel()].view(like.shape)


class _OnlineSoftmax:
    """Maximum, sum of exponentials and entropy of rows that are seen one range of columns after the other."""

    def __init__(self, n_rows: int, device: torch.device, with_entropy: bool) -> None:
        self.top = torch.full((n_rows,), torch.finfo(torch.float32).min, device=device)
        self.total = torch.zeros(n_rows, device=device)  # sum of e^(x - top)
        self.moment = torch.zeros(n_rows, device=device) if with_entropy else None  # sum of e^(x - top) (x - top)

    def add(self, logits: torch.Tensor, scratch: torch.Tensor) -> None:
        """Take in columns; ``scratch`` has their shape."""
        top = torch.maximum(self.top, logits.amax(1))
        down = self.top - top
        decay = down.exp()
        shifted = torch.sub(logits, top[:, None], out=scratch)
        if self.moment is None:
            self.total = decay * self.total + shifted.exp_().sum(1)
        else:
            exps = shifted.exp()
            self.moment = decay * (self.moment + down * self.total) + torch.linalg.vecdot(exps, shifted)
            self.total = decay * self.total + exps.sum(1)
        self.top = top

    def lse(self) -> torch.Tensor:
        """log sum e^x"""
        return self.top + self.total.log()

    def entropy(self) -> torch.Tensor:
        """log sum e^x - sum p x, zero where it was not asked for."""
        return torch.zeros_like(self.top) if self.moment is None else self.total.log() - self.moment / self.total


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``; the sum over tiles is float32 whatever the type of the factors."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
