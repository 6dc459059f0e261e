"""The training loop: collect groups, learn, sync weights, look at the result. It holds references, never tensors.

On-policy and asynchronous training are the same code. With ``max_staleness: 0`` all slots are taken while the
learner works, so generation waits for the new weights; with more, the engines go on under the old ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasoner_ray.errors import CheckpointError, DataError, EnvironmentProblem, LearnerLost, ReasonerError, SyncError
from reasoner_ray.trainer.buffer import GroupBuffer, Slot, Stage
from reasoner_ray.trainer.checkpoint import check_resumable, list_checkpoints, read_driver_state, write_checkpoint, write_model
from reasoner_ray.trainer.metrics import evaluation_metrics, group_row, step_metrics
from reasoner_ray.trainer.workers import WantedWorkers

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from reasoner_ray.config import JobConfig
    from reasoner_ray.data.tasks import DataOrder, Item
    from reasoner_ray.trainer.parts import GroupResult, Learners, Rollouts, Scorers
    from reasoner_ray.trainer.tracking import Tracker

log = logging.getLogger(__name__)

PROBE_TASKS = 2
"""Prompts of a parity probe: enough to see a wrong weight, cheap enough to run often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the driver coordinates."""

    rollouts: Rollouts
    scorers: Scorers
    learners: Learners
    tracker: Tracker
    train_items: DataOrder
    eval_items: list[Item]
    probe_tolerance: float


@dataclass
class Counters:
    """What went wrong so far, over the whole run and its resumes."""

    groups_failed: int = 0
    answers_unscored: int = 0
    environment: Counter[str] = field(default_factory=Counter)  # failures by kind
    failed_in_a_row: int = 0
    actions: int = 0  # that environments answered, in the groups trained on
    learner_restarts: int = 0
    checkpoints_failed: int = 0


@dataclass
class Stopwatch:
    """Seconds a step spent in each phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=lambda: time.perf_counter())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.began


