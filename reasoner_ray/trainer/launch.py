"""From a validated configuration to a running job: the run's folder, the Ray cluster, the parts, signals."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

import ray

from reasoner_ray import settings
from reasoner_ray.config import JobConfig, to_yaml
from reasoner_ray.data.tasks import DataOrder, Item, Task, check_lengths, get_task
from reasoner_ray.doctor import check_shared_memory
from reasoner_ray.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from reasoner_ray.learner.group import LearnerGroup
from reasoner_ray.models import check_tokenizer_matches, load_tokenizer, resolve_dtype, resolve_model
from reasoner_ray.prm.conditioning import best_control
from reasoner_ray.rollout.pool import RolloutPool
from reasoner_ray.scoring.base import reward_terms
from reasoner_ray.scoring.pool import ScorerPool
from reasoner_ray.sync.backends import reserve_shared_gpus, resolve_backend
from reasoner_ray.trainer.checkpoint import check_resumable, list_checkpoints, read_driver_state
from reasoner_ray.trainer.driver import Parts, TrainerDriver
from reasoner_ray.trainer.metrics import evaluation_metrics
from reasoner_ray.trainer.placement import place
from reasoner_ray.trainer.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IfExists = Literal["error", "resume", "overwrite", "new"]
DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean |difference| in nats above which a probe fails; float32 is exact to 1e-5, bfloat16 measured 0.05."""
STOP_SECONDS = 10.0
"""How long actors may take to end by themselves."""

log = logging.getLogger(__name__)


class Driver(Protocol):
    """A run as its signals see it."""

    parts: Any  # among them the ``tracker``

    @property
    def finished(self) -> bool: ...

    def request_stop(self) -> None: ...

    async def run(self, resume_from: Path | None = None) -> dict[str, float]: ...

    async def stop(self) -> None: ...


def train(config: JobConfig, if_exists: IfExists = "error") -> dict[str, float]:
    """Run a job to its end and return its last evaluation.

    Raises ``ReasonerError`` with what to do, and ``KeyboardInterrupt`` once a run that was asked to stop has ended.
    """
    if config.kind == "rounds":
        from reasoner_ray.rounds.run import train as train_in_rounds

        return train_in_rounds(config, if_exists)
    if config.kind == "mat":
        from reasoner_ray.agents.mat.launch import train as train_team

        return train_team(config, if_exists)
    if config.kind == "sequence":
        from reasoner_ray.agents.sequence.launch import train as train_sequence

        return train_sequence(config, if_exists)
    if config.kind == "agdc":
        from reasoner_ray.agents.agdc.launch import train as train_search

        return train_search(config, if_exists)
    if config.kind != "rl":
        from reasoner_ray.trainer.supervised import train as train_supervised

        return train_supervised(config, if_exists)
    config, task, _ = load_task(config)
    config, checkpoint = choose_run(config, if_exists)
    if checkpoint is not None:
        check_resumable(read_driver_state(checkpoint), config.trainer, DataOrder(task.train(), config.seed))
    connect(config)
    try:
        placed = place(config, ray.cluster_resources())
        make_run_folder(config, if_exists)  # only now, so that a refused job leaves everything as it was
        tracker = Tracker(config, config.run_dir, resume=checkpoint is not None)
        driver = TrainerDriver(config, build_parts(placed, task, tracker))
        return run_driver(driver, checkpoint)
    finally:
        ray.shutdown()


