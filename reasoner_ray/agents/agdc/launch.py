"""``reasoner train`` and ``reasoner eval`` of kind agdc: an RLlib algorithm under the run's own steps, tracking and checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from reasoner_ray.agents.agdc.animate import animate
from reasoner_ray.agents.agdc.cessation import Calibration, Never, make_rule
from reasoner_ray.agents.agdc.deepspeed_learner import gather_optimizers
from reasoner_ray.agents.agdc.evaluate import CALIBRATION_SEED, FIRST_SEED, Arena, search_metrics
from reasoner_ray.agents.agdc.problem import Policy, make_problem
from reasoner_ray.agents.agdc.rllib import TrainedPolicy, algorithm_config
from reasoner_ray.agents.agdc.settings import AgdcConfig, CessationConfig
from reasoner_ray.config import JobConfig, ModelConfig, load_config
from reasoner_ray.errors import CheckpointError, ConfigError, LearnerLost
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.checkpoint import read_driver_state
from reasoner_ray.trainer.stepwise import StepDriver
from reasoner_ray.trainer.tracking import Tracker

log = logging.getLogger(__name__)

MODULE = "default_policy"
SAMPLED = "episode/actions_in_all"
BUFFER = "replay_buffer.pkl"
NEVER = CessationConfig(rule="never")


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a job to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    for key in ("policy", "calibrate", "gif"):
        if getattr(config.agdc, key) != AgdcConfig.model_fields[key].default:
            raise ConfigError(f"agdc.{key} is for `reasoner eval`, and a training has no use for it; leave it out")
    if config.model.path != ModelConfig.model_fields["path"].default:
        raise ConfigError("model.path: a training of kind agdc begins with a new network; leave it out (--resume goes on with a run)")
    made = algorithm_config(config)
    make_arena(config.agdc)
    config, checkpoint = launch.choose_run(config, if_exists)
    if checkpoint is not None:
        _check_resumable(read_driver_state(checkpoint), config)
    launch.connect(config)
    try:
        check_room(made, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        launch.make_run_folder(config, if_exists)
        tracker = Tracker(config, config.run_dir, resume=checkpoint is not None)
        parts = Parts(learners=AlgorithmRunner(config), tracker=tracker)
        return launch.run_driver(AgdcDriver(config, parts), checkpoint)
    finally:
        ray.shutdown()


def check_room(made: AlgorithmConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse a job whose actors the cluster's ``nodes`` can never hold: Ray would wait for ever. Raises ``ConfigError``.

    RLlib places an env runner for each of ``rollout.workers``, and a learner for each of ``learner.ranks``, where there are 2 or more.
    """
    wanted_gpus, gpus = made.num_gpus_per_env_runner * made.num_env_runners, sum(node.get("GPU", 0.0) for node in nodes)
    if wanted_gpus > gpus:
        raise ConfigError(
            f"{made.num_env_runners} env runners of agdc.belief.gpu_share={made.num_gpus_per_env_runner:g} do not fit on the cluster's "
            f"{gpus:g} GPUs. Lower it or rollout.workers, or set agdc.belief.device=cpu"
        )
    actors = [made.num_cpus_per_env_runner] * made.num_env_runners + [made.num_cpus_per_learner] * made.num_learners
    free = [node.get("CPU", 0.0) for node in nodes]
    for wanted in sorted(actors, reverse=True):
        room = max(range(len(free)), key=free.__getitem__, default=None)
        if room is None or free[room] < wanted:
            raise ConfigError(
                f"{made.num_env_runners} env runners of rollout.cpus={made.num_cpus_per_env_runner:g} and {made.num_learners} learners of "
                f"learner.cpus={made.num_cpus_per_learner:g} do not fit on the cluster's nodes ("
                f"{', '.join(format(node.get('CPU', 0.0), 'g') for node in nodes)} CPUs). Lower them (they are reservations, not limits), "
                "rollout.workers or learner.ranks"
            )
        free[room] -= wanted


