"""Jobs of ``kind: mat`` from the command line: train, evaluate, draw an episode."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from reasoner_ray.agents import SCRATCH
from reasoner_ray.agents.mat.driver import MatDriver, Parts, evaluation_of_tasks
from reasoner_ray.agents.mat.learner import MatLearners, load_network
from reasoner_ray.agents.mat.pool import TeamPool
from reasoner_ray.agents.mat.worker import RolloutWorker
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED, evaluated_folder, train_on_actors
from reasoner_ray.envs.multi_agent.adapters import make_teams
from reasoner_ray.envs.multi_agent.tasks import of_task, task_settings
from reasoner_ray.errors import ConfigError, ReasonerError
from reasoner_ray.pictures import check_ending, write_video
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a job of kind mat to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    for label, settings in task_settings(config.multi_agent).items():  # what is wrong with them, or the network, is said at once
        with of_task(label):
            teams = make_teams(settings, 1)
            teams.close()
            if config.model.path != SCRATCH:
                load_network(Path(config.model.path), teams.spec, config.mat)
    if config.tracking.video_every:
        check_ending(config.tracking.video)

    def make_driver(config: JobConfig, tracker: Tracker) -> MatDriver:
        return MatDriver(config, Parts(workers=TeamPool(config), learners=MatLearners(config), tracker=tracker))

    return train_on_actors(config, if_exists, make_driver)


def evaluate(config: JobConfig, model: str | None = None) -> dict[str, float]:
    """Greedy episodes of a trained network from fixed seeds, of every task of the job, in this process.

    The network is ``model``, a folder that was asked for; else the run's own ``model/``, whatever it was fine-tuned from; else, where
    nothing was trained yet, ``model.path``; its team may have been of another number of agents. One more episode (of the first task)
    is drawn into ``RUN/`` ``tracking.video`` where the environment can be, after the return is printed. Raises ``ReasonerError`` with
    what to do.
    """
    if not config.trainer.eval_tasks:
        raise ConfigError("trainer.eval_tasks is 0, so there is nothing to evaluate")
    check_ending(config.tracking.video)
    folder, tasks = evaluated_folder(config, model), list(config.multi_agent.tasks)
    workers = [RolloutWorker(config, task) for task in range(max(1, len(tasks)))]
    for worker in workers:
        worker.policy, _ = load_network(folder, worker.team)
    seeds = [FIRST_EVAL_SEED + i for i in range(config.trainer.eval_tasks)]
    figures = evaluation_of_tasks([worker.evaluate(seeds) for worker in workers], tasks)
    said = "{eval/return:.4g} +- {eval/return_ci95:.2g} (95 %) in {eval/episodes:.0f} episodes"
    each = "".join(f"; {label}: {figures[f'eval/return/{label}']:.4g} +- {figures[f'eval/return_ci95/{label}']:.2g}" for label in tasks)
    print(f"{folder}: return {said.format_map(figures)}{each}", flush=True)  # a display driver that crashes takes the process with it
    try:
        print(f"episode drawn into {write_video(workers[0].frames(FIRST_EVAL_SEED), config.run_dir / config.tracking.video)}")
    except (ReasonerError, OSError) as problem:
        log.warning("no episode was drawn: %s", problem)
    return figures
