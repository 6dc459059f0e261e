"""Autonomous goal detection and cessation as Gymnasium wrappers, for one episode or many at once.

    env = AGDC(my_env, MyBelief(n=1), make_rule(CessationConfig(rule="spread", threshold=0.5)), FeedbackConfig(stop=10))

The wrapped episode terminates when the agent's rule says so, with the reward that it gives itself on top of the environment's; any
algorithm can train on it, and the same wrapper decides at deployment.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from reasoner_ray.agents.agdc.cessation import CessationRule
from reasoner_ray.agents.agdc.detection import Belief, Detection, Drawable, GoalDetector
from reasoner_ray.agents.agdc.settings import FeedbackConfig
from reasoner_ray.errors import ConfigError

Observe = Literal["both", "features", "raw"]
"""What a policy is shown: the environment's observation and the belief's features behind it, or one of them.

A number of the observation that is not finite is shown as 0, and ``GoalDetector.unreadable`` counts it; the belief is told as it came.
"""


@runtime_checkable
class ShowsBelief(Protocol):
    """An environment whose pictures have a place for a belief (``Drawable``)."""

    def show_belief(self, drawing: Any) -> None:
        """Draw it in what is rendered from now on."""
        ...


class AGDC(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One episode at a time. ``info`` gets ``ceased`` and ``estimate`` [K], the belief's mean.

    Where something is rendered, an environment that can show a belief (``show_belief``) is given it after each step.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], belief: Belief, rule: CessationRule, feedback: FeedbackConfig, observe: Observe = "both"
    ) -> None:
        """``belief`` is one of one episode. Raises ``ConfigError`` where observations are not a vector."""
        super().__init__(env)
        self.detector = GoalDetector(belief, rule, feedback, 1)
        self._observe = observe
        self.observation_space = _shown_space(env.observation_space, belief, observe)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode and its belief."""
        self.detector.seed(seed)
        observation, info = self.env.reset(seed=seed, options=options)
        features = self.detector.begin(_EVERYONE, _tensor(observation)[None])
        self._draw()
        return _shown(np.asarray(observation), features[0], self._observe), info | self._said(False)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act, take in what is seen, and end the episode where the goal seems reached."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        found = self.detector.advance(_EVERYONE, _tensor(observation)[None])
        self._draw()
        ceased = bool(found.ceased[0])
        shown = _shown(np.asarray(observation), found.features[0], self._observe)
        return shown, float(reward) + float(found.reward[0]), terminated or ceased, truncated and not ceased, info | self._said(ceased)

    def _draw(self) -> None:
        inner, belief = self.env.unwrapped, self.detector.belief
        if self.render_mode is not None and isinstance(inner, ShowsBelief) and isinstance(belief, Drawable):
            inner.show_belief(belief.drawing())

    def _said(self, ceased: bool) -> dict[str, Any]:
        return {"ceased": ceased, "estimate": self.detector.belief.summary().mean[0].cpu().numpy()}


