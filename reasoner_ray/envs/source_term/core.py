"""The search for a plume's source, many episodes at once, as tensors. The Gymnasium environments are views of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reasoner_ray.envs.source_term.plume import PHI, Q, U, X, Y, Z, concentration, read_sensor
from reasoner_ray.envs.source_term.plume import TAU as LIFETIME
from reasoner_ray.envs.source_term.plume import D as DIFFUSIVITY
from reasoner_ray.envs.source_term.settings import Range, SourceTermConfig
from reasoner_ray.errors import ConfigError, EnvironmentFault

MOVES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
"""Directions of the four discrete moves."""
MAX_DRAWS = 10_000
"""Of start and source, before an episode is given up for lack of a pair that is far enough apart."""
ROUNDING = 1e-4
"""By which a heading may pass pi."""
OBSERVATION = ("x", "y", "reading", "wind estimate", "direction estimate", "diffusivity estimate", "lifetime estimate")


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of E episodes led to."""

    observation: torch.Tensor  # float32 [E, 7], OBSERVATION
    reward: torch.Tensor  # float32 [E]
    truncated: torch.Tensor  # bool [E]; the limit on steps was reached
    travelled: torch.Tensor  # float32 [E]; m, of this step


class SourceTermBatch:
    """E episodes that go step by step, each with a random stream of its own.

    An episode depends on its seed alone, not on how many run beside it. There is no goal in it: it ends at ``max_steps`` unless someone
    resets it before. All draws of an episode are made when it begins, on the CPU, so that devices agree too.
    """

    def __init__(self, config: SourceTermConfig, n: int, device: str | torch.device = "cpu") -> None:
        self.config, self.n, self.device = config, n, torch.device(device)
        self._streams = [torch.Generator() for _ in range(n)]
        for stream in self._streams:
            stream.seed()
        self.source = torch.zeros(n, 8, device=self.device)
        """The true parameters, ``plume.PARAMETERS``."""
        self.estimates = torch.zeros(n, 4, device=self.device)
        """What is known of wind, direction (radians), diffusivity and lifetime."""
        self.position = torch.zeros(n, 2, device=self.device)
        self.elapsed = torch.zeros(n, dtype=torch.long, device=self.device)
        self.reading = torch.zeros(n, device=self.device)
        self._noise = torch.zeros(n, config.max_steps + 1, 2, device=self.device)
        self._moves = MOVES.to(self.device) * config.speed
        self._limits = torch.tensor([config.scene.width, config.scene.height], device=self.device)

    @property
    def distance(self) -> torch.Tensor:
        """Distance (m) in the plane from the agent to the source, [E]."""
        return torch.linalg.vector_norm(self.position - self.source[:, :2], dim=-1)

    def reset(self, mask: torch.Tensor | None = None, seeds: Sequence[int | None] | None = None) -> torch.Tensor:
        """Begin the episodes in ``mask`` [E] (all without one), those with a seed from it; returns the observation [E, 7]."""
        chosen = range(self.n) if mask is None else mask.nonzero().flatten().tolist()
        for i in chosen:
            if seeds is not None and seeds[i] is not None:
                self._streams[i].manual_seed(int(seeds[i]))  # type: ignore[arg-type]
            start, source, estimates, noise = self._draw(self._streams[i])
            self.position[i], self.source[i], self.estimates[i], self._noise[i] = start, source, estimates, noise
        rows = torch.as_tensor(list(chosen), dtype=torch.long, device=self.device)
        self.elapsed[rows] = 0
        self._sense(rows)
        return self.observe()

    def step(self, actions: torch.Tensor) -> Step:
        """Move and sense: ``actions`` are int64 [E] (index of a move) or float32 [E] (heading in radians, from -pi to pi).

        Raises ``EnvironmentFault`` where one is no action.
        """
        self._check(actions)
        if self.config.moves == "discrete":
            move = self._moves[actions]
        else:
            heading = actions.float()
            move = self.config.speed * torch.stack([torch.cos(heading), torch.sin(heading)], dim=-1)
        before, distance = self.position, self.distance
        self.position = torch.minimum((before + move).clamp_min(0.0), self._limits)
        self.elapsed = (self.elapsed + 1).clamp_max(self.config.max_steps)
        self._sense(torch.arange(self.n, device=self.device))
        travelled = torch.linalg.vector_norm(self.position - before, dim=-1)
        reward = distance - self.distance if self.config.reward == "approach" else -torch.ones_like(travelled)
        return Step(self.observe(), reward, self.elapsed >= self.config.max_steps, travelled)

    def _check(self, actions: torch.Tensor) -> None:
        if self.config.moves == "discrete":
            fine, what = (actions >= 0) & (actions < len(MOVES)), f"the index of one of {len(MOVES)} moves"
        else:
            fine, what = actions.abs() <= math.pi + ROUNDING, "a heading between -pi and pi"  # false for NaN
        if not bool(fine.all()):
            raise EnvironmentFault(f"SourceTerm takes {what}, not {actions[~fine][0].item()}: the policy has diverged, or acts for others")

    def observe(self) -> torch.Tensor:
        """What the agents know now, float32 [E, 7]."""
        return torch.cat([self.position, self.reading[:, None], self.estimates], dim=-1)

    def _sense(self, rows: torch.Tensor) -> None:
        noise = self._noise[rows, self.elapsed[rows]]
        mean = concentration(self.source[rows], at_ground(self.position[rows]))
        self.reading[rows] = read_sensor(mean, noise[:, 0], noise[:, 1], self.config.sensor)

    def _draw(self, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A start [2], a source [8], estimates [4] and the sensor's draws [T + 1, 2] of an episode."""
        scene, prior = self.config.scene, self.config.prior
        source = torch.zeros(8)
        fixed = ((Q, scene.strength), (U, scene.wind), (DIFFUSIVITY, scene.diffusivity), (LIFETIME, scene.lifetime), (Z, scene.z))
        for place, limits in fixed:
            source[place] = _uniform(limits, stream)
        source[PHI] = math.radians(_uniform(scene.direction, stream))
        start = self._draw_places(source, stream)
        error = torch.zeros(4)
        if not prior.centred:  # the truth lies where the prior around the estimate says it may
            normal = torch.randn(2, generator=stream)
            error[0], error[1] = prior.wind_sd * normal[0], math.radians(prior.direction_sd) * normal[1]
            error[2] = _uniform((0.0, prior.diffusivity_width), stream)
            error[3] = -_uniform((0.0, prior.lifetime_width), stream)
        estimates = source[[U, PHI, DIFFUSIVITY, LIFETIME]] - error
        estimates[0] = estimates[0].clamp_min(0.0)
        noise = torch.stack(
            [torch.randn(self.config.max_steps + 1, generator=stream), torch.rand(self.config.max_steps + 1, generator=stream)], dim=-1
        )
        return start, source, estimates, noise

    def _draw_places(self, source: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """The start [2]; the source's place is written into ``source``. Raises ``ConfigError`` where they are hardly ever far enough."""
        for _ in range(MAX_DRAWS):
            start = self._draw_start(stream)
            source[X], source[Y] = _uniform(self.config.scene.x, stream), _uniform(self.config.scene.y, stream)
            if float(torch.linalg.vector_norm(source[:2] - start)) >= self.config.clearance:
                return start
        raise ConfigError(
            f"clearance: {MAX_DRAWS} draws of start and source were all nearer than {self.config.clearance:g} m; lower it or widen scene"
        )

    def _draw_start(self, stream: torch.Generator) -> torch.Tensor:
        if self.config.start == "random":
            scene = self.config.scene
            return torch.tensor([_uniform((0.0, scene.width), stream), _uniform((0.0, scene.height), stream)])
        return torch.tensor(self.config.start)


def at_ground(position: torch.Tensor) -> torch.Tensor:
    """Places in the plane [..., 2] as places in space [..., 3], at height 0."""
    return torch.cat([position, torch.zeros_like(position[..., :1])], dim=-1)


def _uniform(limits: Range, stream: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * float(torch.rand(1, generator=stream))
