"""DDPG on RLlib's new API stack: a deterministic actor, its critic, and slow copies of both (Lillicrap et al. 2016).

RLlib 2.60 has no deterministic-actor algorithm. This one keeps DQN's sampling, replay, n-step targets and target updates and brings a
module and a loss. A second critic whose minimum bounds the target (TD3, Fujimoto et al. 2018) is on by default: ``twin_q``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.dqn.dqn import DQN, DQNConfig
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.metrics import TD_ERROR_KEY
from torch import nn
from torch.func import functional_call

Q, Q_TWIN, Q_OF_ACTOR, TARGET = "q", "q_twin", "q_of_actor", "target"


def network(inputs: int, hidden: tuple[int, ...], outputs: int, *, bounded: bool = False) -> nn.Sequential:
    """A ReLU network; ``bounded`` outputs lie in (-1, 1)."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers, *([nn.Tanh()] if bounded else []))


class DDPGModule(TorchRLModule, InferenceOnlyAPI, TargetNetworkAPI):
    """Actor and critics. Actions lie in (-1, 1); RLlib's connector stretches them to the action space.

    Exploration adds normal noise of ``model_config["noise"]``, after ``model_config["random_steps"]`` environment steps of uniform actions.
    """

    def setup(self) -> None:
        """Build the networks."""
        hidden, inputs = tuple(self.model_config["hidden"]), int(np.prod(self.observation_space.shape))
        self.n_actions = int(np.prod(self.action_space.shape))
        self.actor = network(inputs, hidden, self.n_actions, bounded=True)
        if not self.inference_only:
            self.q = network(inputs + self.n_actions, hidden, 1)
            self.q_twin = network(inputs + self.n_actions, hidden, 1) if self.model_config["twin_q"] else None

    def get_non_inference_attributes(self) -> list[str]:
        """What acting does not need."""
        return ["q", "q_twin", "_target_actor", "_target_q", "_target_q_twin"]

    def make_target_networks(self) -> None:
        """Slow copies."""
        self._target_actor = make_target_network(self.actor)
        self._target_q = make_target_network(self.q)
        self._target_q_twin = None if self.q_twin is None else make_target_network(self.q_twin)

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(network, its slow copy)."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.actor, self._target_actor), (self.q, self._target_q)]
        return pairs if self.q_twin is None or self._target_q_twin is None else [*pairs, (self.q_twin, self._target_q_twin)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Q' of the slow actor's action in the observations of ``batch``, [B]; the lower one of two."""
        observations = batch[Columns.OBS]
        action = self._target_actor(observations)
        if self.model_config["target_noise"]:  # an actor cannot live off narrow peaks of its critic
            noise = torch.randn_like(action) * self.model_config["target_noise"]
            action = (action + noise.clamp(-0.5, 0.5)).clamp(-1.0, 1.0)
        both = torch.cat([observations, action], dim=-1)
        value = self._target_q(both)
        if self._target_q_twin is not None:
            value = torch.minimum(value, self._target_q_twin(both))
        return {TARGET: value.squeeze(-1)}

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_exploration(self, batch: dict[str, Any], t: int = 0, **kwargs: Any) -> dict[str, Any]:
        action = self.actor(batch[Columns.OBS])
        if t < self.model_config["random_steps"]:
            return {Columns.ACTIONS: torch.rand_like(action) * 2 - 1}
        return {Columns.ACTIONS: (action + torch.randn_like(action) * self.model_config["noise"]).clamp(-1.0, 1.0)}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        observations, actions = batch[Columns.OBS], batch[Columns.ACTIONS].reshape(-1, self.n_actions)
        taken = torch.cat([observations, actions], dim=-1)
        with torch.no_grad():
            target = self.forward_target({Columns.OBS: batch[Columns.NEXT_OBS]})[TARGET]
        # The critic as it is, so that the actor's loss moves the actor alone.
        frozen = {name: parameter.detach() for name, parameter in self.q.named_parameters()}
        chosen = functional_call(self.q, frozen, (torch.cat([observations, self.actor(observations)], dim=-1),))
        out = {Q: self.q(taken).squeeze(-1), Q_OF_ACTOR: chosen.squeeze(-1), TARGET: target}
        return out if self.q_twin is None else out | {Q_TWIN: self.q_twin(taken).squeeze(-1)}


class DDPGLearner(DQNTorchLearner):
    """Critics by squared errors to r + gamma^n Q'(s', mu'(s')); the actor by -Q(s, mu(s))."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One Adam each, for actor and critics."""
        module = self._module[module_id].unwrapped()
        critics = [*module.q.parameters(), *([] if module.q_twin is None else module.q_twin.parameters())]
        for name, parameters, lr in (("critic", critics, config.critic_lr), ("actor", list(module.actor.parameters()), config.lr)):
            self.register_optimizer(
                module_id=module_id, optimizer_name=name, optimizer=torch.optim.Adam(parameters), params=parameters, lr_or_lr_schedule=lr
            )

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]) -> torch.Tensor:
        """Scalar; its gradient falls on the critics and the actor apart from each other."""
        going_on = 1.0 - batch[Columns.TERMINATEDS].float()
        target = batch[Columns.REWARDS] + config.gamma ** batch["n_step"] * going_on * fwd_out[TARGET]
        weights = batch["weights"]
        errors = [fwd_out[name] - target for name in (Q, Q_TWIN) if name in fwd_out]
        critic = torch.stack([(weights * error**2).mean() for error in errors]).sum()
        actor = -fwd_out[Q_OF_ACTOR].mean()
        self.metrics.log_value((module_id, TD_ERROR_KEY), errors[0].detach().abs(), reduce="item_series")
        shown = {"critic_loss": critic, "actor_loss": actor, "q_mean": fwd_out[Q].mean()}
        self.metrics.log_dict({name: value.detach() for name, value in shown.items()}, key=module_id, window=1)
        return critic + actor

    @classmethod
    def rl_module_required_apis(cls) -> list[type]:
        """What a module must offer to be taught so."""
        return [TargetNetworkAPI]


