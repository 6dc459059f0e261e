"""Autonomous goal detection and cessation as a piece of RLlib's env-to-module pipeline, for environments that stay as they are.

    config.environment(env="my_env")  # whose vector environment is wrapped in ``Ceasing``
    config.env_runners(env_to_module_connector=detect_goals(MyBelief, rule, FeedbackConfig(stop=10)))

The piece keeps a belief for each of a runner's episodes. It adds the belief's features to observations, self-feedback to rewards, and
ends an episode where the rule says so: in the record that is learnt from, and in the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.connectors.connector_v2 import ConnectorV2

from reasoner_ray.agents.agdc.cessation import CessationRule
from reasoner_ray.agents.agdc.detection import Belief, GoalDetector
from reasoner_ray.agents.agdc.settings import FeedbackConfig
from reasoner_ray.agents.agdc.wrappers import Ceasing, finite
from reasoner_ray.errors import ConfigError

MakeBelief = Callable[[int], Belief]
"""Beliefs of n episodes."""


def detect_goals(make_belief: MakeBelief, rule: CessationRule, feedback: FeedbackConfig) -> Callable[..., ConnectorV2]:
    """What RLlib's ``env_to_module_connector`` takes."""

    def make(env: Any, spaces: Any = None, device: Any = None) -> ConnectorV2:
        return DetectGoals(_ceasing(env), make_belief, rule, feedback)

    return make


class DetectGoals(ConnectorV2):
    """Belief features, self-feedback and cessation for the episodes of one env runner, which is single-agent."""

    def __init__(self, env: Ceasing, make_belief: MakeBelief, rule: CessationRule, feedback: FeedbackConfig, **options: Any) -> None:
        """``env``: where the episodes are played."""
        self._env, self._n = env, env.num_envs
        self.detector = GoalDetector(make_belief(self._n), rule, feedback, self._n)
        self._ids: list[str | None] = [None] * self._n
        super().__init__(**options)

    def recompute_output_observation_space(
        self, input_observation_space: gymnasium.Space[Any], input_action_space: gymnasium.Space[Any]
    ) -> gymnasium.Space[Any]:
        """Observations with the features behind them. Raises ``ConfigError`` where observations are not vectors."""
        space = input_observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ConfigError(f"AGDC reads observations that are vectors, not {space}")
        more = np.full(self.detector.belief.n_features, np.inf, dtype=np.float32)
        return spaces.Box(np.concatenate([space.low, -more]), np.concatenate([space.high, more]), dtype=np.float32)

    def __call__(self, *, batch: dict[str, Any], episodes: list[Any], **kwargs: Any) -> dict[str, Any]:
        """Write into ``episodes`` (one for each environment, in order) what their beliefs say of the newest observation."""
        seen = torch.as_tensor(np.stack([np.asarray(episode.get_observations(-1)) for episode in episodes]))
        began = torch.tensor([episode.id_ != known for episode, known in zip(episodes, self._ids, strict=True)])
        self._ids = [episode.id_ for episode in episodes]
        if self._env.seeded is not None:  # RLlib gives each runner another; beliefs of the same stream would err alike
            self.detector.seed(self._env.seeded)
            self._env.seeded = None
        if bool(began.any()):
            self.detector.begin(began, seen)
        found = self.detector.advance(~began, seen)
        for i, episode in enumerate(episodes):
            raw = finite(np.asarray(episode.get_observations(-1)))  # ``GoalDetector.unreadable`` counts what was not
            shown = np.concatenate([raw, found.features[i].cpu().numpy()]).astype(np.float32)
            episode.observation_space = self.observation_space
            episode.set_observations(at_indices=-1, new_data=shown)
            if not bool(began[i]):
                episode.set_rewards(at_indices=-1, new_data=float(episode.get_rewards(-1)) + float(found.reward[i]))
            if bool(found.ceased[i]):
                episode.is_terminated, episode.is_truncated = True, False
        self._env.cease(found.ceased.numpy())
        return batch


def _ceasing(env: Any) -> Ceasing:
    """The ``Ceasing`` among the wrappers of an env runner's environment. Raises ``ConfigError`` where there is none."""
    while env is not None:
        if isinstance(env, Ceasing):
            return env
        env = getattr(env, "env", None)
    raise ConfigError(
        "detect_goals ends episodes, so the runner's vector environment must be wrapped in reasoner_ray.agents.agdc.wrappers.Ceasing"
    )
