"""Jobs of ``kind: mat`` from the command line: train, evaluate, draw an episode."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray

from reasoner_ray.agents.mat.driver import FIRST_EVAL_SEED, MatDriver, Parts, evaluation
from reasoner_ray.agents.mat.learner import MatLearners, load_network
from reasoner_ray.agents.mat.pool import WorkerPool
from reasoner_ray.agents.mat.settings import SCRATCH
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.teams import Teams
from reasoner_ray.errors import ConfigError, ModelError, ReasonerError
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.checkpoint import read_driver_state
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)

GIF = "episode.gif"
FRAME_MS = 100
MAX_FRAMES = 500


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a job of kind mat to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    make_teams(config.multi_agent, 1).close()  # what is wrong with the environment is said before anything starts
    config, checkpoint = launch.choose_run(config, if_exists)
    if checkpoint is not None:
        read_driver_state(checkpoint)
    launch.connect(config)
    try:
        check_room(config, ray.cluster_resources())
        launch.make_run_folder(config, if_exists)
        tracker = Tracker(config, config.run_dir, resume=checkpoint is not None)
        driver = MatDriver(config, Parts(workers=WorkerPool(config), learners=MatLearners(config), tracker=tracker))
        return launch.run_driver(driver, checkpoint)
    finally:
        ray.shutdown()


def check_room(config: JobConfig, available: Mapping[str, float]) -> None:
    """Refuse a job that the cluster can never place. Raises ``ConfigError``."""
    workers, learner = config.rollout, config.learner
    cpus = workers.workers * workers.cpus + learner.ranks * learner.cpus
    if cpus > available.get("CPU", 0):
        raise ConfigError(
            f"rollout.workers of rollout.cpus and learner.ranks of learner.cpus add up to {cpus:g} CPUs; the cluster has "
            f"{available.get('CPU', 0):g}. Lower them (they are reservations, not limits) or the number of actors"
        )
    gpus = available.get("GPU", 0)
    if gpus and learner.ranks > gpus:
        raise ConfigError(f"learner.ranks={learner.ranks} need a GPU each where there are any; the cluster has {gpus:g}")


def evaluate(config: JobConfig, model: str | None = None) -> dict[str, float]:
    """Greedy episodes of a trained network from fixed seeds, in this process.

    The network is ``model``, a folder that was asked for; else the run's own ``model/``, whatever it was fine-tuned from; else, where
    nothing was trained yet, ``model.path``. One more episode is drawn into ``RUN/episode.gif`` where the environment can be, after
    the return is printed. Raises ``ReasonerError`` with what to do.
    """
    if not config.trainer.eval_tasks:
        raise ConfigError("trainer.eval_tasks is 0, so there is nothing to evaluate")
    worker = RolloutWorker(config, 0)
    folder = evaluated_folder(config, model)
    network, team = load_network(folder)
    if difference := team.difference(worker.team):
        raise ModelError(f"{folder} was trained for another team ({difference}); evaluate it in the environment it was trained on")
    worker.policy = network
    figures = evaluation(worker.evaluate([FIRST_EVAL_SEED + i for i in range(config.trainer.eval_tasks)]))
    said = "{eval/return:.4g} +- {eval/return_ci95:.2g} (95 %) in {eval/episodes:.0f} episodes"
    print(f"{folder}: return {said.format_map(figures)}", flush=True)  # a display driver that crashes takes the process with it
    try:
        print(f"episode drawn into {draw_episode(worker, config.run_dir / GIF)}")
    except (ReasonerError, OSError) as problem:
        log.warning("no episode was drawn: %s", problem)
    return figures


def evaluated_folder(config: JobConfig, model: str | None) -> Path:
    """Where the network that ``evaluate`` looks at lies."""
    if model is not None:
        return Path(model)
    own = config.run_dir / "model"
    return own if own.exists() or config.model.path == SCRATCH else Path(config.model.path)


def draw_episode(worker: RolloutWorker, path: Path) -> Path:
    """A greedy episode from the first seed of evaluation as a GIF. Raises ``EnvironmentProblem`` where the environment draws nothing."""
    frames: list[np.ndarray] = []

    def look(teams: Teams, running: int) -> None:
        if running and len(frames) < MAX_FRAMES:
            frames.append(teams.render(0))

    worker.play([FIRST_EVAL_SEED], pictures=True, look=look)
    return write_gif(frames, path)


def write_gif(frames: Sequence[np.ndarray], path: Path) -> Path:
    """An animation of the first ``MAX_FRAMES`` frames, uint8 [height, width, 3] each; returns ``path``. Raises ``OSError``."""
    from PIL import Image

    pictures = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames[:MAX_FRAMES]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0)
    return path
