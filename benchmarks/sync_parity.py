"""Parity after each weight sync: rollout against learner log-probs, every parameter changed before each sync.

Claims: in float32 the largest difference stays below 1e-3 nats; in bfloat16 the k3 mismatch stays below 5e-3.
The engine samples at temperature 1; a Hugging Face forward pass with the learner's weights scores the same tokens.
bfloat16 is run on fewer tokens where the machine only emulates it.

    python -m benchmarks.sync_parity [--syncs 3] [--dtypes float32 bfloat16] [--model builtin:smollm2-135m]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

from benchmarks._record import record

LIMITS = {"float32": ("max_abs", 1e-3), "bfloat16": ("k3", 5e-3)}


def change_every_parameter(model: Any, seed: int) -> None:
    """Move every weight by about 1 % of its tensor's spread: as much as many optimiser steps, and the model stays sane."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = 0.01 * (float(parameter.float().std()) + 1e-3)
            noise = torch.randn(parameter.shape, generator=generator)
            moved = parameter + (step * (noise + noise.sign())).to(parameter.dtype)
            # Steps too small for bfloat16 are rounded away: those weights move by a few units in the last place.
            parameter.copy_(torch.where(moved == parameter, moved * (1 + 2**-6), moved))


async def buckets_of(model: Any) -> AsyncIterator[Any]:
    """The learner's weights as they travel; a tied head goes once, under the embedding's name."""
    from reasoner_ray.sync.buckets import make_buckets

    for bucket in make_buckets(model.named_parameters(), 2**28):
        yield bucket


async def compare(engine: Any, model: Any, prompts: list[list[int]], samples: int, tokens: int) -> dict[str, float]:
    """Mean and largest |difference| and the k3 estimate of KL(rollout || learner) over freshly sampled tokens."""
    import torch

    from reasoner_ray.rollout.engine import Sampling

    groups = await asyncio.gather(*(engine.generate(p, Sampling(max_new_tokens=tokens), samples) for p in prompts))
    differences = []
    for prompt, group in zip(prompts, groups, strict=True):
        for g in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + g.tokens])).logits[0, len(prompt) - 1 : -1].float()
            learner = logits.log_softmax(-1).gather(-1, torch.tensor(g.tokens)[:, None])[:, 0]
            differences.append(learner - torch.tensor(g.logprobs))
    d = torch.cat(differences)
    return {
        "mean_abs": float(d.abs().mean()),
        "max_abs": float(d.abs().max()),
        "k3": float((d.exp() - 1 - d).mean()),
        "tokens": float(len(d)),
    }


async def run(dtype: str, model_name: str, syncs: int, prompts: int, samples: int, tokens: int) -> list[dict[str, float]]:
    """Before any sync, then after each."""
    import torch
    from transformers import AutoModelForCausalLM

    from reasoner_ray.config import parse_config
    from reasoner_ray.data.tasks import get_task
    from reasoner_ray.models import load_tokenizer
    from reasoner_ray.rollout.engine import EngineSettings
    from reasoner_ray.rollout.stepping import SteppingEngine

    config = parse_config({"model": {"path": model_name, "dtype": dtype}, "rollout": {"max_context": 256, "max_new_tokens": tokens}})
    settings = EngineSettings.of(config, 0)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, dtype)).eval()
    engine, task, tokenizer = SteppingEngine(settings), get_task(config.task, 0), load_tokenizer(settings.model)
    contexts = [task.render(item, tokenizer) for item in task.train()[:prompts]]
    results = [await compare(engine, model, contexts, samples, tokens)]
    for version in range(1, syncs + 1):
        before = [p.detach().clone() for p in model.parameters()]
        change_every_parameter(model, version)
        changed = sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))
        total = sum(p.numel() for p in model.parameters())
        await engine.pause()
        await engine.update_weights(buckets_of(model), version)
        await engine.resume()
        results.append({**await compare(engine, model, contexts, samples, tokens), "changed": changed / total})
    engine.shutdown()
    return results


def in_process(dtype: str, model_name: str, syncs: int, sizes: tuple[int, int, int], answer: Any) -> None:
    """An engine of each dtype needs a process of its own."""
    answer.put(json.dumps(asyncio.run(run(dtype, model_name, syncs, *sizes))))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    options = parser.parse_args()

    from reasoner_ray.models import has_native_bfloat16

    figures: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for dtype in options.dtypes:
        slow = dtype == "bfloat16" and not has_native_bfloat16()
        sizes = (4, 4, 16) if slow else (8, 8, 16)
        answer = context.Queue()
        child = context.Process(target=in_process, args=(dtype, options.model, 1 if slow else options.syncs, sizes, answer))
        child.start()
        results = json.loads(answer.get())
        child.join()
        key, limit = LIMITS[dtype]
        figures |= {f"{dtype} {name}, before and after each sync": [r[name] for r in results] for name in ("mean_abs", "max_abs", "k3")}
        figures |= {
            f"{dtype} worst {key} (limit {limit:g})": max(r[key] for r in results),
            f"{dtype} tokens compared each time": results[0]["tokens"],
            f"{dtype} share of weights changed before a sync, least": min(r["changed"] for r in results[1:]),
        }
    record("sync_parity", vars(options), figures)


if __name__ == "__main__":
    main()