def evaluate(config: JobConfig, model: str | None = None) -> dict[str, float]:
    """Greedy answers of ``config.model`` on the task's held-out prompts; of kind prm and value the model's scores of steps.

    Of kind mat and sequence: episodes; of kind agdc: searches. ``model`` is what the user asked to evaluate, where they did, and
    ``config.model.path`` too: to kind mat and sequence the job's own path is what the run began with.

    Raises ``ReasonerError`` with what to do.
    """
    if config.kind == "mat":
        from reasoner_ray.agents.mat.launch import evaluate as evaluate_team

        return evaluate_team(config, model)
    if config.kind == "sequence":
        from reasoner_ray.agents.sequence.launch import evaluate as evaluate_sequence

        return evaluate_sequence(config, model)
    if config.kind == "agdc":
        from reasoner_ray.agents.agdc.launch import evaluate as evaluate_search

        return evaluate_search(config)
    if config.kind in ("prm", "value"):
        from reasoner_ray.prm.evaluate import evaluate as evaluate_steps

        return evaluate_steps(config)
    config, task, _ = load_task(asking_for_the_best(config))
    items = held_out_items(config, task)
    if not items:
        raise ConfigError("trainer.eval_tasks is 0, so there is nothing to evaluate")
    connect(config)

    async def run(placed: JobConfig) -> dict[str, float]:
        pool, scorers = RolloutPool(placed), ScorerPool(placed)
        try:
            await asyncio.gather(pool.start(), scorers.start())
            await pool.assume_synced(version=0)
            results = await pool.evaluate(items)
            scored = await asyncio.gather(*(scorers.score(r, item) for r, item in zip(results, items, strict=True)))
            return evaluation_metrics(scored)
        finally:
            await asyncio.gather(pool.stop(), scorers.stop())

    try:
        return asyncio.run(run(place(config, ray.cluster_resources(), training=False)))
    finally:
        ray.shutdown()


def asking_for_the_best(config: JobConfig) -> JobConfig:
    """The job with the control text that ``supervised.condition`` taught for the best, where it names none of its own."""
    if config.supervised.condition is None or config.task.control:
        return config
    return config.model_copy(update={"task": config.task.model_copy(update={"control": best_control(config.supervised.condition)})})


def choose_run(config: JobConfig, if_exists: IfExists) -> tuple[JobConfig, Path | None]:
    """The configuration (renamed where a new run was asked for) and the checkpoint to resume. Changes nothing."""
    if if_exists == "new":
        base, number = config.name, 1
        while config.run_dir.exists():
            number += 1
            config = config.model_copy(update={"name": f"{base}-{number}"})
    run_dir = config.run_dir
    checkpoint: Path | None = None
    if run_dir.exists():
        checkpoints = list_checkpoints(run_dir)
        if if_exists == "error":
            raise ConfigError(
                f"{run_dir} exists ({len(checkpoints)} checkpoints). Go on with --resume, replace it with --overwrite, "
                "keep both with --if-exists new, or set another name=..."
            )
        if if_exists == "resume":
            if not checkpoints:
                raise CheckpointError(
                    f"nothing to resume: {run_dir} holds no complete checkpoint (trainer.checkpoint_every says how often one is written). "
                    "Replace the run with --overwrite, or keep both with --if-exists new"
                )
            checkpoint = checkpoints[-1]
    elif if_exists == "resume":
        raise CheckpointError(f"nothing to resume: {run_dir} does not exist")
    return config, checkpoint


def make_run_folder(config: JobConfig, if_exists: IfExists) -> None:
    """The run's folder with its configuration; what is to be overwritten goes first."""
    if if_exists == "overwrite" and config.run_dir.exists():
        shutil.rmtree(config.run_dir)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))


def load_task(config: JobConfig) -> tuple[JobConfig, Task, PreTrainedTokenizerBase]:
    """The task and tokenizer, checked against each other before any actor starts.

    The configuration comes back with the task's own stop strings where the job names none.
    """
    path = resolve_model(config.model.path)
    tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    check_tokenizer_matches(path, tokenizer)
    task = get_task(config.task, config.seed)
    task.check()
    reward_terms(config.scoring, config.task)
    check_lengths(
        task,
        tokenizer,
        max_context=config.rollout.max_context,
        max_new_tokens=config.rollout.max_new_tokens,
        items=[*task.train(), *held_out_items(config, task)],
    )
    if task.stop and not config.rollout.stop:
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"stop": tuple(task.stop)})})
    return config, task, tokenizer


def held_out_items(config: JobConfig, task: Task) -> list[Item]:
    """The evaluation prompts: the first ``eval_tasks`` held-out items."""
    return list(task.held_out()[: config.trainer.eval_tasks])


