"""Supervised training: batches of examples to the learners, held-out figures, checkpoints. ``kind: sft | prm | value``."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from reasoner_ray.data.tasks import DataOrder, Item, get_task
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from reasoner_ray.learner.group import LearnerGroup
from reasoner_ray.learner.predict import predict_stored
from reasoner_ray.models import check_tokenizer_matches, load_tokenizer, read_config, resolve_model
from reasoner_ray.prm.conditioning import best_examples, conditioned
from reasoner_ray.prm.examples import Example, read_examples, split
from reasoner_ray.prm.judge import verdict_logits
from reasoner_ray.prm.metrics import step_metrics, value_metrics
from reasoner_ray.trainer import launch
from reasoner_ray.trainer.checkpoint import check_resumable, read_driver_state
from reasoner_ray.trainer.placement import check_resources
from reasoner_ray.trainer.stepwise import StepDriver
from reasoner_ray.trainer.tracking import Tracker
from reasoner_ray.trajectory import Trajectory, flatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasoner_ray.config import JobConfig
    from reasoner_ray.prm.examples import Kind
    from reasoner_ray.prm.settings import SupervisedConfig

log = logging.getLogger(__name__)


def train(config: JobConfig, if_exists: launch.IfExists = "error") -> dict[str, float]:
    """Run a supervised job to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    examples, held_out, left_out = load_examples(config)
    config = with_steps(config, len(examples))
    config, checkpoint = launch.choose_run(config, if_exists)
    order = order_of(examples, config.seed)
    if checkpoint is not None:
        _check_resumable(read_driver_state(checkpoint), config, order)
    launch.connect(config)
    try:
        check_resources(config, ray.cluster_resources())
        launch.make_run_folder(config, if_exists)
        tracker = Tracker(config, config.run_dir, resume=checkpoint is not None)
        parts = Parts(learners=LearnerGroup(config), tracker=tracker, order=order, held_out=held_out, left_out=left_out)
        return launch.run_driver(SupervisedDriver(config, parts), checkpoint)
    finally:
        ray.shutdown()


def load_examples(config: JobConfig) -> tuple[list[Example], list[Example], Counter[str]]:
    """What a job learns from, what it is evaluated on, and how many solutions were left out, and why. Raises ``ReasonerError``."""
    kind, settings = kind_of(config), config.supervised
    if not settings.data:
        raise ConfigError(f"supervised.data: kind {kind} needs files of records to learn from")
    path = resolve_model(config.model.path)
    tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    check_tokenizer_matches(path, tokenizer)
    task = get_task(config.task, config.seed) if "task" in settings.data else None
    examples, left_out = read_examples(settings.data, kind, settings, tokenizer, task)
    vocabulary = int(read_config(path)["vocab_size"])
    _check_tokens(examples, vocabulary)
    if settings.held_out:
        held_out, also = read_examples(settings.held_out, kind, settings, tokenizer)
        _check_tokens(held_out, vocabulary)
        left_out = left_out + also
        asked = {example.partial.prompt for example in held_out}
        apart = [example for example in examples if example.partial.prompt not in asked]
        if len(apart) < len(examples):
            left_out["of a question that is held out"] += len(examples) - len(apart)
            examples = apart
        if not examples:
            raise DataError("every question of supervised.data is among those of supervised.held_out: nothing is left to learn from")
    else:
        examples, held_out = split(examples, settings.held_out_fraction)
        if not examples:
            raise DataError(
                f"every question is held out (supervised.held_out_fraction={settings.held_out_fraction:g}); lower it or add data"
            )
    if settings.keep_top is not None:
        examples = best_examples(examples, settings.keep_top)
    return _told(examples, settings, tokenizer, left_out), _told(held_out, settings, tokenizer, left_out), left_out


def _told(examples: list[Example], settings: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, left_out: Counter[str]) -> list[Example]:
    """After the split, which goes by the question alone: the same behind control texts, where the job has them, as far as there is room."""
    if settings.condition is None:
        return examples
    told = conditioned(examples, settings.condition, tokenizer)
    fits = [example for example in told if len(example.partial.tokens) <= settings.max_tokens]
    if len(fits) < len(told):
        left_out[f"longer than supervised.max_tokens={settings.max_tokens} with their control text"] += len(told) - len(fits)
    return fits


def _check_tokens(examples: Sequence[Example], vocabulary: int) -> None:
    """Raises ``DataError`` naming a record with a token that the model does not have: on a GPU it would be an obscure fault."""
    for example in examples:
        if max(example.partial.tokens) >= vocabulary:
            raise DataError(f"{example.where}: token {max(example.partial.tokens)} is not among the model's {vocabulary}")


def kind_of(config: JobConfig) -> Kind:
    """The job's supervised kind. Raises ``ConfigError`` for the others."""
    if config.kind == "sft" or config.kind == "prm" or config.kind == "value":
        return config.kind
    raise ConfigError(f"kind: {config.kind} does not learn from records; supervised training is kind sft, prm or value")


def with_steps(config: JobConfig, n_examples: int) -> JobConfig:
    """The job with ``trainer.steps`` that its epochs come to."""
    settings = config.supervised
    steps = math.ceil(settings.epochs * n_examples / settings.batch)
    steps = min(steps, settings.max_steps or steps)
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": steps})})


