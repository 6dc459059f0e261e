"""RLlib's multi-agent PPO on the environments of ``kind: mat``, on its new API stack: one module that all agents share.

`ippo` values an agent by its own observation, `mappo` by those of the whole team. Agents choose under their action masks, or act by a
Gaussian whose deviation is the transformer's own, ``0.5 sigmoid(s)`` with one ``s`` a dimension; not both at once. Where the job
normalises returns (``mat.value_norm``) the critic does too, by the same running moments, taken in before each minibatch. What RLlib does
not have: the clipped, Huber value loss (its own is squared), and masks of dead agents, whose steps count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchDiagGaussian
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.vector.sync_vector_multi_agent_env import SyncVectorMultiAgentEnv
from ray.rllib.evaluation.postprocessing import Postprocessing

from reasoner_ray.agents.mat.driver import evaluation
from reasoner_ray.agents.mat.value_norm import ValueNorm
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.config import JobConfig
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.batched import BatchedTeams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.spec import ActionLayout, TeamSpec, TeamView
from reasoner_ray.errors import ConfigError
from reasoner_ray.trainer.launch import connect

SHARED = "shared"
NEVER = -1e10
"""Logit of a choice that the mask forbids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """What the baselines do not take from the job."""

    lr: float
    clip: float
    epochs: int
    minibatches: int


class TeamAgents(MultiAgentEnv):
    """Who acts. An agent observes what it sees, what all of them see, and which choices it has."""

    def __init__(self, team: TeamSpec) -> None:
        super().__init__()
        self.agents = self.possible_agents = list(team.agents)
        size = team.observation * (1 + len(team.agents)) + team.actions.n_choices
        seen = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_spaces = dict.fromkeys(team.agents, seen)
        self.action_spaces = dict.fromkeys(team.agents, action_space(team.actions))


class TeamEnvironment(TeamAgents):
    """One environment for RLlib."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._teams = make_teams(MultiAgentConfig(**settings["multi_agent"]), 1)
        super().__init__(self._teams.spec)
        self._base = (settings["seed"], getattr(settings, "worker_index", 0))
        self._seeds = np.random.default_rng(self._base)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A new episode. RLlib gives a seed to the first alone, one of its own to each environment."""
        if seed is not None:
            self._seeds = np.random.default_rng((*self._base, seed))
        return self._seen(self._teams.begin([int(self._seeds.integers(2**31))])), {}

    def step(self, actions: dict[str, Any]) -> Any:
        """One step of the team."""
        done = self._teams.step(np.array([[np.atleast_1d(actions[agent]) for agent in self.agents]], np.float32))
        rewards = dict(zip(self.agents, done.rewards[0].tolist(), strict=True))
        over, dead = bool(done.ended[0]), bool(done.terminated.all())
        return self._seen(done.last or done.view), rewards, {"__all__": over and dead}, {"__all__": over and not dead}, {}

    def _seen(self, view: TeamView) -> dict[str, np.ndarray]:
        return dict(zip(self.agents, inputs(view.observations, view.legal)[0], strict=True))


