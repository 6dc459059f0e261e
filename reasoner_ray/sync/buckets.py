"""Weights as they travel through Ray's object store: numpy arrays, which Ray maps instead of copying."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some parameters, by Hugging Face checkpoint name. The arrays hold raw bytes, because numpy has no bfloat16."""

    names: list[str]
    dtypes: list[str]  # "float32", "bfloat16", ...
    shapes: list[tuple[int, ...]]
    data: list[np.ndarray]  # uint8, one flat array a parameter

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.data)


def pack_bucket(pairs: Iterable[tuple[str, torch.Tensor]]) -> Bucket:
    """Pack (name, tensor) pairs. Every tensor is copied when it comes: under ZeRO 3 it is gone when the next one does."""
    bucket = Bucket([], [], [], [])
    for name, tensor in pairs:
        _append(bucket, name, tensor)
    return bucket


def _append(bucket: Bucket, name: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1)
    bucket.names.append(name)
    bucket.dtypes.append(str(tensor.dtype).removeprefix("torch."))
    bucket.shapes.append(tuple(tensor.shape))
    bucket.data.append(flat.view(torch.uint8).numpy())


def unpack_bucket(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs of ``bucket``, sharing its memory: read them, never write."""
    for name, dtype, shape, array in zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.data, strict=True):
        with warnings.catch_warnings():
            # The object store's memory is read-only, which PyTorch cannot express; the engine only copies from it.
            warnings.simplefilter("ignore", UserWarning)
            yield name, torch.frombuffer(array, dtype=getattr(torch, dtype)).view(shape)


def make_buckets(state: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Cut ``state`` into buckets of at most ``bucket_bytes`` bytes (a larger single parameter travels alone)."""
    bucket = Bucket([], [], [], [])
    for name, tensor in state:
        if bucket.names and bucket.nbytes + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket = Bucket([], [], [], [])
        _append(bucket, name, tensor)
    if bucket.names:
        yield bucket
