"""Search trees side by side on one engine, against one tree at a time; and the prompt tokens that shared prefixes save.

The same MCTS-alpha searches with the real model (in float32 on a CPU, in bfloat16 on a GPU): all of them at once, and one after the
other, in turns. Both begin with an empty cache: the engine is reseeded, which sets what was computed before apart. Prompt tokens are
those of every sampled sequence; without sharing all of them would be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._record import ratios, record
from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.data.tasks import Item
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.stepping import SteppingEngine
from reasoner_ray.rollout.worker import RolloutWorker


def job(model: str, trees: int, dtype: str) -> JobConfig:
    """Steps of four tokens, six of them: a tree of a few hundred tokens over a prompt of about a hundred."""
    return parse_config(
        {
            "name": "search-throughput",
            "model": {"path": model, "dtype": dtype},
            "task": {"name": "arithmetic", "args": {"digits": 3, "shots": 8}},
            "rollout": {
                "episode": "search_solutions",
                "max_new_tokens": 24,
                "max_context": 256,
                "stop": ["\n\n\n"],  # nothing ends early, so that both sides do the same work
                "max_groups_per_worker": trees,
            },
            "search": {"method": "mcts_alpha", "settings": {"width": 4, "simulations": 8}, "separator": 4, "depth": 6},
        }
    )


async def run(worker: RolloutWorker, items: Sequence[Item], at_once: int, seed: int) -> dict[str, float]:
    """Search on every item, ``at_once`` at a time; the costs of all of them and the seconds it took."""
    await worker.engine.pause()
    await worker.engine.resume(seed)
    slots = asyncio.Semaphore(at_once)
    total: dict[str, float] = {}

    async def one(number: int, item: Item) -> None:
        async with slots:
            trajectories, _ = await worker.run_group(item, f"{seed}/{number}", 1)
        for name, value in trajectories[0].info["search"]["cost"].items():
            total[name] = total.get(name, 0.0) + value

    began = time.perf_counter()
    await asyncio.gather(*(one(i, item) for i, item in enumerate(items)))
    return {**total, "wall": time.perf_counter() - began}


async def measure(worker: RolloutWorker, trees: int, alone: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of both sides in turns, and the share of prompt tokens computed."""
    items = worker._task.train()[: trees * (repeats + 1)]
    together: list[float] = []
    single: list[float] = []
    computed: list[float] = []
    for number in range(-1, repeats):
        mine = items[(number + 1) * trees :][:trees]
        sides = [("together", mine, trees), ("single", mine[:alone], 1)]
        for name, some, at_once in sides[:: 1 if number % 2 else -1]:
            found = await run(worker, some, at_once, seed=2 * number + 10 + (name == "single"))
            if number < 0:
                continue
            (together if name == "together" else single).append(found["generated"] / found["wall"])
            if name == "together":
                computed.append(found["prompt_computed"] / found["prompt"])
    return {
        "tokens_per_s_together": together,
        "tokens_per_s_one_at_a_time": single,
        "speedup": ratios(together, single),
        "share_of_prompt_tokens_computed": computed,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--trees", type=int, default=64, help="at once")
    parser.add_argument("--alone", type=int, default=8, help="trees of the other side, whose tokens a second do not depend on their number")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dtype = "bfloat16" if cuda else "float32"
    config = job(args.model, args.trees, dtype)
    model = resolve_model(args.model)
    engine = SteppingEngine(EngineSettings(model=model, dtype=dtype, max_context=256, seed=1, gpu_memory_utilization=0.3))
    try:
        worker = RolloutWorker(config, engine, load_tokenizer(model))
        figures = asyncio.run(measure(worker, args.trees, args.alone, args.repeats))
    finally:
        engine.shutdown()
    name = "search_throughput_cuda" if cuda else "search_throughput"
    record(name, settings={**vars(args), "dtype": dtype, "search": config.search.model_dump()}, figures=figures)


if __name__ == "__main__":
    main()
