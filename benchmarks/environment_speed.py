"""Steps a second of each finite environment in one process, with random actions from its lists.

As an episode runs them: made by Gymnasium, reset when over. The first pass, in which states are met for the first time, is
not counted. A step of a salad is a macro action of about four steps.
"""

from __future__ import annotations

import argparse
import random
import time

import gymnasium

from benchmarks._record import record
from reasoner_ray.envs import ENTRY_POINTS
from reasoner_ray.envs.player import BUILT_IN


def steps_per_second(env_id: str, steps: int, repeats: int) -> list[float]:
    """Throughput of each of ``repeats`` passes of ``steps`` steps, after one to warm up."""
    env, source, rates = gymnasium.make(env_id), random.Random(0), []
    for _ in range(repeats + 1):
        _, info = env.reset(seed=0)
        began = time.perf_counter()
        for _ in range(steps):
            _, _, terminated, truncated, info = env.step(source.choice(info["admissible"]))
            if terminated or truncated:
                _, info = env.reset()
        rates.append(steps / (time.perf_counter() - began))
    return rates[1:]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500_000, help="steps of a pass")
    parser.add_argument("--repeats", type=int, default=5, help="passes a throughput is measured over")
    args = parser.parse_args()
    finite = [name for name, entry_point in ENTRY_POINTS.items() if entry_point.startswith(BUILT_IN)]
    figures = {f"{name}_steps_per_s": steps_per_second(f"reasoner_ray/{name}-v0", args.steps, args.repeats) for name in finite}
    record("environment_speed", settings={"steps": args.steps, "repeats": args.repeats, "processes": 1}, figures=figures)


if __name__ == "__main__":
    main()