class DDPGConfig(DQNConfig):
    """DQN's settings without those of discrete actions, and ``critic_lr``, ``noise``, ``target_noise``, ``random_steps``, ``twin_q``."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or DDPG)
        self.critic_lr = 1e-3
        self.noise = 0.2
        self.target_noise = 0.2
        self.random_steps = 1000
        self.twin_q = True
        self.hidden: tuple[int, ...] = (128, 128)
        self.tau = 0.005
        self.target_network_update_freq = 0
        self.replay_buffer_config = {"type": "EpisodeReplayBuffer", "capacity": 100_000}

    def training(
        self,
        *,
        critic_lr: Any = NotProvided,
        noise: Any = NotProvided,
        target_noise: Any = NotProvided,
        random_steps: Any = NotProvided,
        twin_q: Any = NotProvided,
        hidden: Any = NotProvided,
        **kwargs: Any,
    ) -> DDPGConfig:
        """Set what is given; the rest goes to ``DQNConfig.training``."""
        own = {"critic_lr": critic_lr, "noise": noise, "target_noise": target_noise, "random_steps": random_steps, "twin_q": twin_q}
        for name, value in (own | {"hidden": hidden}).items():
            if value is not NotProvided:
                setattr(self, name, value)
        super().training(**kwargs)
        return self

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The module that ``DDPGLearner`` teaches."""
        return RLModuleSpec(module_class=DDPGModule)

    def get_default_learner_class(self) -> type:
        """``DDPGLearner``."""
        return DDPGLearner

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        names = ("noise", "target_noise", "random_steps", "twin_q", "hidden")
        return AlgorithmConfig._model_config_auto_includes.fget(self) | {name: getattr(self, name) for name in names}


class DDPG(DQN):
    """DQN's way of sampling and replaying, with a deterministic actor."""

    @classmethod
    def get_default_config(cls) -> DDPGConfig:
        """Its own."""
        return DDPGConfig()
