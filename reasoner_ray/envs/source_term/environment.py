"""``reasoner_ray/SourceTerm-v0``: the search for a plume's source as Gymnasium environments, one episode or many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from reasoner_ray.envs.source_term.core import MOVES, SourceTermBatch
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.section import given_section
from reasoner_ray.seeds import derived_seeds

FPS = 8


def single_spaces(config: SourceTermConfig) -> tuple[spaces.Box, spaces.Space[Any]]:
    """Observations (``core.OBSERVATION``) and actions of one episode."""
    low = np.array([0, 0, 0, 0, -np.inf, -np.inf, -np.inf], dtype=np.float32)
    high = np.array([config.scene.width, config.scene.height, *[np.inf] * 5], dtype=np.float32)
    observation = spaces.Box(low, high, dtype=np.float32)
    if config.moves == "discrete":
        return observation, spaces.Discrete(len(MOVES))
    return observation, spaces.Box(-math.pi, math.pi, (1,), np.float32)


class SourceTerm(gymnasium.Env[np.ndarray, Any]):
    """Find the source of a plume with a sensor that is noisy and misses. Nothing says when it is found.

    Observation: float32 [7], ``core.OBSERVATION``, in m, mass/m³, m/s, radians, m²/s, s. Action: one of four moves, or a heading [1].
    The reward is -1 a step (``config.reward``); the episode never terminates and is truncated after ``max_steps``. ``info`` has the truth,
    for evaluation: ``source`` [8] (``plume.PARAMETERS``), ``distance`` (m, in the plane) and ``travelled`` (m, of the step).
    ``render`` gives an RGB image of the field, the way so far and, where ``show_belief`` was told of one (``AGDC`` does so), the belief.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, config: SourceTermConfig | dict[str, Any] | None = None, render_mode: str | None = None) -> None:
        """Raises ``ConfigError``."""
        self.config = given_section(SourceTermConfig, config, "SourceTerm")
        self.render_mode = render_mode
        self.core = SourceTermBatch(self.config, 1)
        self.observation_space, self.action_space = single_spaces(self.config)
        self.particles: np.ndarray | None = None
        self._path: list[np.ndarray] = []
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        observation = self.core.reset(seeds=[seed])
        self._path, self._running, self.particles = [self.core.position[0].numpy().copy()], True, None
        return observation[0].numpy(), self._info(0.0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move, then sense. Raises ``ResetNeeded`` outside an episode."""
        if not self._running:
            raise ResetNeeded("the episode is over, or none was begun: call reset()")
        step = self.core.step(torch.as_tensor(np.asarray(action).reshape(1)))
        self._path.append(self.core.position[0].numpy().copy())
        truncated = bool(step.truncated[0])
        self._running = not truncated
        return step.observation[0].numpy(), float(step.reward[0]), False, truncated, self._info(float(step.travelled[0]))

    def show_belief(self, drawing: np.ndarray) -> None:
        """Draw these particles [N, 8] (``plume.PARAMETERS``) until the next step's, or the next episode."""
        self.particles = drawing

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """An RGB image [H, W, 3] where ``render_mode`` is rgb_array."""
        if self.render_mode is None:
            return None
        from reasoner_ray.envs.source_term.render import draw_scene

        return draw_scene(self.config.scene, self.core.source[0].numpy(), np.stack(self._path), self.particles)

    def _info(self, travelled: float) -> dict[str, Any]:
        return {"source": self.core.source[0].numpy().copy(), "distance": float(self.core.distance[0]), "travelled": travelled}


class SourceTermVector(VectorEnv[Any, Any, Any]):
    """The same for many episodes at once; episode i of seeds s equals ``SourceTerm`` with seed s[i].

    An episode that was truncated begins anew with the next step, whose action it ignores; ``reset(options={"reset_mask": mask})``
    begins those in ``mask`` [E] alone.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, config: SourceTermConfig | dict[str, Any] | None = None, device: str = "cpu") -> None:
        """Raises ``ConfigError``."""
        self.config, self.num_envs = given_section(SourceTermConfig, config, "SourceTerm"), num_envs
        self.core = SourceTermBatch(self.config, num_envs, device)
        self.single_observation_space, self.single_action_space = single_spaces(self.config)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._over = torch.zeros(num_envs, dtype=torch.bool, device=self.core.device)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin all episodes, or those of ``options["reset_mask"]``; an integer seed s gives them ``derived_seeds(s, E)``."""
        seeds = derived_seeds(seed, self.num_envs) if isinstance(seed, int) else seed
        mask = (options or {}).get("reset_mask")
        rows = None if mask is None else torch.as_tensor(mask, device=self.core.device)
        observation = self.core.reset(rows, seeds)
        self._over = torch.zeros_like(self._over) if rows is None else self._over & ~rows
        return observation.cpu().numpy(), self._info(torch.zeros(self.num_envs))

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of every episode, or its beginning where it was over."""
        given = torch.as_tensor(np.asarray(actions).reshape(self.num_envs), device=self.core.device)
        step = self.core.step(given.masked_fill(self._over, 0))
        observation, began = step.observation, self._over
        if bool(began.any()):
            observation = self.core.reset(began)
        self._over = step.truncated & ~began
        reward = (step.reward * ~began).double().cpu().numpy()
        over = self._over.cpu().numpy()
        return observation.cpu().numpy(), reward, np.zeros(self.num_envs, dtype=bool), over.copy(), self._info(step.travelled * ~began)

    def _info(self, travelled: torch.Tensor) -> dict[str, Any]:
        values = {"source": self.core.source, "distance": self.core.distance, "travelled": travelled}
        present = np.ones(self.num_envs, dtype=bool)
        return {key: value.cpu().numpy().copy() for key, value in values.items()} | {f"_{key}": present for key in values}
