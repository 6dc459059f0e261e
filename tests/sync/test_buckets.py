"""Packing weights for the object store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reasoner_ray.sync.buckets import make_buckets, pack_bucket, unpack_bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype: torch.dtype) -> None:
    state = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "scalar": torch.tensor(2.0).to(dtype)}
    back = dict(unpack_bucket(pack_bucket(state.items())))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)


def test_buckets_hold_every_parameter_once_and_obey_the_limit() -> None:
    state = [(f"w{i}", torch.full((i + 1,), float(i))) for i in range(20)]
    buckets = list(make_buckets(state, bucket_bytes=100))
    assert [name for bucket in buckets for name in bucket.names] == [name for name, _ in state]
    assert all(bucket.nbytes <= 100 or len(bucket.names) == 1 for bucket in buckets)


def test_a_transposed_tensor_travels_as_it_reads() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    ((_, back),) = unpack_bucket(pack_bucket([("t", tensor)]))
    assert torch.equal(back, tensor)


def test_a_tensor_that_changes_after_it_was_yielded_travels_as_it_was() -> None:
    gathered = torch.zeros(4)

    def state() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            gathered.fill_(i)
            yield f"w{i}", gathered
            gathered.fill_(-1)  # as ZeRO 3 frees what it gathered

    (bucket,) = make_buckets(state(), 10**6)
    assert [float(t[0]) for _, t in unpack_bucket(bucket)] == [0.0, 1.0, 2.0]