class TeamBatch(SyncVectorMultiAgentEnv):
    """Environments of vmas for RLlib, stepped as one batch of tensors, as the transformer's are: one at a time they are far slower.

    RLlib lets an environment whose episode has ended begin anew during the next step of the others. The batch steps it along with them,
    so it begins once more after that step, and nothing of the step is seen.
    """

    def __init__(self, settings: dict[str, Any], n_envs: int, worker: int) -> None:
        teams = make_teams(MultiAgentConfig(**settings["multi_agent"]), n_envs)
        if not isinstance(teams, BatchedTeams):
            self.closed = True  # its finaliser would look for environments
            raise TypeError(f"{settings['multi_agent']['name']} is stepped an environment at a time")
        self._teams, self._seed = teams, int(np.random.default_rng((settings["seed"], worker)).integers(2**31))
        agents = TeamAgents(teams.spec)
        super().__init__([lambda: agents] * n_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[list[dict[str, np.ndarray]], list[dict[str, Any]]]:
        """New episodes everywhere; RLlib asks for them once."""
        self._autoreset_envs = np.zeros(self.num_envs, bool)
        return self._seen(self._teams.begin([self._seed] * self.num_envs)), [{} for _ in range(self.num_envs)]

    def step(self, actions: list[dict[str, Any]]) -> Any:
        """One step of every team that is in an episode; the others begin one."""
        team, fresh = self._teams.spec, self._autoreset_envs
        wanted = np.zeros((self.num_envs, len(team.agents), team.actions.n_parts), np.float32)
        for env in np.flatnonzero(~fresh):
            wanted[env] = [np.atleast_1d(actions[env][agent]) for agent in team.agents]
        done = self._teams.step(wanted)
        seen = self._seen(self._teams.restart(fresh) if fresh.any() else done.view)
        for env, last in zip(np.flatnonzero(done.ended), self._seen(done.last) if done.last else (), strict=True):
            if not fresh[env]:
                seen[env] = last
        self._autoreset_envs = done.ended & ~fresh
        dead = done.terminated.all(-1)
        rewards = [dict(zip(team.agents, earned, strict=True)) for earned in np.where(fresh[:, None], 0.0, done.rewards).tolist()]
        over = [{"__all__": bool(flag)} for flag in self._autoreset_envs & dead]
        cut = [{"__all__": bool(flag)} for flag in self._autoreset_envs & ~dead]
        return seen, rewards, over, cut, [{} for _ in range(self.num_envs)]

    def _seen(self, view: TeamView) -> list[dict[str, np.ndarray]]:
        return [dict(zip(self._teams.spec.agents, rows, strict=True)) for rows in inputs(view.observations, view.legal)]


class BatchRunner(MultiAgentEnvRunner):
    """RLlib's runner, on a ``TeamBatch``."""

    env: Any

    def make_env(self) -> None:
        """Make the environments, in place of those that there are."""
        if self.env is not None:
            self.env.close()
        self.num_envs = self.config.num_envs_per_env_runner
        self.env = TeamBatch(self.config.env_config, self.num_envs, self.worker_index)
        self._needs_initial_reset = True


def action_space(actions: ActionLayout) -> gymnasium.Space[Any]:
    """What every agent of a team acts in. Raises ``ConfigError`` where agents act by choices and numbers, or by more or fewer numbers."""
    if actions.n_choices and not any(actions.dims) and all(actions.choices):
        return gymnasium.spaces.Discrete(actions.n_choices)
    if not actions.n_choices and len(set(actions.dims)) == 1:
        return gymnasium.spaces.Box(-1.0, 1.0, (actions.n_dims,), np.float32)
    raise ConfigError(
        f"agents with {actions.choices} choices and {actions.dims} dimensions: one module of RLlib acts for all by choices, or for all by "
        "equally many dimensions; compare on another environment, or with --sides mat alone"
    )


def inputs(observations: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """float32 ``[E, n, o + n o + choices]`` of what each agent sees [E, n, o] and may choose [E, n, choices]: own, everybody's, mask."""
    rows, n, _ = observations.shape
    everything = np.broadcast_to(observations.reshape(rows, 1, -1), (rows, n, observations[0].size))
    return np.concatenate([observations, everything, legal], -1).astype(np.float32)


class SharedModule(TorchRLModule, ValueFunctionAPI):
    """Two networks of two layers: an actor of an agent's own observation, a critic of its own (ippo) or of the team's (mappo)."""

    def setup(self) -> None:
        """Make the networks."""
        self._own, self._choices, width = (self.model_config[key] for key in ("own", "choices", "width"))
        self._valued = self.observation_space.shape[0] - self._choices if self.model_config["central"] else self._own
        outputs = self._choices or self.action_space.shape[0]
        self.action_dist_cls = TorchCategorical if self._choices else TorchDiagGaussian

        def network(inputs: int, outputs: int) -> torch.nn.Module:
            layers = [torch.nn.Linear(inputs, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()]
            return torch.nn.Sequential(*layers, torch.nn.Linear(width, outputs))

        self._actor, self._critic = network(self._own, outputs), network(self._valued, 1)
        self._spread = None if self._choices else torch.nn.Parameter(torch.full((outputs,), float(self.model_config["std_init"])))
        beta = self.model_config["value_norm_beta"]
        self.norm = None if beta is None else ValueNorm(beta)  # of the learner's copy alone: others value nothing
        self._normalised = False

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        seen = batch[Columns.OBS]
        out = self._actor(seen[..., : self._own])
        if self._spread is None:
            return {Columns.ACTION_DIST_INPUTS: out.masked_fill(seen[..., -self._choices :] < 0.5, NEVER)}
        log_std = (0.5 * self._spread.sigmoid()).log().expand_as(out)
        return {Columns.ACTION_DIST_INPUTS: torch.cat([out, log_std], -1)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """V [B], in units of rewards."""
        values = self._critic(batch[Columns.OBS][..., : self._valued]).squeeze(-1)
        return values if self.norm is None or self._normalised else self.norm.denormalise(values)

    @contextmanager
    def in_normalised_units(self) -> Iterator[None]:
        """Values are those of normalised returns here."""
        self._normalised = True
        try:
            yield
        finally:
            self._normalised = False


class NormalisedLearner(PPOTorchLearner):
    """RLlib's PPO, whose critic learns normalised returns (Yu et al. 2022, section 5.1), as the transformer's does."""

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]) -> Any:
        """RLlib's loss of a minibatch; its returns are taken in first."""
        module, targets = self.module[module_id].unwrapped(), batch[Postprocessing.VALUE_TARGETS]
        module.norm.update(targets, batch.get(Columns.LOSS_MASK, torch.ones_like(targets)))
        normalised = {**batch, Postprocessing.VALUE_TARGETS: module.norm.normalise(targets)}
        with module.in_normalised_units():
            return super().compute_loss_for_module(module_id=module_id, config=config, batch=normalised, fwd_out=fwd_out)


def learning_curve(config: JobConfig, *, central: bool, ppo: PpoSettings) -> list[dict[str, float]]:
    """Evaluations of RLlib's PPO, trained for as many environment steps as ``config`` takes; as often as it and from the same seeds.

    Its runners step all their environments at once, of which those that begin an episode do not count: the last step of a batch may take
    it over by fewer environment steps than there are environments.

    Raises ``ConfigError`` for teams that one module cannot act for, ``EnvironmentFault``.
    """
    if config.multi_agent.tasks:
        raise ConfigError("multi_agent.tasks: one module of RLlib plays one task; name a job without them, or --sides mat alone")
    workers = [RolloutWorker(config, index) for index in range(config.rollout.workers)]
    team, trainer, rows = workers[0].team, config.trainer, []
    made = _algorithm(config, team, central, ppo)
    connect(config)
    try:
        algorithm = made.build_algo()
        for step in range(trainer.steps + 1):
            taken = step * steps_of(config)
            over = step * config.rollout.workers * (config.multi_agent.envs - 1)
            if step and not taken <= (sampled := algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"]) <= taken + over:
                raise RuntimeError(f"RLlib has taken {sampled} environment steps after {step} training steps, not {taken}")
            if step in (0, trainer.steps) or (trainer.eval_every and step % trainer.eval_every == 0):
                figures = evaluation_of(algorithm.get_module(SHARED), workers, trainer.eval_tasks)
                rows.append({"step": step, "episode/actions_in_all": taken, **figures})
        algorithm.stop()
    finally:
        ray.shutdown()
    return rows


def steps_of(config: JobConfig) -> int:
    """Environment steps of a training step."""
    return config.multi_agent.envs * config.multi_agent.segment_steps * config.rollout.workers


def _algorithm(config: JobConfig, team: TeamSpec, central: bool, ppo: PpoSettings) -> PPOConfig:
    """RLlib's settings. It counts agents' steps, so that a minibatch has as many as the agents of its environment steps take.

    A row that RLlib adds behind each piece of an episode, to bootstrap from, takes a place too: 11 updates of segments of 25 steps where
    10 epochs of one minibatch were asked for.
    """
    env, mat, agents = config.multi_agent, config.mat, len(team.agents)
    action_space(team.actions)
    batch = steps_of(config) * agents
    model = {
        "own": team.observation,
        "choices": team.actions.n_choices,
        "width": mat.width,
        "central": central,
        "std_init": mat.std_init,
        "value_norm_beta": mat.value_norm_beta if mat.value_norm else None,
    }
    spec = RLModuleSpec(module_class=SharedModule, model_config=model)
    return (
        PPOConfig()
        .environment(
            TeamEnvironment,
            env_config={"multi_agent": env.model_dump(), "seed": config.seed},
            disable_env_checking=True,  # the check acts at random, whatever the masks forbid
        )
        .env_runners(
            num_env_runners=config.rollout.workers if config.rollout.workers > 1 else 0,
            num_envs_per_env_runner=env.envs,
            rollout_fragment_length=env.segment_steps * agents,
            num_cpus_per_env_runner=config.rollout.cpus,
            env_runner_cls=BatchRunner if env.name == "vmas" else MultiAgentEnvRunner,
        )
        .multi_agent(policies={SHARED}, policy_mapping_fn=lambda agent, *_, **__: SHARED, count_steps_by="agent_steps")
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs={SHARED: spec}))
        .learners(learner_class=NormalisedLearner if mat.value_norm else PPOTorchLearner)
        .training(
            train_batch_size_per_learner=batch,
            minibatch_size=batch // ppo.minibatches,
            num_epochs=ppo.epochs,
            lr=ppo.lr,
            gamma=mat.gamma,
            lambda_=mat.gae_lambda,
            clip_param=ppo.clip,
            entropy_coeff=mat.entropy,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),
            use_kl_loss=False,
            grad_clip=config.learner.max_grad_norm,
        )
        .debugging(seed=config.seed)
    )


class Greedy:
    """RLlib's module with the interface by which rollout workers act."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @torch.no_grad()
    def act(self, observations: torch.Tensor, legal: torch.Tensor, *, greedy: bool) -> SimpleNamespace:
        """The likeliest actions float32 [E, n, parts]."""
        seen = torch.from_numpy(inputs(observations.numpy(), legal.numpy()))
        out = self._module.forward_inference({Columns.OBS: seen})[Columns.ACTION_DIST_INPUTS]
        return SimpleNamespace(actions=out.argmax(-1, keepdim=True).float() if legal.shape[-1] else out.chunk(2, -1)[0])


def evaluation_of(module: Any, workers: list[RolloutWorker], episodes: int) -> dict[str, float]:
    """Figures of the greedy episodes that jobs are evaluated by, played by as many workers as theirs: the same batches of seeds."""
    seeds, found = [FIRST_EVAL_SEED + i for i in range(episodes)], []
    for index, worker in enumerate(workers):
        if share := seeds[index :: len(workers)]:
            worker.policy = Greedy(module)  # type: ignore[assignment]
            found += worker.evaluate(share)
    return evaluation(found)
