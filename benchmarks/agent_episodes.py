"""Many episodes of an environment at once on one CPU engine: environment steps a second, and memory over 10,000 episodes.

The real worker and engine, without Ray: ``--at-once`` episodes run as coroutines, each finished one is followed by another.

FoodPreparation has few states, so as the job stands almost every list of candidates was scored before. In an environment of many states,
with earlier turns in the context, most were not, and the engine works for each action; --small takes a model of random weights for that,
of the same form, so that 10,000 episodes are a matter of minutes:
    python -m benchmarks.agent_episodes --small --job jobs/agents/tomato_lettuce_salad.yaml --name agent_episodes_engine \\
        --set rollout.agent.history_tokens=600 rollout.max_context=1024 rollout.max_turns=4
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks._record import record
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.data.tasks import get_task
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.worker import RolloutWorker, build_engine


async def run(config: JobConfig, episodes: int, at_once: int) -> dict[str, Any]:
    """Play; returns what was measured."""
    settings = EngineSettings.of(config, 0)
    worker = RolloutWorker(config, build_engine("stepping", settings), load_tokenizer(settings.model))
    items, memory, turns, done = get_task(config.task, config.seed).train(), list[float](), 0, 0
    waiting = iter(range(episodes))
    began = time.perf_counter()

    async def player() -> None:
        nonlocal turns, done
        for number in waiting:
            (trajectory,), _ = await worker.run_group(items[number % len(items)], f"g{number}", 1)
            turns += int(trajectory.info["metrics"]["turns"])
            done += 1
            if done % (episodes // 10) == 0:
                memory.append(psutil.Process().memory_info().rss / 2**20)

    await asyncio.gather(*(player() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    requests = worker.stats()["tokens"]  # each scores the next tokens of one node
    worker.close()
    return {
        "episodes": episodes,
        "episodes_at_once": at_once,
        "actions": turns,
        "actions_per_s": turns / seconds,
        "requests_to_the_engine": requests,
        "memory_mib_after_each_tenth": memory,
        "memory_growth_mib_last_nine_tenths": memory[-1] - memory[0],
    }


def small_model(name: str, folder: Path) -> Path:
    """A folder with a random model of ``name``'s architecture and tokenizer, 64 wide and two layers deep."""
    source = resolve_model(name)
    shape = AutoConfig.from_pretrained(source)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for key, value in sizes.items():
        setattr(shape, key, value)
    shape.head_dim = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=256)
    parser.add_argument("--job", default="jobs/agents/food_preparation.yaml")
    parser.add_argument("--small", action="store_true", help="a small random model in place of the job's")
    parser.add_argument("--name", default="agent_episodes", help="of the record")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the job")
    args = parser.parse_args()
    config = load_config(args.job, [f"rollout.max_groups_per_worker={args.at_once}", *args.set])
    with tempfile.TemporaryDirectory() as folder:
        path = small_model(config.model.path, Path(folder)) if args.small else resolve_model(config.model.path)
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
        figures = asyncio.run(run(config, args.episodes, args.at_once))
    record(args.name, settings=vars(args), figures=figures)


if __name__ == "__main__":
    main()