def evaluate(config: JobConfig) -> dict[str, float]:
    """Figures of ``agdc.policy`` over ``trainer.eval_tasks`` episodes of fixed seeds, with the fit that ``agdc.calibrate`` asks for.

    Raises ``ReasonerError``.
    """
    agdc, episodes = config.agdc, config.trainer.eval_tasks
    if not episodes:
        raise ConfigError("trainer.eval_tasks is 0, so there is nothing to evaluate")
    policy = make_policy(config)
    if agdc.calibrate is not None:
        file = Path(agdc.calibrate)
        calibrate(make_arena(agdc.model_copy(update={"cessation": NEVER})), make_policy(config), episodes).save(file)
        if agdc.cessation.rule == "calibrated":
            agdc = agdc.model_copy(update={"cessation": agdc.cessation.model_copy(update={"calibration": str(file)})})
    arena = make_arena(agdc)
    if agdc.gif is not None:
        animate(arena, make_policy(config), FIRST_SEED, Path(agdc.gif))
    searches = arena.run(policy, episodes)
    return {f"eval/{name}": value for name, value in search_metrics(searches, agdc.tolerance).items()}


def calibrate(arena: Arena, policy: Policy, episodes: int) -> Calibration:
    """The probability of being right, by what beliefs say at a random time of each episode; none of them is ended by the agent.

    The episodes are others than those of an evaluation. Raises ``DataError``.
    """
    walked = replace(arena, rule=Never()).run(policy, episodes, CALIBRATION_SEED)
    return Calibration.fit(walked.evidence, walked.evidence_error <= arena.tolerance)


def animate_run(run: Path, file: Path) -> str:
    """Animate what a run has learnt on the first episode of evaluations; says how that ended. Raises ``ReasonerError``."""
    config = load_config(run / "config.yaml")
    if config.kind != "agdc":
        raise ConfigError(f"{run} is a run of kind {config.kind}; `reasoner plot RUN --out FILE.gif` animates runs of kind agdc")
    policy = TrainedPolicy.load(run / "model", config.agdc)
    ended = animate(make_arena(config.agdc), policy, FIRST_SEED, file)
    return "the agent ends its search" if ended else "the agent is not sure before its time is up"


def make_arena(agdc: AgdcConfig) -> Arena:
    """Where a job's policies are looked at; without ``detect`` they never end an episode. Raises ``ConfigError``, ``DataError``."""
    rule = make_rule(agdc.cessation if agdc.detect else NEVER)
    return Arena(make_problem(agdc), rule, agdc.feedback, agdc.tolerance, believed=agdc.detect)


def make_policy(config: JobConfig) -> Policy:
    """The policy that ``agdc.policy`` names, from its beginning. Raises ``ModelError``, ``ConfigError``."""
    if config.agdc.policy == "trained":
        return TrainedPolicy.load(Path(config.model.path), config.agdc)
    planner: Policy = make_problem(config.agdc).planners.get(config.agdc.policy)(seed=config.seed)
    return planner


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the driver coordinates."""

    learners: AlgorithmRunner
    tracker: Tracker


class AlgorithmRunner:
    """An RLlib algorithm, its calls in a thread of their own so that signals are heard."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._algorithm: Any = None
        self._sampled = 0.0

    async def start(self) -> None:
        """Build the algorithm and its actors."""
        self._sampled = 0.0
        self._algorithm = await asyncio.to_thread(lambda: algorithm_config(self._config).build_algo())

    async def train_step(self) -> dict[str, float]:
        """One iteration of RLlib; its figures by the names of this system. Raises ``LearnerLost`` where no step was played in it."""
        figures = read_results(await self._call(lambda: self._algorithm.train()), self._config)
        sampled = figures.get(SAMPLED, 0.0)
        if sampled <= self._sampled:
            raise LearnerLost(f"RLlib played no step of any environment in an iteration ({sampled:g} in all): its env runners are gone")
        self._sampled = sampled
        return figures

    async def policy(self) -> TrainedPolicy:
        """What has been learnt so far."""
        return TrainedPolicy(await self._call(lambda: self._algorithm.get_module()), self._config.agdc)

    async def save(self, folder: Path) -> None:
        """Write everything the algorithm needs to go on; what it replays too, which RLlib's own checkpoints lack."""
        if self._config.agdc.learner == "deepspeed":
            await self._call(lambda: gather_optimizers(self._algorithm.learner_group))
        await self._call(lambda: self._algorithm.save_to_path(str(folder.absolute())))
        buffer = self._algorithm.local_replay_buffer
        if buffer is not None:
            await asyncio.to_thread(lambda: (folder / BUFFER).write_bytes(pickle.dumps(buffer.get_state())))

    async def load(self, folder: Path) -> None:
        """Read what ``save`` wrote. Raises ``CheckpointError``."""
        await self._call(lambda: self._algorithm.restore_from_path(str(folder.absolute())))
        self._sampled = 0.0
        buffer = self._algorithm.local_replay_buffer
        if buffer is None:
            return
        if not (folder / BUFFER).is_file():
            log.warning("%s has no replay buffer: learning goes on with the steps that are played from now on", folder)
            return
        try:
            await asyncio.to_thread(lambda: buffer.set_state(pickle.loads((folder / BUFFER).read_bytes())))
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError, IndexError, ImportError, TypeError) as error:
            raise CheckpointError(f"{folder / BUFFER} holds no replay buffer ({error}); resume from another checkpoint") from error

    async def export(self, folder: Path) -> None:
        """Write the policy alone."""
        await self._call(lambda: self._algorithm.get_module().save_to_path(str(folder.absolute())))

    async def restart(self) -> None:
        """Begin anew."""
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        """End every actor."""
        algorithm, self._algorithm = self._algorithm, None
        if algorithm is not None:
            await asyncio.to_thread(algorithm.stop)
            with contextlib.suppress(OSError):  # RLlib makes a folder in the user's home, which stays empty; were it not, it would be kept
                Path(algorithm.logdir).rmdir()

    async def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return await asyncio.to_thread(function)
        except ray.exceptions.RayActorError as error:
            raise LearnerLost(f"an actor of RLlib died: {error}") from error


