"""Chunked log-probs and entropies equal the plain ones, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.learner import logprobs as module
from reasoner_ray.learner.logprobs import chunked_logprobs


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    predictors: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden[predictors] @ weight.T
    logp = torch.log_softmax((logits if bias is None else logits + bias) / temperature, dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 12),
    k=st.integers(0, 30),
    chunk=st.integers(1, 16),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    with_bias=st.booleans(),
    use_entropy=st.booleans(),
    tile=st.tuples(st.integers(1, 8), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_equal_plain(
    n: int, k: int, chunk: int, temperature: float, with_bias: bool, use_entropy: bool, tile: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=generator)
    weight = torch.randn(19, 8, generator=generator)
    bias = torch.randn(19, generator=generator) if with_bias else None
    predictors = torch.randint(n, (k,), generator=generator)
    targets = torch.randint(19, (k,), generator=generator)
    upstream = torch.randn(2, k, generator=generator)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_ROWS", tile[0])
        patch.setitem(module._TILE_ELEMENTS, "cpu", tile[1])
        for compute in (plain, None):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight) + (() if bias is None else (bias,))]
            b = leaves[2] if with_bias else None
            if compute is None:
                logprobs, entropy = chunked_logprobs(
                    leaves[0], leaves[1], predictors, targets, temperature=temperature, chunk=chunk, bias=b
                )
            else:
                logprobs, entropy = compute(leaves[0], leaves[1], predictors, targets, temperature, b)
            loss = (logprobs * upstream[0]).sum()
            if use_entropy:
                loss = loss + (entropy * upstream[1]).sum()
            loss.backward()
            results.append([logprobs.detach(), entropy.detach(), *(x.grad for x in leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_entropy_alone_has_gradients() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    predictors, targets = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 3])
    grads = []
    for compute in (lambda h: plain(h, weight, predictors, targets, 1.0, None), lambda h: chunked_logprobs(h, weight, predictors, targets)):
        leaf = hidden.clone().requires_grad_()
        compute(leaf)[1].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_only_what_was_not_kept_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    original = module._Tiles.product

    def product(tiles: Any, r: slice, v: slice, *, fresh: bool = False) -> torch.Tensor:
        out = original(tiles, r, v, fresh=fresh)
        assert out.numel() <= 20
        kept.append(out.numel() if fresh else 0)
        return out

    monkeypatch.setattr(module._Tiles, "product", product)
    monkeypatch.setitem(module._TILE_ELEMENTS, "cpu", 20)
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    predictors = torch.arange(10).repeat_interleave(4)  # ten positions predict forty tokens
    logprobs, _ = chunked_logprobs(hidden, weight, predictors, torch.zeros(40, dtype=torch.int64), chunk=6)
    assert kept == [20, 20, 0, 0]  # four tiles of 10 rows and 2 columns; 6 of 10 rows' logits may be kept
    logprobs.sum().backward()
    assert kept[4:] == [0, 0]
    kept.clear()
    with torch.no_grad():
        chunked_logprobs(hidden, weight, predictors, torch.zeros(40, dtype=torch.int64), chunk=6)
    assert not any(kept)


def test_bfloat16_autocast_is_close_and_returns_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16), torch.randn(50, 16)
    predictors, targets = torch.randint(30, (40,)), torch.randint(50, (40,))
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    low = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected, _ = plain(exact[0], exact[1], predictors, targets, 1.0, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, entropy = chunked_logprobs(low[0], low[1], predictors, targets, chunk=8)
    assert got.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
    expected.mean().backward()
    got.mean().backward()
    for a, b in zip(exact, low, strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * a.grad.norm()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.tensor([0, 1]), torch.tensor([1, 1]), chunk=1)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert logprobs.tolist() == [-2e4, 0.0]
