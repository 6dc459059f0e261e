"""Environments for teams by name; each comes with a package of its own that is asked for when it is missing."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

import gymnasium

from reasoner_ray.envs.multi_agent.settings import MultiAgentConfig
from reasoner_ray.envs.multi_agent.teams import Teams
from reasoner_ray.errors import ConfigError, EnvironmentProblem, ReasonerError
from reasoner_ray.registry import Registry, check_arguments, suggest

Maker = Callable[..., Any]
"""``make(*, render_mode, **args)``: a PettingZoo ``ParallelEnv``."""
ENVIRONMENTS: Registry[Maker] = Registry("environment", "multi_agent.name")
PARTICLES = (
    *("simple", "simple_adversary", "simple_crypto", "simple_push", "simple_reference", "simple_speaker_listener"),
    *("simple_spread", "simple_tag", "simple_world_comm"),
)
"""Scenarios of mpe2, the multi-agent particle environments."""
JOINTS = (
    *("Ant", "CoupledHalfCheetah", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"),
    *("ManySegmentAnt", "ManySegmentSwimmer", "Pusher", "Reacher", "Swimmer", "Walker2d"),
)
"""Scenarios of gymnasium-robotics' multi-agent MuJoCo."""
VMAS_ARGUMENTS = ("scenario", "continuous_actions")
"""Arguments of ``vmas.make_env`` that a job may give."""


def make_teams(config: MultiAgentConfig, n_envs: int, *, pictures: bool = False) -> Teams:
    """``n_envs`` of the environments that ``config`` names; ``pictures``: they can be drawn.

    Raises ``ConfigError`` for a name or argument that is unknown, or a name that makes something else, ``EnvironmentProblem`` for a
    package that is not installed, ``EnvironmentFault`` for spaces that no team can act in.
    """
    if config.name == "vmas":
        if config.faulty:
            raise ConfigError("multi_agent.faulty: vmas steps whole batches, which no wrapper reaches; leave it out")
        return _make_vmas(config, n_envs)
    need("pettingzoo", "pettingzoo==1.27.0")
    from reasoner_ray.envs.multi_agent.faulty import FaultyTeam
    from reasoner_ray.envs.multi_agent.parallel import ParallelTeams

    maker = ENVIRONMENTS.get(config.name)
    check_arguments(maker, config.args, "multi_agent.args", reserved=("render_mode",))
    mode = "rgb_array" if pictures else None

    def make() -> Any:
        env = _made(config, maker, mode)
        return FaultyTeam(env, config.faulty) if config.faulty else env

    return ParallelTeams(make, n_envs, config)


def _made(config: MultiAgentConfig, maker: Maker, mode: str | None) -> Any:
    """One environment. Raises as ``make_teams`` does."""
    from pettingzoo import AECEnv

    try:
        env = maker(render_mode=mode, **config.args)
    except ReasonerError:
        raise
    except (gymnasium.error.Error, ImportError) as error:  # a package that draws is missing, most often
        raise EnvironmentProblem(f"{config.name} cannot be made here: {type(error).__name__}: {error}") from error
    except Exception as error:  # someone else's code may raise anything
        raise ConfigError(f"multi_agent.args: {config.name} cannot be made with {config.args}: {type(error).__name__}: {error}") from error
    if isinstance(env, AECEnv):
        raise ConfigError(
            f"multi_agent.name: {config.name} makes an AECEnv, whose agents act one after the other, and teams need a ParallelEnv; name "
            "what makes that (most packages' parallel_env), or wrap it by pettingzoo.utils.conversions.aec_to_parallel"
        )
    if not all(hasattr(env, part) for part in PARALLEL):
        raise ConfigError(
            f"multi_agent.name: what {config.name} makes ({type(env).__name__}) is no PettingZoo ParallelEnv, which teams need; a "
            "Gymnasium environment of one agent is multi_agent.name=single with multi_agent.args.id"
        )
    return env


PARALLEL = ("possible_agents", "observation_space", "action_space", "reset", "step")
"""What a ``ParallelEnv`` has at the least."""


