"""Helpers for tests with a real vLLM engine on the tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.sync.buckets import Bucket, make_buckets


def tiny_settings(folder: Path, **changes: Any) -> EngineSettings:
    return EngineSettings(**{"model": folder, "dtype": "float32", "max_context": 256, "kv_cache_gb": 0.05, "max_running": 32, **changes})


def state_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint names and tensors, a tied LM head left out."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            yield name, parameter.detach()


async def buckets_of(state: Iterable[tuple[str, torch.Tensor]], size: int = 40_000) -> AsyncIterator[Bucket]:
    for bucket in make_buckets(state, size):
        yield bucket


async def load(engine: Any, model: torch.nn.Module, version: int | None = None) -> None:
    """Bring the weights of ``model`` to an idle engine, by default as its next version."""
    await engine.pause()
    await engine.update_weights(buckets_of(state_of(model)), engine.version + 1 if version is None else version)
    await engine.resume()


def change_every_parameter(model: torch.nn.Module, seed: int) -> None:
    """Move every single weight, by about a tenth of its tensor's spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 * float(parameter.std()) + 0.01
            parameter += scale * (torch.randn(parameter.shape, generator=generator) + 0.1)


def reference_logprobs(model: Any, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p of ``tokens`` after ``prompt`` by a Hugging Face forward pass, [L]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].float() / temperature
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return steps.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