class Ceasing(VectorWrapper):
    """Lets someone who watches end episodes of a vector environment that begins them again with the next step (``NEXT_STEP``).

    An ended episode begins anew with the next step, by ``reset(options={"reset_mask": ...})``. (Its environment takes that step as well,
    unseen.)
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Raises ``ConfigError`` for another autoreset mode."""
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.NEXT_STEP:
            raise ConfigError(f"AGDC wraps vector environments in autoreset mode NEXT_STEP, not {mode}")
        self.seeded: Any = None
        """The seed of the newest ``reset`` that had one, until someone who watches has taken it."""
        self._ceased = np.zeros(env.num_envs, dtype=bool)  # and unknown to the environment
        self._over = np.zeros(env.num_envs, dtype=bool)

    def cease(self, mask: np.ndarray) -> None:
        """End the episodes in ``mask`` (bool [E]) after the step just taken; those that it ended anyway are left out."""
        self._ceased |= mask & ~self._over

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin all episodes, or those of ``options["reset_mask"]``."""
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        self._ceased, self._over = self._ceased & ~mask, self._over & ~mask
        self.seeded = self.seeded if seed is None else seed
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """A step of every episode, or its beginning where it was over."""
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        if self._ceased.any():
            observation, begun = self.env.reset(options={"reset_mask": self._ceased})
            infos = _merged(infos, begun, self._ceased)
            reward = np.where(self._ceased, 0.0, reward)
            terminated, truncated = terminated & ~self._ceased, truncated & ~self._ceased
        self._ceased, self._over = np.zeros_like(self._ceased), terminated | truncated
        return observation, reward, terminated, truncated, infos


class VectorAGDC(VectorWrapper):
    """Many episodes at once. ``infos`` get ``ceased`` [E] and ``estimate`` [E, K]."""

    def __init__(
        self, env: VectorEnv[Any, Any, Any], belief: Belief, rule: CessationRule, feedback: FeedbackConfig, observe: Observe = "both"
    ) -> None:
        """``belief`` is one of ``env.num_envs`` episodes. Raises ``ConfigError`` where observations are not a vector."""
        self._ceasing = Ceasing(env)
        super().__init__(self._ceasing)
        self.detector = GoalDetector(belief, rule, feedback, env.num_envs)
        self._observe = observe
        self.single_observation_space = _shown_space(env.single_observation_space, belief, observe)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._over = np.zeros(env.num_envs, dtype=bool)

    def reset(  # type: ignore[override]
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin all episodes, or those of ``options["reset_mask"]``, and their beliefs."""
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        self.detector.seed(seed)
        observation, infos = self.env.reset(seed=seed, options=options)
        features = self.detector.begin(torch.as_tensor(mask), _tensor(observation))
        self._over &= ~mask
        return _shown(observation, features, self._observe), infos | self._said(np.zeros(self.num_envs, dtype=bool))

    def step(  # type: ignore[override]
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of every episode, or its beginning where it was over."""
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        began = self._over
        if began.any():
            self.detector.begin(torch.as_tensor(began), _tensor(observation))
        found: Detection = self.detector.advance(torch.as_tensor(~began), _tensor(observation))
        stopped = found.ceased.numpy()
        self._ceasing.cease(stopped)
        terminated, truncated = terminated | stopped, truncated & ~stopped
        self._over = terminated | truncated
        reward = np.where(began, 0.0, reward + found.reward.numpy())
        return _shown(observation, found.features, self._observe), reward, terminated, truncated, infos | self._said(stopped)

    def _said(self, ceased: np.ndarray) -> dict[str, Any]:
        said = {"ceased": ceased.copy(), "estimate": self.detector.belief.summary().mean.cpu().numpy()}
        return said | {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in said}


_EVERYONE = torch.ones(1, dtype=torch.bool)


def _merged(stepped: dict[str, Any], begun: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Infos of a vector environment: those of ``begun`` for the episodes in ``mask`` [E], else those of ``stepped``.

    Gymnasium says of each key in another, ``_key`` [E], who has it. What is no array of E entries is taken whole, of ``begun`` first.
    """
    merged: dict[str, Any] = {}
    for key in stepped.keys() | begun.keys():
        old, new = stepped.get(key), begun.get(key)
        if isinstance(old, dict) or isinstance(new, dict):
            merged[key] = _merged(old or {}, new or {}, mask)
            continue
        present = old if new is None else new
        if not isinstance(present, np.ndarray) or present.shape[:1] != mask.shape:
            merged[key] = present
            continue
        old, new = (np.zeros_like(present) if part is None else part for part in (old, new))
        merged[key] = np.where(mask.reshape(-1, *[1] * (present.ndim - 1)), new, old)
    return merged


def finite(observation: np.ndarray) -> np.ndarray:
    """``observation`` [..., D] as float32, with 0 for what is infinite or no number: a policy that reads one NaN acts on nothing else."""
    return np.nan_to_num(observation.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _tensor(observation: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(observation))


def _shown_space(space: spaces.Space[Any], belief: Belief, observe: Observe) -> spaces.Box:
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ConfigError(f"AGDC reads observations that are vectors, not {space}; put gymnasium's FlattenObservation under it")
    features = np.full(belief.n_features, np.inf, dtype=np.float32)
    low = {"both": [space.low, -features], "features": [-features], "raw": [space.low]}[observe]
    high = {"both": [space.high, features], "features": [features], "raw": [space.high]}[observe]
    return spaces.Box(np.concatenate(low).astype(np.float32), np.concatenate(high).astype(np.float32), dtype=np.float32)


def _shown(observation: np.ndarray, features: torch.Tensor, observe: Observe) -> np.ndarray:
    """What the policy sees, float32 [..., D]."""
    said = features.cpu().numpy().astype(np.float32)
    if observe == "features":
        return said
    raw = finite(observation)
    return raw if observe == "raw" else np.concatenate([raw, said], axis=-1)
