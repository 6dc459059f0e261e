"""Rollout pool against bare in-process vLLM: tokens a second on the same requests.

Claim: the pool (Ray actor, episodes, trajectories, versions) costs at most a tenth of what ``LLM.generate`` gives.
Both sides run the same model in the same engine settings, each in a process of its own, and take turns: while one
works, the other's threads sleep. A request is one sample; 8 samples share a prompt, on both sides.

    python -m benchmarks.rollout_pool [--requests 64 256] [--rounds 3] [--tokens 24] [--model builtin:smollm2-135m]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks._record import ratios, record

GROUP = 8


def job(model: str, tokens: int) -> Any:
    """The configuration of both sides: answers of a fixed length, so that both do the same work."""
    from reasoner_ray.config import parse_config

    rollout = {"max_context": 512, "max_new_tokens": tokens, "stop": ["\x00 never"], "max_groups_per_worker": 256}
    return parse_config({"model": {"path": model}, "rollout": rollout})


def items_of(config: Any, requests: int, seed: int) -> list[Any]:
    """``requests / GROUP`` prompts of the arithmetic task, others in every round."""
    from reasoner_ray.data.tasks import DataOrder, get_task

    order = DataOrder(get_task(config.task, config.seed).train(), seed)
    return [order[i] for i in range(requests // GROUP)]


def bare(pipe: Connection, config: Any, threads: int) -> None:
    """The other process: plain ``vllm.LLM``; answers (requests, seed) with (tokens, seconds)."""
    from reasoner_ray import settings

    os.environ.update(settings.engine_environment(in_process=True, cpu=True))
    import torch
    from vllm import LLM, SamplingParams

    import reasoner_ray.rollout.cpu_attention  # the same KV blocks as the pool's engine
    import reasoner_ray.sync.weights  # noqa: F401 - registers the backend that the arguments name
    from reasoner_ray.data.tasks import get_task
    from reasoner_ray.models import load_tokenizer
    from reasoner_ray.rollout.engine import EngineSettings, vllm_arguments

    torch.set_num_threads(threads)
    engine = EngineSettings.of(config, 0)
    llm = LLM(**vllm_arguments(engine, cpu=True), distributed_executor_backend="uni")
    task, tokenizer = get_task(config.task, config.seed), load_tokenizer(engine.model)
    params = SamplingParams(
        n=GROUP, max_tokens=config.rollout.max_new_tokens, logprobs=0, stop=list(config.rollout.stop), include_stop_str_in_output=True
    )
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        prompts = [{"prompt_token_ids": task.render(item, tokenizer)} for item in items_of(config, *order)]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        pipe.send((sum(len(c.token_ids) for o in outputs for c in o.outputs), seconds))


async def pooled(pool: Any, config: Any, requests: int, seed: int) -> tuple[int, float]:
    """The same requests through the pool: from submission to trajectories in the object store."""
    items = items_of(config, requests, seed)
    began = time.perf_counter()
    await pool.pause()
    calls = [pool.submit(item, f"{seed}-{i}", GROUP) for i, item in enumerate(items)]
    await pool.resume()
    results = await asyncio.gather(*(pool.finish(call) for call in calls))
    seconds = time.perf_counter() - began
    return sum(sum(r.summary["lengths"]) for r in results), seconds


async def measure(config: Any, other: Any, pipe: Connection, requests: list[int], rounds: int) -> dict[str, Any]:
    """Alternate the sides; every round has prompts neither side has seen."""
    from reasoner_ray.rollout.pool import RolloutPool

    pool = RolloutPool(config)
    await pool.start()
    await pool.assume_synced(version=0)
    other.start()  # one after the other: two models loading at once are slower than in turn
    if pipe.recv() != "ready":
        raise RuntimeError("the bare side did not start")
    figures: dict[str, Any] = {}
    for n in requests:
        rates: dict[str, list[float]] = {"bare": [], "pool": []}
        for number in range(rounds + 1):
            for side in ("bare", "pool") if number % 2 else ("pool", "bare"):
                if side == "pool":
                    tokens, seconds = await pooled(pool, config, n, number)
                else:
                    pipe.send((n, number))
                    while not pipe.poll():
                        await asyncio.sleep(0.05)
                    tokens, seconds = pipe.recv()
                if number:  # the first round warms both up
                    rates[side].append(tokens / seconds)
        figures |= {f"{side} tokens/s, {n} requests": values for side, values in rates.items()}
        figures[f"pool / bare, {n} requests"] = ratios(rates["pool"], rates["bare"])
    await pool.stop()
    return figures


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    options = parser.parse_args()

    import ray

    from reasoner_ray.settings import usable_cores

    config, threads = job(options.model, options.tokens), usable_cores()
    here, there = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=bare, args=(there, config, threads), daemon=True)
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        figures = asyncio.run(measure(config, other, here, options.requests, options.rounds))
    finally:
        other.kill()
        ray.shutdown()
    record("rollout_pool", {**vars(options), "samples a prompt": GROUP, "threads": threads, "dtype": "as the machine has it"}, figures)


if __name__ == "__main__":
    main()
