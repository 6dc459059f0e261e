"""The attention rule of a packed forest equals attention over each trajectory alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reasoner_ray.errors import ModelError
from reasoner_ray.learner import attention
from reasoner_ray.learner.attention import TreeMask, tree_attention
from reasoner_ray.packing import Batch, pack
from reasoner_ray.trajectory import Trajectory
from tests.forest import CASES, answers, forests, trajectory


def run(batch: Batch, backend: Any, window: int | None, qkv: tuple[torch.Tensor, ...]) -> torch.Tensor:
    mask = TreeMask(batch.subtree_end, batch.position_ids, backend)
    return tree_attention(nn.Module(), *qkv, None, scaling=0.3, tree=mask, sliding_window=window)[0]


def alone(batch: Batch, window: int | None, qkv: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each token's attention over its own context, one token at a time: [1, N, H, D]."""
    query, key, value = qkv
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    rows = []
    for i in range(batch.n_packed):
        context = [j for j in range(i + 1) if i < batch.subtree_end[j]][-(window or batch.n_packed) :]
        weights = F.softmax((query[:, :, i : i + 1] @ key[:, :, context].transpose(2, 3)) * 0.3, dim=-1)
        rows.append(weights @ value[:, :, context])
    return torch.cat(rows, 2).transpose(1, 2)


def random_qkv(n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, n, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))


def assert_same(batch: Batch, window: int | None) -> None:
    results = []
    upstream = torch.randn(1, batch.n_packed, 4, 8, generator=torch.Generator().manual_seed(1))
    for compute in (lambda qkv: alone(batch, window, qkv), lambda qkv: run(batch, "sdpa", window, qkv)):
        qkv = random_qkv(batch.n_packed)
        out = compute(qkv)
        (out * upstream).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(trajectories=forests(), block=st.integers(1, 9), window=st.sampled_from([None, 1, 3]))
def test_any_forest_equals_each_token_alone(trajectories: list[Trajectory], block: int, window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_QUERY_BLOCK", block)
        for batch in pack(trajectories, tokens_per_microbatch=1000):
            assert_same(batch, window)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 4])
def test_flex_follows_the_same_rule(case: str, window: int | None) -> None:
    batch = pack(CASES[case](), tokens_per_microbatch=1000)[0]
    with torch.no_grad():  # FlexAttention has no backward pass on CPUs
        qkv = tuple(x.detach() for x in random_qkv(batch.n_packed))
        torch.testing.assert_close(run(batch, "flex", window, qkv), alone(batch, window, qkv), rtol=1e-5, atol=1e-5)


def test_a_block_gathers_its_ancestors_and_itself_only() -> None:
    prompts = answers(0, 20, 30)
    trajectories = [trajectory([(p, a)], group=str(i)) for i, p in enumerate(prompts) for a in answers(i, 8, 20)]
    batch = pack(trajectories, tokens_per_microbatch=10**6)[0]
    blocks = TreeMask(batch.subtree_end, batch.position_ids).blocks(None, torch.float32)
    assert batch.n_packed > 3000
    assert max(blocks.sizes) <= attention._QUERY_BLOCK + 50  # 50: the deepest context
    assert [b.shape[-1] for b in blocks.biases] == blocks.sizes


def test_training_in_bfloat16_on_a_cpu_rounds_only_what_goes_in_and_out() -> None:
    batch = pack(CASES["tree_paths"](), tokens_per_microbatch=1000)[0]
    upstream = torch.randn(1, batch.n_packed, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for compute in (lambda qkv: alone(batch, None, tuple(x.float() for x in qkv)), lambda qkv: run(batch, "sdpa", None, qkv)):
        qkv = tuple(x.detach().bfloat16().requires_grad_() for x in random_qkv(batch.n_packed))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(results)):
            out = compute(qkv)
        out.backward(upstream.to(out.dtype))
        results.append([out.detach().bfloat16(), *(x.grad for x in qkv)])
    for i, (expected, got) in enumerate(zip(*results, strict=True)):
        # Heads that share keys and values add up the gradients of those in bfloat16.
        rtol, atol = (2**-8, 2**-10) if i < 2 else (2**-6, 2**-6)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_masks_are_built_once_for_all_layers() -> None:
    batch = pack(CASES["tree_paths"](), tokens_per_microbatch=1000)[0]
    mask = TreeMask(batch.subtree_end, batch.position_ids)
    assert mask.blocks(None, torch.float32) is mask.blocks(None, torch.float32)
    assert mask.block_mask(None) is mask.block_mask(None)


def test_layers_that_the_rule_cannot_express_are_refused() -> None:
    batch = pack(CASES["alone"](), tokens_per_microbatch=1000)[0]
    mask = TreeMask(batch.subtree_end, batch.position_ids)
    with pytest.raises(ModelError, match="softcap"):
        tree_attention(nn.Module(), *random_qkv(batch.n_packed), None, tree=mask, softcap=30.0)
    with pytest.raises(ModelError, match="packed row"):
        tree_attention(nn.Module(), *random_qkv(4), None)
