"""Runs that go step by step: learn, evaluate, checkpoint, restart a lost learner. What a step is, its kind says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasoner_ray.errors import CheckpointError, EnvironmentProblem, LearnerLost
from reasoner_ray.trainer.checkpoint import list_checkpoints, read_driver_state, write_checkpoint, write_model

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig


class StepDriver(ABC):
    """One run, from its start (or its newest checkpoint) to its last step. ``parts`` has ``learners`` and a ``tracker``."""

    def __init__(self, config: JobConfig, parts: Any) -> None:
        self.config, self.parts = config, parts
        self.step = 0
        self.last_eval: dict[str, float] = {}
        self._restarts = self._checkpoints_failed = 0
        self._evaluated_at = -1
        self._stop = False

    @property
    def finished(self) -> bool:
        """Every step was trained, and the result evaluated."""
        return self.step >= self.config.trainer.steps == self._evaluated_at

    def request_stop(self) -> None:
        """Checkpoint and end after the step under way."""
        self._stop = True

    async def run(self, resume_from: Path | None = None) -> dict[str, float]:
        """Train to the last step and return the last evaluation. Raises ``ReasonerError`` with what to do."""
        await self._start()
        if resume_from is not None:
            await self._restore(resume_from)
        self.parts.tracker.start(self.config.trainer.steps, self.step)
        for warning in self._warnings():
            self.parts.tracker.event(warning, "warning")
        while True:
            try:
                await self._train()
                return self.last_eval
            except LearnerLost as error:
                self.parts.tracker.event(f"learner lost ({error}); going back to the last checkpoint", "error")
                await self._restart_learner(error)

    async def stop(self) -> None:
        """End every actor; safe after any failure."""
        await self.parts.learners.stop()

    # -- what a kind says ----------------------------------------------------------------------------------

    @abstractmethod
    async def _train_step(self) -> None:
        """Learn from the next batch, count the step, look at the result where that is due, and log it."""

    @abstractmethod
    async def _evaluate(self) -> None:
        """Look at the weights of ``step``, and note that in ``_evaluated_at``."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the learner's state and the counters of every kind."""

    @abstractmethod
    def _check(self, state: dict[str, Any]) -> None:
        """Raise ``CheckpointError`` where this run cannot go on from ``state``."""

    async def _start(self) -> None:
        """Start the actors."""
        await self.parts.learners.start()

    def _warnings(self) -> list[str]:
        """What the user is to know as the run begins."""
        return []

    # -- the loop ------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        trainer = self.config.trainer
        if self.step == 0:
            await self._evaluate()
        while self.step < trainer.steps and not self._stop:
            await self._train_step()
            if self.step < trainer.steps and trainer.checkpoint_every and self.step % trainer.checkpoint_every == 0:
                await self._checkpoint()
        if self.step >= trainer.steps and self._evaluated_at < self.step:
            await self._evaluate()
        if self.step:
            await self._checkpoint()
        if self.step >= trainer.steps:
            await write_model(self.config.run_dir, self.parts.learners.export)

    @property
    def _faults(self) -> dict[str, float]:
        """Totals since the run began, for the metrics."""
        return {"faults/learner_restarts": float(self._restarts), "faults/checkpoints_failed": float(self._checkpoints_failed)}

    async def _checkpoint(self) -> None:
        """Write a checkpoint; where that fails, say so, count it and go on with the one before."""
        state = {"step": self.step, "restarts": self._restarts, "evaluated_at": self._evaluated_at, "last_eval": self.last_eval}
        try:
            keep = self.config.trainer.keep_checkpoints
            await write_checkpoint(self.config.run_dir, self.step, state | self._state(), self.parts.learners.save, keep)
        except CheckpointError as error:
            self._checkpoints_failed += 1
            self.parts.tracker.event(str(error), "error")

    async def _restore(self, checkpoint: Path) -> None:
        """Go back to a checkpoint."""
        state = read_driver_state(checkpoint)
        self._check(state)
        await self.parts.learners.load(checkpoint / "learner")
        self.step, self._evaluated_at, self.last_eval = state["step"], state["evaluated_at"], state["last_eval"]
        self._restarts = max(self._restarts, state["restarts"])

    async def _restart_learner(self, error: LearnerLost) -> None:
        """A learner rank died: begin anew from the last checkpoint. Raises ``EnvironmentProblem`` past ``learner.restart_limit`` times."""
        while True:
            self._restarts += 1
            limit = self.config.learner.restart_limit
            if self._restarts > limit:
                raise EnvironmentProblem(
                    f"the learner died {self._restarts} times (learner.restart_limit={limit}); the last time: {error}"
                ) from error
            try:
                await self.parts.learners.restart()
                checkpoints = list_checkpoints(self.config.run_dir)
                self.step, self._evaluated_at = 0, -1
                if checkpoints:
                    await self._restore(checkpoints[-1])
            except LearnerLost as again:
                error = again
                continue
            self.parts.tracker.rewind(self.step)
            return
