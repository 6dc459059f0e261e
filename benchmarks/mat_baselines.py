"""A Multi-Agent Transformer against RLlib's multi-agent PPO (MAPPO, IPPO) on the same environments, steps and evaluation.

The transformer is trained by its job file, the baselines by RLlib's own PPO on its new API stack, with one module that all agents
share: `ippo` values an agent by its own observation, `mappo` by those of the whole team. Environments, padding, agent ids and team
rewards are the same code for all sides (`reasoner_ray/envs/multi_agent`), and so are the seeds of the greedy episodes that they are
compared by. Actions are discrete, without masks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from benchmarks._record import record
from reasoner_ray.agents.mat.driver import evaluation
from reasoner_ray.agents.mat.launch import evaluate, train
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED
from reasoner_ray.config import JobConfig, load_config
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.teams import Episode
from reasoner_ray.trainer.launch import connect

ROOT = Path(__file__).parent.parent
SHARED = "shared"


class TeamEnvironment(MultiAgentEnv):
    """One environment for RLlib. An agent observes what it sees and, behind that, what all of them see."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._teams = make_teams(MultiAgentConfig(**settings["multi_agent"]), 1)
        self._seeds = np.random.default_rng([settings["seed"], getattr(settings, "worker_index", 0), getattr(settings, "vector_index", 0)])
        team = self._teams.spec
        self.agents = self.possible_agents = list(team.agents)
        size = team.observation * (1 + len(team.agents))
        seen = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_spaces = dict.fromkeys(team.agents, seen)
        self.action_spaces: dict[str, gymnasium.Space[Any]] = dict.fromkeys(team.agents, gymnasium.spaces.Discrete(team.actions.n_choices))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A new episode."""
        view = self._teams.begin([int(self._seeds.integers(2**31))])
        return self._seen(view.observations[0]), {}

    def step(self, actions: dict[str, int]) -> Any:
        """One step of the team."""
        done = self._teams.step(np.array([[[actions[agent]] for agent in self.agents]], np.float32))
        seen = self._seen((done.last or done.view).observations[0])
        rewards = dict(zip(self.agents, done.rewards[0].tolist(), strict=True))
        return seen, rewards, {"__all__": bool(done.terminated.all())}, {"__all__": bool(done.truncated.any())}, {}

    def _seen(self, observations: np.ndarray) -> dict[str, np.ndarray]:
        return {agent: with_team(observations)[i] for i, agent in enumerate(self.agents)}


def with_team(observations: np.ndarray) -> np.ndarray:
    """``[n, n + 1 observations]``: each agent's own, then everybody's."""
    everything = np.broadcast_to(observations.ravel(), (len(observations), observations.size))
    return np.concatenate([observations, everything], 1).astype(np.float32)


class SharedModule(TorchRLModule, ValueFunctionAPI):
    """Two networks of two layers: an actor of an agent's own observation, a critic of its own (ippo) or of the team's (mappo)."""

    def setup(self) -> None:
        """Make the networks."""
        self._own, width = self.model_config["own"], self.model_config["width"]
        self._central = self.model_config["central"]
        critic_inputs = self.observation_space.shape[0] if self._central else self._own

        def network(inputs: int, outputs: int) -> torch.nn.Module:
            layers = [torch.nn.Linear(inputs, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()]
            return torch.nn.Sequential(*layers, torch.nn.Linear(width, outputs))

        self._actor, self._critic = network(self._own, self.action_space.n), network(critic_inputs, 1)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self._actor(batch[Columns.OBS][..., : self._own])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """V [B]."""
        seen = batch[Columns.OBS]
        return self._critic(seen if self._central else seen[..., : self._own]).squeeze(-1)


def train_rllib(config: JobConfig, central: bool, args: argparse.Namespace) -> dict[str, float]:
    """RLlib's PPO for as many environment steps as ``config`` takes; the figures of its greedy episodes."""
    connect(config)
    env = config.multi_agent
    per_step = env.envs * env.segment_steps * config.rollout.workers
    team = make_teams(env, 1).spec
    model = {"own": team.observation, "width": config.mat.width, "central": central}
    spec = RLModuleSpec(module_class=SharedModule, model_config=model)
    made = (
        PPOConfig()
        .environment(TeamEnvironment, env_config={"multi_agent": env.model_dump(), "seed": config.seed})
        .env_runners(
            num_env_runners=config.rollout.workers if config.rollout.workers > 1 else 0,
            num_envs_per_env_runner=env.envs,
            rollout_fragment_length=env.segment_steps,
            num_cpus_per_env_runner=config.rollout.cpus,
        )
        .multi_agent(policies={SHARED}, policy_mapping_fn=lambda agent, *_, **__: SHARED)
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs={SHARED: spec}))
        .training(
            train_batch_size_per_learner=per_step,
            minibatch_size=None if args.minibatches == 1 else per_step // args.minibatches,
            num_epochs=args.epochs,
            lr=args.lr,
            gamma=config.mat.gamma,
            lambda_=config.mat.gae_lambda,
            clip_param=args.clip,
            entropy_coeff=config.mat.entropy,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),
            use_kl_loss=False,
            grad_clip=10.0,
        )
        .debugging(seed=config.seed)
    )
    algorithm = made.build_algo()
    for _ in range(config.trainer.steps):
        algorithm.train()
    episodes = play(config, algorithm.get_module(SHARED))
    algorithm.stop()
    return evaluation(episodes)


