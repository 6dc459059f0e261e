"""What only a GPU can show. One is enough: an engine and a learner rank share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from reasoner_ray.learner.attention import TreeMask, tree_attention
from reasoner_ray.packing import pack
from tests.forest import CASES
from tests.test_runs import Run, job, start  # noqa: F401 - a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OF_A_GPU = ["model.dtype=bfloat16", "rollout.gpu_memory_utilization=0.1", "rollout.probe_seconds=120", "sync.probe_every=1"]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_flex_attention_equals_sdpa(case: str, window: int | None) -> None:
    """Forward and backward, on packed trees of every shape that training meets."""
    batch = pack(CASES[case](), tokens_per_microbatch=4096)[0].padded(128).to("cuda")
    made, found = torch.Generator("cuda").manual_seed(0), []
    drawn = [torch.randn(1, heads, batch.n_packed, 32, generator=made, device="cuda") for heads in (4, 2, 2)]
    upstream = torch.randn(1, batch.n_packed, 4, 32, generator=made, device="cuda")
    real = (batch.subtree_end > torch.arange(batch.n_packed, device="cuda"))[None, :, None, None]
    for backend in ("flex", "sdpa"):
        qkv = [x.clone().requires_grad_() for x in drawn]
        mask = TreeMask(batch.subtree_end, batch.position_ids, backend)
        out = tree_attention(nn.Module(), *qkv, None, scaling=0.3, tree=mask, sliding_window=window)[0] * real
        (out * upstream).sum().backward()
        found.append([out.detach(), *(x.grad for x in qkv)])
    for flex, sdpa in zip(*found, strict=True):
        torch.testing.assert_close(flex, sdpa, rtol=2e-2, atol=2e-2)  # as it passed on an H200


@pytest.mark.parametrize("backend", ["auto", "object_store"])
@pytest.mark.timeout(600)
def test_a_job_trains_on_one_gpu(backend: str, tmp_path: Path, tiny_model_dir: Path, start: Callable[..., Run]) -> None:  # noqa: F811
    """The run itself compares the engine's log-probs with the learner's after every sync, and ends where they differ."""
    run = start(job(tmp_path, tiny_model_dir, steps=3), *OF_A_GPU, f"sync.backend={backend}")
    assert run.wait(280) == 0, run.log.read_text()[-6000:]
    assert run.steps == [1, 2, 3]
    assert all(abs(record["mismatch/k3"]) < 0.01 for record in run.records)
    assert all(math.isfinite(record["reward/mean"]) for record in run.records)
    taken = "ipc" if backend == "auto" else backend
    assert f"sync.backend={taken}" in run.log.read_text(), "that actors share the GPU is said"


@pytest.mark.timeout(900)
def test_an_engine_that_dies_on_a_shared_gpu_comes_back(tmp_path: Path, tiny_model_dir: Path, start: Callable[..., Run]) -> None:  # noqa: F811
    run = start(job(tmp_path, tiny_model_dir, steps=40, checkpoint_every=0), *OF_A_GPU)
    run.wait_for(lambda: 3 in run.steps, 200)
    run.kill_actor("RolloutActor")
    assert run.wait(280) == 0, run.log.read_text()[-6000:]
    assert run.steps == list(range(1, 41))
