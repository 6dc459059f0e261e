"""A job of kind agdc as an RLlib algorithm: environments for its runners, its configuration, and what it has learnt as a policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.tune.registry import register_env

from reasoner_ray.agents.agdc.cessation import make_rule, with_numbers
from reasoner_ray.agents.agdc.connectors import DetectGoals
from reasoner_ray.agents.agdc.ddpg import DDPGConfig
from reasoner_ray.agents.agdc.deepspeed_learner import with_deepspeed
from reasoner_ray.agents.agdc.detection import GoalDetector
from reasoner_ray.agents.agdc.problem import Problem, View, make_problem
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.agents.agdc.wrappers import VectorAGDC
from reasoner_ray.config import JobConfig
from reasoner_ray.errors import ConfigError, ModelError
from reasoner_ray.seeds import RUNNERS, derived_seed

ENVIRONMENT = "reasoner_ray_search"


class WithoutBelief(VectorWrapper):
    """Episodes of a problem for a policy that has no belief."""

    def __init__(self, env: VectorEnv[Any, Any, Any], problem: Problem) -> None:
        super().__init__(env)
        self._problem = problem
        shown = self._shown(np.zeros_like(env.single_observation_space.sample())[None])
        self.single_observation_space = spaces.Box(-np.inf, np.inf, shown.shape[1:], np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(  # type: ignore[override]
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin episodes."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._shown(observation), infos

    def step(  # type: ignore[override]
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """A step of all."""
        observation, *rest = self.env.step(actions)
        return (self._shown(observation), *rest)

    def _shown(self, observation: np.ndarray) -> np.ndarray:
        return self._problem.plain(torch.as_tensor(observation)).numpy()


def make_search(context: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    """The environment of an env runner: ``context`` has ``agdc`` (an ``AgdcConfig`` as plain data) and, from RLlib, ``num_envs``."""
    agdc, n = AgdcConfig.model_validate(context["agdc"]), int(context.get("num_envs", 1))
    problem = make_problem(agdc)
    env = problem.vector(n)
    if not agdc.detect:
        return WithoutBelief(env, problem)
    return VectorAGDC(env, problem.belief(n), make_rule(agdc.cessation), agdc.feedback, observe="features")


def uses_gpu(agdc: AgdcConfig) -> bool:
    """Env runners keep their beliefs on a GPU."""
    return agdc.problem == "source_term" and agdc.detect and agdc.belief.device == "cuda"


def algorithm_config(config: JobConfig) -> AlgorithmConfig:
    """What RLlib needs to know of a job. Raises ``ConfigError`` for settings that the algorithm does not have."""
    agdc, learner = config.agdc, config.learner
    runners = agdc.model_copy(update={"cessation": with_numbers(agdc.cessation)}) if agdc.cessation.rule == "calibrated" else agdc
    made: AlgorithmConfig = {"ppo": PPOConfig, "dqn": DQNConfig, "ddpg": DDPGConfig}[agdc.algorithm]()
    register_env(ENVIRONMENT, make_search)
    made.environment(env=ENVIRONMENT, env_config={"agdc": runners.model_dump(mode="json")})
    made.framework("torch")
    made.callbacks(CountFaults)
    made.debugging(seed=derived_seed(config.seed, RUNNERS))  # runner w has this seed + w, and must not be another job's runner
    made.env_runners(
        num_env_runners=config.rollout.workers if config.rollout.workers > 1 else 0,
        num_envs_per_env_runner=agdc.episodes_at_once,
        gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
        rollout_fragment_length=agdc.fragment or "auto",
        num_cpus_per_env_runner=config.rollout.cpus,
        num_gpus_per_env_runner=agdc.belief.gpu_share if uses_gpu(agdc) else 0,
    )
    made.learners(num_learners=learner.ranks if learner.ranks > 1 else 0, num_cpus_per_learner=learner.cpus)
    replays = agdc.algorithm != "ppo"
    made.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=agdc.steps_per_iteration if replays else None)
    settings: dict[str, Any] = {"lr": learner.lr, "grad_clip": learner.max_grad_norm, "grad_clip_by": "global_norm", **agdc.settings}
    if agdc.algorithm == "ddpg":
        settings["hidden"] = agdc.hidden
    else:
        made.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=list(agdc.hidden), fcnet_activation="relu", vf_share_layers=False))
    try:
        made.training(**settings)
        if agdc.learner == "deepspeed":
            made.learners(learner_class=with_deepspeed(made.get_default_learner_class()))
            made.training(learner_config_dict={"zero_stage": learner.zero_stage, "timeout_s": learner.collective_timeout_s})
        made.validate()
    except (TypeError, ValueError) as error:
        why = str(error).partition("To suppress all validation errors")[0].strip()  # a job has no key for RLlib's advice
        raise ConfigError(f"agdc.settings: {agdc.algorithm} of RLlib does not take them: {why}") from error
    return made


class CountFaults(RLlibCallback):
    """Logs what an env runner's detector and beliefs count as out of order: totals of the run, ``belief_*``."""

    def __init__(self) -> None:
        super().__init__()
        self._before: Counter[str] = Counter()

    def on_sample_end(self, *, env_runner: Any, metrics_logger: Any, samples: Any, **kwargs: Any) -> None:
        """After each fragment."""
        now: Counter[str] = Counter()
        for detector in _detectors(env_runner):
            now.update(detector.faults())
        for name, total in now.items():
            metrics_logger.log_value(f"belief_{name}", total - self._before[name], reduce="lifetime_sum")
        self._before = now


def _detectors(env_runner: Any) -> Iterator[GoalDetector]:
    """Those of its environment's wrapper, and of its connectors."""
    env = env_runner.env
    while env is not None:
        if isinstance(env, VectorAGDC):
            yield env.detector
        env = getattr(env, "env", None)
    yield from (piece.detector for piece in getattr(env_runner, "_env_to_module", None) or () if isinstance(piece, DetectGoals))


class TrainedPolicy:
    """An RLlib module that acts greedily."""

    def __init__(self, module: RLModule, agdc: AgdcConfig) -> None:
        self._module, self._detect, self._problem = module, agdc.detect, make_problem(agdc)

    @staticmethod
    def load(folder: Path, agdc: AgdcConfig) -> TrainedPolicy:
        """What a run exported. Raises ``ModelError``."""
        if not (folder / "module_state.pkl").is_file() and not list(folder.glob("module_state*")):
            raise ModelError(f"no trained policy at {folder} (model.path); give the folder model/ of a run of kind agdc")
        return TrainedPolicy(RLModule.from_checkpoint(str(folder.absolute())), agdc)

    @torch.no_grad()
    def act(self, view: View) -> torch.Tensor:
        """The most likely move of each episode, or the mean of a continuous one."""
        shown = view.features if self._detect else self._problem.plain(view.search.observe())
        weight = next(iter(self._module.parameters()))
        out = self._module.forward_inference({Columns.OBS: shown.to(weight.device).float()})
        if Columns.ACTIONS in out:
            action = out[Columns.ACTIONS]
        else:
            kind = self._module.get_inference_action_dist_cls()
            action = kind.from_logits(out[Columns.ACTION_DIST_INPUTS]).to_deterministic().sample()
        return self._problem.action(action).to(shown.device)