def connect(config: JobConfig) -> None:
    """Join the Ray cluster, or start a local one.

    Raises ``EnvironmentProblem`` where the address does not answer, or where this machine lacks what a local cluster needs.
    """
    address = config.cluster.address
    if address is not None:
        _must_answer(address)
    if ray.is_initialized():
        return
    if address is None and settings.ray_address() is None:
        shared = check_shared_memory()
        if shared.status == "missing":
            raise EnvironmentProblem(f"no shared memory for a local Ray cluster: {shared.detail}; {shared.mend}")
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address is None:
            ray.init(include_dashboard=False, **quiet)
        else:
            # Nodes that were started elsewhere do not know where the user's own modules lie.
            ray.init(address=address, runtime_env={"env_vars": settings.module_path()}, **quiet)
    except Exception as error:  # where a node does not come up in time Ray raises just that
        where = f"no Ray cluster answers at {address}" if address else "no local Ray cluster could be started"
        mend = "A busy machine may need longer than Ray waits: try again; or run `reasoner doctor`; or start one with `ray start --head`"
        raise EnvironmentProblem(f"{where}: {str(error).rstrip('.')}. {mend}") from error


def _must_answer(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there. Raises ``EnvironmentProblem``."""
    parts = urlsplit(address if "://" in address else f"ray-gcs://{address}")
    if parts.hostname is None or parts.port is None:  # "auto", "local": Ray finds these by itself
        return
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"no Ray cluster answers at {address} (cluster.address): {error.strerror or error}. Start one with `ray start --head`, or "
            "leave cluster.address out for a local one"
        ) from error


def build_parts(config: JobConfig, task: Task, tracker: Tracker) -> Parts:
    """The real parts: vLLM actors, scorer actors, DeepSpeed learners."""
    train_items = task.train()
    if not train_items:
        raise DataError(f"task {task.name} has no training items")
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    # Each actor resolves "auto" on its own node; this one may lack the GPU.
    dtype = "bfloat16" if gpus and config.model.dtype == "auto" else str(resolve_dtype(config.model.dtype)).removeprefix("torch.")
    backend = resolve_backend(config, gpus=gpus)
    shared_gpus = reserve_shared_gpus(config) if backend == "ipc" else None
    return Parts(
        rollouts=RolloutPool(config, shared_gpus),
        scorers=ScorerPool(config),
        learners=LearnerGroup(config, shared_gpus),
        tracker=tracker,
        train_items=DataOrder(train_items, config.seed),
        eval_items=held_out_items(config, task),
        probe_tolerance=config.sync.probe_tolerance or DEFAULT_TOLERANCE[dtype],
    )


def run_driver(driver: Driver, checkpoint: Path | None) -> dict[str, float]:
    """Run the driver to its end; its last evaluation. Raises ``KeyboardInterrupt`` once a run that was asked to stop has ended."""
    result = asyncio.run(run_with_signals(driver, checkpoint))
    if result is None:
        raise KeyboardInterrupt
    return result


async def run_with_signals(driver: Driver, checkpoint: Path | None) -> dict[str, float] | None:
    """Run the driver; the first Ctrl-C (or SIGTERM) checkpoints and ends, the second ends at once. None where one of them ended it."""
    loop = asyncio.get_running_loop()
    run = asyncio.ensure_future(driver.run(checkpoint))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop_once(driver, run.cancel))
    status: Literal["finished", "interrupted", "failed"] = "failed"
    try:
        result = await run
        status = "finished" if driver.finished else "interrupted"
    except asyncio.CancelledError:
        status = "interrupted"
    finally:
        # Both at once: each may wait for someone who does not answer.
        await asyncio.gather(_within(driver.stop, STOP_SECONDS), asyncio.to_thread(driver.parts.tracker.finish, status))
    return result if status == "finished" else None


def _stop_once(driver: Driver, cancel: Callable[[], bool]) -> Callable[[], None]:
    asked = False

    def handler() -> None:
        nonlocal asked
        if asked:
            cancel()
            return
        asked = True
        driver.parts.tracker.event("stopping (again to stop without a checkpoint)", "warning")
        driver.request_stop()

    return handler


async def _within(action: Callable[[], Awaitable[None]], seconds: float) -> None:
    """End the actors in an orderly way, but never hang on one that does not answer: Ray kills it at shutdown."""
    try:
        await asyncio.wait_for(action(), seconds)
    except TimeoutError:
        log.warning("actors did not end within %s s; Ray kills them", seconds)
