"""Scoring lists of candidates: by the nodes of their token tree, against each candidate as a request of its own.

Every observation of FoodPreparation that a random policy meets, with its list of admissible actions; the real model in
float32, all lists at once, sides alternating. The other side asks vLLM for the log-probs of prompt and candidate. Both
begin with an empty cache for the prompts of the round: each round's prompts differ in one word at their beginning.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from benchmarks._agents import Encoder, play
from benchmarks._record import ratios, record
from reasoner_ray.choices import Candidates
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.rollout.admissible import CandidateScorer
from reasoner_ray.rollout.engine import EngineSettings
from reasoner_ray.rollout.stepping import SteppingEngine

Lists = list[tuple[list[int], Candidates]]


async def by_nodes(engine: SteppingEngine, lists: Lists) -> list[float]:
    """Our way: the language model's log-prob of every candidate."""
    scorer = CandidateScorer(engine)
    found = await asyncio.gather(*(scorer.token_logprobs(prompt, candidates) for prompt, candidates in lists))
    sums = []
    for (_, candidates), values in zip(lists, found, strict=True):
        at = 0
        for candidate in candidates:
            sums.append(sum(values[at : at + len(candidate)]))
            at += len(candidate)
    return sums


async def by_candidates(engine: SteppingEngine, lists: Lists) -> list[float]:
    """A request for each candidate."""
    pairs = [(prompt, c) for prompt, candidates in lists for c in candidates]
    found = await asyncio.gather(*(engine.prompt_logprobs([*prompt, *c]) for prompt, c in pairs))
    return [sum(values[-len(c) :]) for values, (_, c) in zip(found, pairs, strict=True)]


async def measure(engine: SteppingEngine, encoder: Encoder, repeats: int) -> dict[str, Any]:
    """Seconds of both sides, round by round, and the largest difference between their numbers."""
    states = {observation: actions for episode in play(20_000) for observation, actions in episode}
    seconds: dict[str, list[float]] = {"nodes": [], "candidates": []}
    largest = 0.0
    for number in range(-1, repeats):
        lists = [(encoder.prompt(f"Day {number + 2}. {o}"), encoder.candidates(a)[0]) for o, a in states.items()]
        results = {}
        for name, side in (("nodes", by_nodes), ("candidates", by_candidates))[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            results[name] = await side(engine, lists)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
        largest = max(largest, *(abs(a - b) for a, b in zip(results["nodes"], results["candidates"], strict=True)))
    return {
        "lists": len(states),
        "candidates": sum(map(len, states.values())),
        "seconds_by_nodes": seconds["nodes"],
        "seconds_by_candidates": seconds["candidates"],
        "speedup": ratios(seconds["candidates"], seconds["nodes"]),
        "largest_difference_nats": largest,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = resolve_model(args.model)
    engine = SteppingEngine(EngineSettings(model=model, dtype="float32", max_context=512))
    try:
        figures = asyncio.run(measure(engine, Encoder(load_tokenizer(model)), args.repeats))
    finally:
        engine.shutdown()
    record("candidate_scoring", settings={**vars(args), "dtype": "float32"}, figures=figures)


if __name__ == "__main__":
    main()
