"""Jobs of ``kind: mat`` from the command line: train, evaluate, draw an episode."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reasoner_ray.agents.mat.driver import MatDriver, Parts, evaluation
from reasoner_ray.agents.mat.learner import MatLearners, load_network
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED, GIF, evaluated_folder, train_on_actors
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.teams import Teams
from reasoner_ray.errors import ConfigError, ModelError, ReasonerError
from reasoner_ray.pictures import MAX_FRAMES, write_gif
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a job of kind mat to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    make_teams(config.multi_agent, 1).close()  # what is wrong with the environment is said before anything starts

    def make_driver(config: JobConfig, tracker: Tracker) -> MatDriver:
        return MatDriver(config, Parts(workers=TeamPool(config), learners=MatLearners(config), tracker=tracker))

    return train_on_actors(config, if_exists, make_driver)


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


def draw_episode(worker: RolloutWorker, path: Path) -> Path:
    """A greedy episode from the first seed of evaluation as a GIF. Raises ``EnvironmentProblem`` where the environment draws nothing."""
    frames: list[np.ndarray] = []

    def look(teams: Teams, running: int) -> None:
        if running and len(frames) < MAX_FRAMES:
            frames.append(teams.render(0))

    worker.play([FIRST_EVAL_SEED], pictures=True, look=look)
    return write_gif(frames, path)
