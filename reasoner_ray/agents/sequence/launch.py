"""Jobs of ``kind: sequence`` from the command line: train and evaluate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reasoner_ray.agents import SCRATCH
from reasoner_ray.agents.sequence.data import fingerprint, load_recordings
from reasoner_ray.agents.sequence.driver import Parts, SequenceDriver, evaluation
from reasoner_ray.agents.sequence.learner import SequenceLearners
from reasoner_ray.agents.sequence.network import DecisionTransformer, load_network, load_weights
from reasoner_ray.agents.sequence.player import Player
from reasoner_ray.agents.sequence.pool import PlayerPool
from reasoner_ray.agents.stepwise import FIRST_EVAL_SEED, evaluated_folder, train_on_actors
from reasoner_ray.errors import ConfigError, ModelError, ReasonerError
from reasoner_ray.pictures import check_ending, write_video
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

log = logging.getLogger(__name__)


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a job of kind sequence to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    recordings, interface, horizon = load_recordings(config)  # what is wrong with them, or the network, is said before anything starts
    if config.model.path != SCRATCH:
        load_weights(DecisionTransformer(interface, config.sequence, horizon), Path(config.model.path))

    def make_driver(config: JobConfig, tracker: Tracker) -> SequenceDriver:
        data = fingerprint(recordings)
        return SequenceDriver(config, Parts(workers=PlayerPool(config), learners=SequenceLearners(config), tracker=tracker, data=data))

    return train_on_actors(config, if_exists, make_driver)


def evaluate(config: JobConfig, model: str | None = None) -> dict[str, float]:
    """Episodes of a trained network from fixed seeds for each of ``sequence.targets``, in this process.

    The network is ``model``, else the run's own ``model/``, else ``model.path``. One episode is drawn into ``RUN/``
    ``tracking.video`` where the environment can be. Raises ``ReasonerError`` with what to do.
    """
    if not config.trainer.eval_tasks:
        raise ConfigError("trainer.eval_tasks is 0, so there is nothing to evaluate")
    check_ending(config.tracking.video)
    folder = evaluated_folder(config, model)
    player = make_player(config, folder)
    seeds = [FIRST_EVAL_SEED + i for i in range(config.trainer.eval_tasks)]
    figures = evaluation({target: player.evaluate(seeds, target) for target in config.sequence.targets})
    said = "return {eval/return:.4g} +- {eval/return_ci95:.2g} (95 %) in {eval/episodes:.0f} episodes"
    print(f"{folder}: asked for {config.sequence.targets[0]:g}, {said.format_map(figures)}", flush=True)
    try:
        frames = player.draw(FIRST_EVAL_SEED, config.sequence.targets[0])
        print(f"episode drawn into {write_video(frames, config.run_dir / config.tracking.video)}")
    except (ReasonerError, OSError) as problem:
        log.warning("no episode was drawn: %s", problem)
    return figures


def make_player(config: JobConfig, folder: Path) -> Player:
    """A player with the network in ``folder``. Raises ``ModelError`` where that acts in another environment, or ``ConfigError``."""
    network = load_network(folder)
    trained, settings = network.settings, config.sequence
    # What the network is, its folder says; how it is asked and where it acts, the job does.
    kept = ("world", "targets", "sample", "envs", "eval_context", "delayed", "data", "collect")
    settings = trained.model_copy(update={name: getattr(settings, name) for name in kept if name in type(settings).model_fields})
    player = Player(config.model_copy(update={"sequence": settings}), network=network)
    if network.interface != player.team:
        raise ModelError(
            f"{folder} acts in another environment than {settings.world.id}: {network.interface} there, {player.team} here; "
            "evaluate it in the one it was trained on"
        )
    if network.embed_timestep is not None and player.horizon > network.horizon:
        raise ModelError(
            f"{folder} knows {network.horizon} time steps, an episode here has up to {player.horizon}; lower sequence.world.max_steps"
        )
    if (settings.eval_context or 0) > trained.context:
        raise ModelError(f"{folder} sees {trained.context} steps; lower sequence.eval_context={settings.eval_context}")
    if settings.sample and not network.head.stochastic:
        raise ConfigError(f"sequence.sample: {folder} says one action, not a distribution; set sequence.sample=false")
    if config.rollout.torch_threads is not None:
        torch.set_num_threads(config.rollout.torch_threads)
    return player
