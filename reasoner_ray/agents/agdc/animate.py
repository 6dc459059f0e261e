"""An episode as a GIF: the field, the way and the particles, step by step."""

from __future__ import annotations

from pathlib import Path

import torch

from reasoner_ray.agents.agdc.detection import GoalDetector
from reasoner_ray.agents.agdc.evaluate import Arena
from reasoner_ray.agents.agdc.planners import Policy, View
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.envs.source_term.core import SourceTermBatch
from reasoner_ray.envs.source_term.render import draw_scene, write_gif


def animate(arena: Arena, policy: Policy, seed: int, file: Path) -> bool:
    """Play the episode of ``seed`` and write it to ``file``; says whether the agent ended it."""
    search = SourceTermBatch(arena.environment, 1)
    belief = SourceBelief(arena.belief, arena.environment, 1, tolerance=arena.tolerance)
    detector, one = GoalDetector(belief, arena.rule, arena.feedback, 1), torch.ones(1, dtype=torch.bool)
    detector.seed(seed)
    features = detector.begin(one, search.reset(seeds=[seed]))
    path, frames, ceased, over = [search.position[0].clone()], [], False, False
    while True:
        spread = float(belief.summary().spread[0])
        title = f"step {len(path) - 1}, spread {spread:.2f} m" + (", stopped" if ceased else "")
        way = torch.stack(path).numpy()
        frames.append(draw_scene(arena.environment.scene, search.source[0].numpy(), way, belief.filter.particles[0].numpy(), title))
        if over:
            break
        step = search.step(policy.act(View(search, belief, features)))
        found = detector.advance(one, step.observation)
        features, ceased = found.features, bool(found.ceased[0])
        path.append(search.position[0].clone())
        over = ceased or bool(step.truncated[0])
    write_gif(frames, file)
    return ceased