@torch.no_grad()
def play(config: JobConfig, module: Any) -> list[Episode]:
    """Greedy episodes from the seeds that jobs are evaluated on."""
    found = []
    for i in range(config.trainer.eval_tasks):
        teams = make_teams(config.multi_agent, 1)
        view = teams.begin([FIRST_EVAL_SEED + i])
        episodes: list[Any] = []
        while not episodes:
            seen = {Columns.OBS: torch.from_numpy(with_team(view.observations[0]))}
            logits = module.forward_inference(seen)[Columns.ACTION_DIST_INPUTS]
            done = teams.step(logits.argmax(-1)[None, :, None].float().numpy())
            view, episodes = done.view, done.episodes
        found += episodes
    return found


def train_mat(config: JobConfig) -> dict[str, float]:
    """The job itself; the figures of its greedy episodes."""
    train(config, "overwrite")
    return evaluate(config)


def main() -> None:
    """Train every side on every seed, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs/mat/simple_spread.yaml")
    parser.add_argument("--sides", nargs="+", default=["mat", "mappo", "ippo"], choices=["mat", "mappo", "ippo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=7e-4, help="of the baselines; these four are MAPPO's settings for particles")
    parser.add_argument("--clip", type=float, default=0.2, help="of the baselines")
    parser.add_argument("--epochs", type=int, default=10, help="of the baselines")
    parser.add_argument(
        "--minibatches", type=int, default=1, help="of the baselines; from 2 on each has as many agents' steps as environment steps"
    )
    parser.add_argument("overrides", nargs="*", help="of the job, for example trainer.steps=50")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for side in args.sides:
                fixed = [f"name={side}-{seed}", f"seed={seed}", f"out={folder}", "tracking.wandb=off"]
                config = load_config(args.job, [*args.overrides, *fixed])
                result = train_mat(config) if side == "mat" else train_rllib(config, side == "mappo", args)
                ray.shutdown()
                figures.setdefault(f"{side}_return", []).append(result["eval/return"])
                figures.setdefault(f"{side}_return_ci95", []).append(result["eval/return_ci95"])
    config = load_config(args.job, args.overrides)
    steps = config.multi_agent.envs * config.multi_agent.segment_steps * config.rollout.workers * config.trainer.steps
    settings = {name: getattr(args, name) for name in ("lr", "clip", "epochs", "minibatches", "seeds")}
    settings |= {"environment": config.multi_agent.name, "environment_steps": steps, "overrides": args.overrides}
    if {"mat", "mappo"} <= set(args.sides):
        figures["mat_minus_mappo"] = statistics.fmean(figures["mat_return"]) - statistics.fmean(figures["mappo_return"])
    record(f"mat_baselines_{args.job.stem}", settings=settings, figures=figures)


if __name__ == "__main__":
    main()