class TrainerDriver:
    """One run, from its start (or its newest checkpoint) to its last step."""

    def __init__(self, config: JobConfig, parts: Parts) -> None:
        self.config = config
        self.parts = parts
        self.step = 0
        self.version = 0
        self.syncs = 0
        self.counters = Counters()
        self.buffer = self._new_buffer()
        self.watch = Stopwatch()
        self.last_eval: dict[str, float] = {}
        self._workers = WantedWorkers(config.run_dir)
        self._eval_due = True
        self._probe_due = False
        self._readmit: list[int] = []
        self._failure: BaseException | None = None
        self._environment_errors: set[str] = set()  # texts that were told
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._group_done = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Every step was trained, and the result evaluated."""
        return self.step >= self.config.trainer.steps and not self._eval_due

    def request_stop(self) -> None:
        """Checkpoint and end at once, or after the learning phase under way; before the first step there is nothing to keep."""
        self._stop.set()
        self._group_done.set()

    async def run(self, resume_from: Path | None = None) -> dict[str, float]:
        """Train to the last step and return the last evaluation. Raises ``ReasonerError`` with what to do."""
        if not await self._unless_stopped(self._start(resume_from)):
            return {}
        begin = self._begin()
        while True:
            try:
                if await self._unless_stopped(begin):
                    await self._train()
                return self.last_eval
            except LearnerLost as error:
                self.parts.tracker.event(f"learner lost ({error}); going back to the last checkpoint", "error")
                begin = self._restart_learner(error)

    async def stop(self) -> None:
        """End every actor; safe after any failure."""
        self._cancel_running()
        parts = self.parts
        await asyncio.gather(parts.rollouts.stop(), parts.scorers.stop(), parts.learners.stop())

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do ``work``; False where a stop was asked for before its end, which cancels it."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            task.cancel()  # without effect where it is done
        await asyncio.wait((task,))
        return not task.cancelled() and task.result() is None

    async def _start(self, resume_from: Path | None) -> None:
        parts = self.parts
        await asyncio.gather(parts.rollouts.start(), parts.scorers.start(), parts.learners.start())
        if resume_from is not None:
            await self._restore(resume_from)
        parts.tracker.start(self.config.trainer.steps, self.step)

    async def _begin(self) -> None:
        """What comes before the first step, and before the next one where the learner was lost."""
        await self._sync(must_probe=True)
        if self._eval_due:
            await self._evaluate()
        await self.parts.rollouts.stats()  # what the engines did so far belongs to no step
        self.watch = Stopwatch()
        await self._admit()

    async def _train(self) -> None:
        """Go on to the last step, or to where a stop was asked for, and keep the result."""
        while self.step < self.config.trainer.steps and not self._stop.is_set():
            if await self._train_step():
                await self._after_step()
        self._cancel_running()
        await self._checkpoint()
        if self.step >= self.config.trainer.steps:
            await write_model(self.config.run_dir, self.parts.learners.export)

    # -- one step ------------------------------------------------------------------------------------------

    async def _train_step(self) -> bool:
        """Collect a step's groups, learn from them, publish the weights, look at the result. False where a stop was asked for."""
        with self.watch.phase("collect"):
            slots = await self._collect()
        if slots is None:
            return False
        results: list[GroupResult] = [slot.payload for slot in slots]
        with self.watch.phase("learn"):
            learned = await self.parts.learners.train_step([r.trajectories for r in results])
        self.step += 1
        self.version += 1
        with self.watch.phase("sync"):
            await self._sync()
        self.buffer.release_trained()
        self._check_mismatch(learned)
        trainer = self.config.trainer
        if self.step == trainer.steps or (trainer.eval_every and self.step % trainer.eval_every == 0):
            self._eval_due = True
            await self._unless_stopped(self._evaluate())
        await self._record(slots, learned)
        return True

    async def _record(self, slots: list[Slot], learned: dict[str, float]) -> None:
        """A step's figures, which are of the time since those of the step before, whatever it was spent on."""
        results: list[GroupResult] = [slot.payload for slot in slots]
        metrics = step_metrics(results, trained_at=self.version - 1, learned=learned, phases=self.watch.seconds)
        metrics |= self._count_actions(results) | self._fault_metrics() | await self._rates()
        self.watch = Stopwatch()
        tracker = self.parts.tracker
        tracker.log(self.step, metrics)
        tracker.samples(self.step, [row for r in results for row in r.summary.get("samples", ())])
        tracker.groups(self.step, [group_row(slot.index, self.parts.train_items[slot.index], slot.payload) for slot in slots])

    async def _after_step(self) -> None:
        """Write a checkpoint where one is due, then let the next groups in. The end of a run has its own."""
        every = self.config.trainer.checkpoint_every
        if self.step < self.config.trainer.steps and not self._stop.is_set():
            if every and self.step % every == 0:
                await self._checkpoint()
            await self._unless_stopped(self._scale())
            await self._admit()

    async def _scale(self) -> None:
        """Bring the number of engines to what the user wrote into the run's file ``workers``; what cannot be done is only reported."""
        tracker = self.parts.tracker
        try:
            wanted = self._workers.written()
            if wanted is not None and wanted != (before := self.parts.rollouts.n_engines):
                await self.parts.rollouts.scale(wanted)
                tracker.event(f"rollout engines: {before} -> {wanted}", "info")
        except LearnerLost:
            raise
        except ReasonerError as error:
            tracker.event(f"the number of rollout engines could not be changed: {error}", "warning")

    async def _collect(self) -> list[Slot] | None:
        """Wait for a step's groups; None where a stop was asked for."""
        while not self._stop.is_set():
            if self._failure is not None:
                raise self._failure
            if self.buffer.step_is_ready(self.version):
                return self.buffer.take_step(self.version)
            self._group_done.clear()
            await self._group_done.wait()
        return None

    # -- groups --------------------------------------------------------------------------------------------

    async def _admit(self) -> None:
        """Fill the free slots. Engines are paused meanwhile, so that a batch depends on the data order alone, not on timing."""
        await self.parts.rollouts.pause()
        for index in self._readmit:
            self._launch(self.buffer.admit(self.version, index))
        self._readmit = []
        while self.buffer.free > 0 and self._groups_wanted() > 0:
            self._launch(self.buffer.admit(self.version))
        await self.parts.rollouts.resume(seed=self.config.seed * 1_000_003 + self.step if self._on_policy else None)

    @property
    def _on_policy(self) -> bool:
        return self.config.trainer.max_staleness == 0

    def _groups_wanted(self) -> int:
        """Groups that the remaining steps still need beyond those in the system."""
        trainer = self.config.trainer
        in_system = self.buffer.capacity - self.buffer.free
        return (trainer.steps - self.step) * trainer.tasks_per_step - in_system

    def _launch(self, slot: Slot) -> None:
        item = self.parts.train_items[slot.index]
        call = self.parts.rollouts.submit(item, f"g{slot.index}", self.config.trainer.samples_per_task)
        task = asyncio.create_task(self._produce(slot, item, call))
        self._tasks[slot.index] = task
        task.add_done_callback(lambda done: self._on_produced(slot.index, done))

    async def _produce(self, slot: Slot, item: Item, call: Any) -> None:
        """Follow one group from generation to its scores."""
        result = await self.parts.rollouts.finish(call)
        scored = await self._score(result, item)
        if scored.summary["failed"]:
            self._replace_failed(slot, scored)
        else:
            self.counters.failed_in_a_row = 0
            self.buffer.ready(slot.index, scored)

    async def _score(self, result: GroupResult, item: Item) -> GroupResult:
        scored = await self.parts.scorers.score(result, item)
        self.counters.answers_unscored += sum(scored.summary["unscored"].values())
        self.counters.environment.update(scored.summary.get("environment_failures", {}))
        for kind, text in scored.summary.get("environment_errors", {}).items():
            if text not in self._environment_errors:  # each is told once; their numbers are metrics
                self._environment_errors.add(text)
                self.parts.tracker.event(f"an episode was played again, its environment failed ({kind}): {text}", "warning")
        return scored

    def _on_produced(self, index: int, task: asyncio.Task[None]) -> None:
        """A group's task ended: wake the loop, and keep the first error for it."""
        if self._tasks.get(index) is task:
            del self._tasks[index]
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._group_done.set()

    def _replace_failed(self, slot: Slot, scored: GroupResult) -> None:
        """Count a failed group and admit another in its place. Raises ``DataError`` where too many fail in a row."""
        counters, limit = self.counters, self.config.trainer.max_failed_groups
        counters.groups_failed += 1
        counters.failed_in_a_row += 1
        reason = scored.summary.get("error", "no reason given")
        self.parts.tracker.event(f"group {slot.index} failed and was replaced: {reason}", "warning")
        if counters.failed_in_a_row > limit:
            raise DataError(
                f"{counters.failed_in_a_row} groups in a row failed (trainer.max_failed_groups={limit}); the last one: {reason}"
            )
        self.buffer.drop(slot.index)
        self._launch(self.buffer.admit(self.version))

    def _cancel_running(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    # -- weights -------------------------------------------------------------------------------------------

    async def _sync(self, must_probe: bool = False) -> None:
        """Bring the learner's weights to every engine; check now and then that they arrived."""
        published = await self.parts.learners.publish_weights()
        await self.parts.rollouts.pause()
        await self.parts.rollouts.update_weights(published, self.version)
        await self.parts.rollouts.resume()
        self._probe_due |= must_probe or self.syncs % self.config.sync.probe_every == 0
        if self._probe_due:
            self._probe_due = not await self._probe()
        self.syncs += 1

    async def _probe(self) -> bool:
        """Whether any engine answered. Raises ``SyncError`` where rollout and learner disagree on the log-probs of fresh samples."""
        items = self.parts.eval_items[:PROBE_TASKS] or [self.parts.train_items[i] for i in range(PROBE_TASKS)]
        mismatch = await self.parts.learners.mismatch(await self.parts.rollouts.probe(items))
        if not mismatch["tokens"]:
            return False
        limit = self.parts.probe_tolerance
        if not mismatch["mean_abs"] <= limit:
            raise SyncError(
                f"the weights of version {self.version} did not arrive: rollout and learner log-probs differ by "
                f"{mismatch['mean_abs']:.4g} nats on average over {mismatch['tokens']:.0f} tokens (limit {limit:g}, "
                "sync.probe_tolerance). Training on would use the wrong policy. Compare model.dtype on both sides, and run "
                "`pytest tests/sync` on this machine"
            )
        return True

    def _check_mismatch(self, metrics: dict[str, float]) -> None:
        limit, k3 = self.config.trainer.max_mismatch_k3, metrics.get("mismatch/k3")
        if limit is not None and k3 is not None and not k3 <= limit:
            raise SyncError(
                f"step {self.step}: the k3 mismatch of rollout and learner is {k3:.4g}, above trainer.max_mismatch_k3={limit:g}"
            )

    # -- evaluation and metrics ----------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        """Answers on the held-out prompts."""
        items = self.parts.eval_items
        if items:
            with self.watch.phase("eval"):
                results = await self.parts.rollouts.evaluate(items)
                scored = await asyncio.gather(*(self._score(r, item) for r, item in zip(results, items, strict=True)))
            self.last_eval = evaluation_metrics(scored) | {"time/eval_s": self.watch.seconds["eval"]}
            self.parts.tracker.eval(self.step, self.last_eval)
        self._eval_due = False

    async def _rates(self) -> dict[str, float]:
        stats, total = await self.parts.rollouts.stats(), self.watch.total
        engines = max(self.parts.rollouts.n_engines, 1)
        return {
            "rollout/tokens_per_s": stats["tokens"] / max(stats["busy_s"], 1e-9),
            "idle/rollout": max(0.0, 1.0 - stats["busy_s"] / (engines * total)),
            "idle/learner": max(0.0, 1.0 - self.watch.seconds["learn"] / total),
            "faults/engine_restarts": stats["restarts"],
            "time/step_s": total,
        }

    def _count_actions(self, results: list[GroupResult]) -> dict[str, float]:
        turns = [n for r in results for n in r.summary.get("metrics", {}).get("turns", ())]
        self.counters.actions += int(sum(turns))
        return {"episode/actions_in_all": float(self.counters.actions)} if turns else {}

    def _fault_metrics(self) -> dict[str, float]:
        c = self.counters
        return {
            "faults/groups_failed": float(c.groups_failed),
            "faults/answers_unscored": float(c.answers_unscored),
            **{f"faults/environment_{kind}": float(n) for kind, n in c.environment.items()},
            "faults/learner_restarts": float(c.learner_restarts),
            "faults/checkpoints_failed": float(c.checkpoints_failed),
        }

    # -- checkpoints and recovery --------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Write a checkpoint; where that fails, say so, count it and go on with the one before."""
        # On-policy a batch is sampled under one seed, and half of it would be sampled otherwise: all of it is generated again.
        again = (Stage.RUNNING, Stage.READY) if self._on_policy else (Stage.RUNNING,)
        ready = {} if self._on_policy else {s.index: (s.admitted_at, s.payload) for s in self.buffer.slots(Stage.READY)}
        state = {
            "step": self.step,
            "version": self.version,
            "data": self.parts.train_items.fingerprint,
            "counters": self.counters,
            "eval_due": self._eval_due,
            "next_index": self.buffer.next_index,
            "running": [s.index for s in self.buffer.slots(*again)],
            "ready": {i: (at, await self.parts.scorers.fetch(result)) for i, (at, result) in ready.items()},
        }
        with self.watch.phase("checkpoint"):
            try:
                await write_checkpoint(
                    self.config.run_dir, self.step, state, self.parts.learners.save, self.config.trainer.keep_checkpoints
                )
            except CheckpointError as error:
                self.counters.checkpoints_failed += 1
                self.parts.tracker.event(str(error), "error")

    async def _restore(self, checkpoint: Path) -> None:
        """Go back to a checkpoint: learner, data order, finished but untrained groups."""
        state = read_driver_state(checkpoint)
        check_resumable(state, self.config.trainer, self.parts.train_items)
        await self.parts.learners.load(checkpoint / "learner")
        self.step, self.version, self.counters, self._eval_due = state["step"], state["version"], state["counters"], state["eval_due"]
        self.buffer = self._new_buffer(state["next_index"])
        for index, (admitted_at, stored) in state["ready"].items():
            self.buffer.admit(admitted_at, index)
            self.buffer.ready(index, await self.parts.scorers.store(stored))
        self._readmit = list(state["running"])

    async def _restart_learner(self, error: LearnerLost) -> None:
        """A learner rank died: begin anew from the last checkpoint. Raises ``EnvironmentProblem`` past ``learner.restart_limit`` times."""
        self.counters.learner_restarts += 1
        restarts, limit = self.counters.learner_restarts, self.config.learner.restart_limit
        if restarts > limit:
            raise EnvironmentProblem(
                f"the learner died {restarts} times (learner.restart_limit={limit}); the last time: {error}"
            ) from error
        self._cancel_running()
        await self.parts.rollouts.abort()
        await self.parts.learners.restart()
        if isinstance(self._failure, LearnerLost):
            self._failure = None  # the same loss, as the groups under way met it
        counters, checkpoints = self.counters, list_checkpoints(self.config.run_dir)
        if checkpoints:
            await self._restore(checkpoints[-1])
        else:
            self.step, self.version, self.buffer = 0, 0, self._new_buffer()
        self.counters = counters
        self.parts.tracker.rewind(self.step)
        await self._begin()

    def _new_buffer(self, next_index: int = 0) -> GroupBuffer:
        trainer = self.config.trainer
        return GroupBuffer(trainer.tasks_per_step, trainer.max_staleness, next_index)
