"""An episode as a GIF, step by step: of SourceTerm the field, the way and the particles."""

from __future__ import annotations

from pathlib import Path

import torch

from reasoner_ray.agents.agdc.detection import GoalDetector
from reasoner_ray.agents.agdc.evaluate import Arena
from reasoner_ray.agents.agdc.problem import Policy, View
from reasoner_ray.pictures import write_gif


def animate(arena: Arena, policy: Policy, seed: int, file: Path) -> bool:
    """Play the episode of ``seed`` and write it to ``file``; says whether the agent ended it."""
    search, belief = arena.problem.search(1), arena.problem.belief(1)
    detector, one = GoalDetector(belief, arena.rule, arena.feedback, 1), torch.ones(1, dtype=torch.bool)
    detector.seed(seed)
    features = detector.begin(one, search.reset(seeds=[seed]))
    path, frames, ceased, over = [search.position[0].clone()], [], False, False
    while True:
        spread = float(belief.summary().spread[0])
        title = f"step {len(path) - 1}, spread {spread:.2f}" + (", stopped" if ceased else "")
        frames.append(arena.problem.picture(search, belief, torch.stack(path), title))
        if over:
            break
        step = search.step(policy.act(View(search, belief, features)))
        found = detector.advance(one, step.observation)
        features, ceased = found.features, bool(found.ceased[0])
        path.append(search.position[0].clone())
        over = ceased or bool(step.truncated[0])
    write_gif(frames, file)
    return ceased