class AgdcDriver(StepDriver):
    """A step is an iteration of RLlib; evaluations play the episodes of fixed seeds greedily."""

    parts: Parts

    def __init__(self, config: JobConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self._arena = make_arena(config.agdc)

    async def _train_step(self) -> None:
        began, trainer = time.perf_counter(), self.config.trainer
        metrics = await self.parts.learners.train_step()
        self.step += 1
        if trainer.eval_every and self.step % trainer.eval_every == 0:
            await self._evaluate()
        self.parts.tracker.log(self.step, metrics | self._faults | {"time/step_s": time.perf_counter() - began})

    async def _evaluate(self) -> None:
        if self.config.trainer.eval_tasks:
            began = time.perf_counter()
            policy = await self.parts.learners.policy()
            searches = await asyncio.to_thread(self._arena.run, policy, self.config.trainer.eval_tasks)
            figures = search_metrics(searches, self.config.agdc.tolerance)
            self.last_eval = {f"eval/{name}": value for name, value in figures.items()} | {"time/eval_s": time.perf_counter() - began}
            self.parts.tracker.eval(self.step, self.last_eval)
        self._evaluated_at = self.step

    def _state(self) -> dict[str, Any]:
        return {"agdc": _shape(self.config)}

    def _check(self, state: dict[str, Any]) -> None:
        _check_resumable(state, self.config)


def read_results(results: dict[str, Any], config: JobConfig) -> dict[str, float]:
    """RLlib's figures by flat names. An iteration in which no episode ended has no reward."""
    runners, learner = results.get("env_runners", {}), results.get("learners", {}).get(MODULE, {})
    names = {
        "episode_return_mean": "reward/mean",
        "episode_len_mean": "episode/steps",
        "num_env_steps_sampled_lifetime": SAMPLED,
    }
    figures = {ours: runners[theirs] for theirs, ours in names.items() if theirs in runners}
    figures |= {f"learner/{name}": value for name, value in learner.items() if isinstance(value, int | float | torch.Tensor)}
    figures |= {f"faults/{name}": value for name, value in runners.items() if name.startswith("belief_")}
    return {name: float(value) for name, value in figures.items() if value == value}


def _shape(config: JobConfig) -> dict[str, Any]:
    """What must not change between the sessions of a run."""
    agdc, learner = config.agdc, config.learner
    names = ("problem", "algorithm", "learner", "detect")
    split = {"zero_stage": learner.zero_stage, "split over ranks": learner.ranks if learner.zero_stage else 1}
    return {**{name: getattr(agdc, name) for name in names}, "hidden": list(agdc.hidden), **split}


def _check_resumable(state: dict[str, Any], config: JobConfig) -> None:
    """Raises ``CheckpointError`` where a job cannot go on from a driver's ``state``."""
    now = _shape(config)
    was = {**now, "problem": "source_term", **state.get("agdc", {})}  # what older checkpoints leave out is taken to be the same
    if was != now:
        raise CheckpointError(f"the checkpoint was written by a run with {was}, the job has {now}; resume with RUN/config.yaml")