def need(module: str, install: str) -> Any:
    """An optional package's module. Raises ``EnvironmentProblem`` that says what installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"multi_agent.name needs a package that cannot be imported ({error}); run `pip install {install}`"
        ) from error


def _particles(scenario: str) -> Maker:
    def make(*, render_mode: str | None = None, **args: Any) -> Any:
        """A scenario of mpe2 (version 3, version 4 of ``simple_speaker_listener``)."""
        version = 4 if scenario == "simple_speaker_listener" else 3
        return need(f"mpe2.{scenario}_v{version}", "mpe2==1.1.1 pygame-ce==2.5.8").parallel_env(render_mode=render_mode, **args)

    return make


for _scenario in PARTICLES:
    ENVIRONMENTS.register(_scenario)(_particles(_scenario))


@ENVIRONMENTS.register("lbforaging")
def make_foraging(*, render_mode: str | None = None, id: str = "Foraging-8x8-2p-2f-coop-v3", **args: Any) -> Any:
    """Level-based foraging by its Gymnasium id."""
    from reasoner_ray.envs.multi_agent.tuples import TupleTeam, foraging_solved

    need("lbforaging", "lbforaging==2.0.0")
    return TupleTeam(_gymnasium(id, args), foraging_solved, render_mode)


@ENVIRONMENTS.register("single")
def make_single(*, render_mode: str | None = None, id: str = "CartPole-v1", **args: Any) -> Any:
    """A single-agent Gymnasium environment by its id, as a team of one."""
    import reasoner_ray.envs  # noqa: F401 - registers the built-in ones
    from reasoner_ray.envs.multi_agent.single import SingleAgent

    return SingleAgent(_gymnasium(id, args | {"render_mode": render_mode}), render_mode)


@ENVIRONMENTS.register("rware")
def make_warehouse(*, render_mode: str | None = None, id: str = "rware-tiny-2ag-v2", **args: Any) -> Any:
    """The robotic warehouse by its Gymnasium id."""
    from reasoner_ray.envs.multi_agent.tuples import TupleTeam, never_solved

    need("rware", "rware==2.0.0")
    return TupleTeam(_gymnasium(id, args), never_solved, render_mode)


@ENVIRONMENTS.register("mamujoco")
def make_mamujoco(
    *,
    render_mode: str | None = None,
    scenario: str = "HalfCheetah",
    agent_conf: str | None = "6x1",
    agent_obsk: int | None = 0,
    **args: Any,
) -> Any:
    """Multi-agent MuJoCo of gymnasium-robotics. Raises ``ConfigError`` where it has no such scenario, or ``agent_obsk`` is below 0."""
    if scenario not in JOINTS:
        raise ConfigError(f"multi_agent.args.scenario: mamujoco has no {scenario!r}; {suggest(str(scenario), list(JOINTS))}")
    if agent_obsk is not None and (not isinstance(agent_obsk, int) or agent_obsk < 0):
        raise ConfigError(f"multi_agent.args.agent_obsk: {agent_obsk!r} is no number of joints; take 0 or more, or null for everything")
    mamujoco = need("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi", "gymnasium-robotics==1.4.2 mujoco==4.0.0")
    return mamujoco.parallel_env(scenario, agent_conf, agent_obsk=agent_obsk, render_mode=render_mode, **args)


def _gymnasium(id: str, args: dict[str, Any]) -> Any:
    try:
        return gymnasium.make(id, disable_env_checker=True, **args)
    except gymnasium.error.Error as error:
        raise ConfigError(f"multi_agent.args.id: {error}") from error


def _make_vmas(config: MultiAgentConfig, n_envs: int) -> Teams:
    """A scenario of vmas (``args.scenario``), whose environments are one batch. Arguments beside VMAS_ARGUMENTS are the scenario's."""
    from reasoner_ray.envs.multi_agent.batched import BatchedTeams

    args = {"scenario": "balance", "continuous_actions": True, **config.args}
    vmas = need("vmas", "vmas==1.5.2 gym==0.26.2")
    for name in args:
        if name in inspect.signature(vmas.make_env).parameters and name not in VMAS_ARGUMENTS:
            raise ConfigError(f"multi_agent.args.{name}: kind mat sets it itself (steps: multi_agent.max_steps); leave it out")
    scenario = cast(str, args.pop("scenario"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Scenario kwargs")  # vmas only warns of arguments that it does not know
            env = vmas.make_env(scenario, n_envs, max_steps=config.max_steps, terminated_truncated=True, **args)
    except (TypeError, ValueError, AssertionError, FileNotFoundError, ModuleNotFoundError, UserWarning) as error:
        raise ConfigError(f"multi_agent.args: vmas cannot make {scenario!r} with {args}: {type(error).__name__}: {error}") from error
    return BatchedTeams(env, n_envs, config)