def order_of(examples: Sequence[Example], seed: int) -> DataOrder:
    """The examples in an endless order that the seed fixes; its items carry them as ``info["example"]``."""
    items = [
        Item(id=e.id, prompt=str(e.partial.tokens), answer=(e.partial.ends, e.labels, e.reward), info={"example": e}) for e in examples
    ]
    return DataOrder(items, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the driver coordinates."""

    learners: Any  # ``trainer.parts.Learners`` that can also ``run`` a function on every rank
    tracker: Tracker
    order: DataOrder
    held_out: list[Example]
    left_out: Counter[str] = field(default_factory=Counter)
    store: Callable[[Any], Any] = field(default=ray.put)


class SupervisedDriver(StepDriver):
    """Every solution once an epoch, in an order that the seed fixes."""

    parts: Parts

    def __init__(self, config: JobConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self._kind = kind_of(config)
        self._held_out: list[Trajectory] = [e.trajectory(self._kind, config.supervised) for e in parts.held_out]
        self._held_out_ref: Any = None

    def _warnings(self) -> list[str]:
        return [f"{number} solutions were left out: {reason}" for reason, number in self.parts.left_out.items()]

    async def _train_step(self) -> None:
        """Learn from the next batch, look at the result, say what came of it."""
        began, trainer = time.perf_counter(), self.config.trainer
        batch, ranks = self._batch(), self.config.learner.ranks
        # A share may be smaller than another, or empty: every loss is divided by counts over all of them.
        learned = await self.parts.learners.train_step([self.parts.store(batch[rank::ranks]) for rank in range(ranks)])
        self.step += 1
        if trainer.eval_every and self.step % trainer.eval_every == 0:
            await self._evaluate()
        metrics = {key: value for key, value in learned.items() if not key.startswith("mismatch/")}  # nothing was rolled out
        seen = min(self.step * self.config.supervised.batch, self._places)
        metrics |= {"train/epoch": seen / len(self.parts.order), "time/step_s": time.perf_counter() - began}
        self.parts.tracker.log(self.step, metrics | self._faults)

    @property
    def _places(self) -> int:
        """Solutions of all epochs."""
        return self.config.supervised.epochs * len(self.parts.order)

    def _batch(self) -> list[Trajectory]:
        """The next step's solutions; the last step of the last epoch may have fewer."""
        settings = self.config.supervised
        first = self.step * settings.batch
        items = [self.parts.order[place] for place in range(first, min(first + settings.batch, self._places))]
        return [item.info["example"].trajectory(self._kind, settings) for item in items]

    async def _evaluate(self) -> None:
        """Figures on the held-out solutions."""
        if self._held_out:
            began = time.perf_counter()
            if self._held_out_ref is None:
                self._held_out_ref = self.parts.store(self._held_out)
            shares = await self.parts.learners.run(predict_stored, [self._held_out_ref])
            figures = held_out_metrics(self._kind, self._held_out, shares, self.config.supervised)
            self.last_eval = {f"eval/{name}": value for name, value in figures.items()} | {"time/eval_s": time.perf_counter() - began}
            self.parts.tracker.eval(self.step, self.last_eval)
        self._evaluated_at = self.step

    def _state(self) -> dict[str, Any]:
        # ``ready`` and ``running`` are the groups of a run that rolls out: there are none.
        state: dict[str, Any] = {"version": self.step, "data": self.parts.order.fingerprint, "ready": {}, "running": []}
        return state | {"batch": self.config.supervised.batch}

    def _check(self, state: dict[str, Any]) -> None:
        _check_resumable(state, self.config, self.parts.order)


def _check_resumable(state: dict[str, Any], config: JobConfig, order: DataOrder) -> None:
    """Raises ``CheckpointError`` where a job cannot go on from a driver's ``state``: a step is a place in the data by its batch."""
    check_resumable(state, config.trainer, order)
    if state["batch"] != config.supervised.batch:
        raise CheckpointError(
            f"the checkpoint counts steps of supervised.batch={state['batch']} solutions, the job has {config.supervised.batch}; "
            "resume with the former, or start a new run from the trained model"
        )


def held_out_metrics(
    kind: Kind, trajectories: Sequence[Trajectory], shares: Sequence[tuple[torch.Tensor, torch.Tensor]], settings: SupervisedConfig
) -> dict[str, float]:
    """The figures of ``kind`` from what the ranks said (``predict``) of ``trajectories``."""
    targets = flatten(trajectories).rewards
    said = torch.full_like(targets, float("nan"))
    for places, values in shares:
        said[places] = values
    if kind == "sft":
        loss = -float(said.double().mean())
        return {"loss": loss, "perplexity": math.exp(min(loss, 100.0)), "tokens": float(len(said))}
    if kind == "prm":
        if settings.head == "judge":
            said, targets = verdict_logits(said, targets)
        return step_metrics(np.asarray(torch.sigmoid(said)), np.asarray(targets), settings.threshold)
    return value_metrics(np.asarray(said), np.asarray(targets))
