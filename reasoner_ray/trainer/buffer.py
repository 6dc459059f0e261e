"""Admission control: which groups may be in the system, so that nothing is trained on too late.

A group is admitted only while accepted + running <= (max_staleness + 1) * tasks_per_step, and its slot is
free only once it was trained. A fast group may overtake a slow one, but only as far as every group can still
be trained within ``max_staleness`` versions of its admission; no finished group is ever thrown away for its
age (throwing away slow groups would starve the hard problems). A pure class: no Ray, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """Where an admitted group is."""

    RUNNING = "running"
    READY = "ready"
    TRAINING = "training"


@dataclass
class Slot:
    """One admitted group."""

    index: int  # position in the data order, unique in the run
    stage: Stage
    admitted_at: int  # policy version at admission
    payload: Any = None  # what the trainer needs once the group is READY
    failures: int = 0


class GroupBuffer:
    """Groups from admission to the gradient step, in the order of the data."""

    def __init__(self, tasks_per_step: int, max_staleness: int, next_index: int = 0) -> None:
        self.tasks_per_step = tasks_per_step
        self.max_staleness = max_staleness
        self.next_index = next_index
        self.trained = 0
        self._slots: dict[int, Slot] = {}

    @property
    def capacity(self) -> int:
        """Groups that may be in the system at once."""
        return (self.max_staleness + 1) * self.tasks_per_step

    @property
    def free(self) -> int:
        """Groups that may be admitted now."""
        return self.capacity - len(self._slots)

    def admit(self, version: int, index: int | None = None) -> Slot:
        """Admit the next group of the data order (or ``index``, on resume). Raises ``ValueError`` where there is no slot."""
        if self.free < 1:
            raise ValueError(f"all {self.capacity} slots are taken")
        if index is None:
            index, self.next_index = self.next_index, self.next_index + 1
        if index in self._slots:
            raise ValueError(f"group {index} is in the system already")
        slot = Slot(index=index, stage=Stage.RUNNING, admitted_at=version)
        self._slots[index] = slot
        return slot

    def ready(self, index: int, payload: Any) -> None:
        """A group was generated and scored."""
        slot = self._slots[index]
        if slot.stage is not Stage.RUNNING:
            raise ValueError(f"group {index} is {slot.stage}, so it cannot become ready")
        slot.stage, slot.payload = Stage.READY, payload

    def drop(self, index: int) -> None:
        """A group failed for good; its slot is free for another one."""
        del self._slots[index]

    def step_is_ready(self, version: int) -> bool:
        """True where a step at policy ``version`` can be trained without making any other group too stale.

        Groups that must be trained by version d number n_d; the steps from ``version + 1`` to d can take
        (d - version) * tasks_per_step of them, so the rest must be ready now.
        """
        ready = [slot.admitted_at for slot in self._slots.values() if slot.stage is Stage.READY]
        waiting = [slot.admitted_at for slot in self._slots.values() if slot.stage is not Stage.TRAINING]
        if len(ready) < self.tasks_per_step:
            return False
        for ahead in range(self.max_staleness + 1):
            latest = version + ahead - self.max_staleness
            must_be_ready = sum(at <= latest for at in waiting) - ahead * self.tasks_per_step
            if sum(at <= latest for at in ready) < must_be_ready:
                return False
        return True

    def take_step(self, version: int) -> list[Slot]:
        """The ``tasks_per_step`` most urgent finished groups, marked as in training. Raises ``ValueError`` if not ready."""
        if not self.step_is_ready(version):
            raise ValueError(f"{self.count(Stage.READY)} groups are ready; the step at version {version} cannot begin")
        ready = sorted((s for s in self._slots.values() if s.stage is Stage.READY), key=lambda s: (s.admitted_at, s.index))
        chosen = ready[: self.tasks_per_step]
        for slot in chosen:
            slot.stage = Stage.TRAINING
        return chosen

    def release_trained(self) -> int:
        """Free the slots of the groups in training; returns how many."""
        done = [index for index, slot in self._slots.items() if slot.stage is Stage.TRAINING]
        for index in done:
            del self._slots[index]
        self.trained += len(done)
        return len(done)

    def count(self, stage: Stage) -> int:
        """Groups in ``stage``."""
        return sum(slot.stage is stage for slot in self._slots.values())

    def slots(self, *stages: Stage) -> list[Slot]:
        """Groups in one of ``stages``, in data order."""
        return sorted((slot for slot in self._slots.values() if slot.stage in stages), key=lambda slot: slot.index)
