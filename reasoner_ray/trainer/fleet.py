"""Health of the rollout engines, as a pure state machine: no Ray, no clock, no I/O.

The pool reports what it saw (a probe answered, a probe was missed, an actor died); the fleet says what
state follows and which engines may be given work. An engine that was restarted holds the initial weights,
so it is STALE until a weight sync has completed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from reasoner_ray.errors import EnvironmentProblem


class State(StrEnum):
    """Where one engine stands."""

    HEALTHY = "healthy"  # holds the current weights, may be given work
    SUSPECT = "suspect"  # missed a probe; keeps its work, gets no more
    DEAD = "dead"  # its process is gone
    RESTARTING = "restarting"  # a new process is on its way
    STALE = "stale"  # alive, but without the current weights
    RETIRED = "retired"  # taken out of the fleet on purpose


class Event(StrEnum):
    """What can be seen of one engine."""

    PROBE_ANSWERED = "probe answered"
    PROBE_MISSED = "probe missed"
    DIED = "died"
    RESTART_BEGAN = "restart began"
    RESTARTED = "restarted"
    SYNCED = "synced"
    RETIRED = "retired"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.HEALTHY, Event.PROBE_ANSWERED): State.HEALTHY,
    (State.HEALTHY, Event.PROBE_MISSED): State.SUSPECT,
    (State.HEALTHY, Event.DIED): State.DEAD,
    (State.HEALTHY, Event.SYNCED): State.HEALTHY,
    (State.SUSPECT, Event.PROBE_ANSWERED): State.HEALTHY,
    (State.SUSPECT, Event.PROBE_MISSED): State.DEAD,
    (State.SUSPECT, Event.DIED): State.DEAD,
    (State.SUSPECT, Event.SYNCED): State.HEALTHY,
    (State.DEAD, Event.DIED): State.DEAD,
    (State.DEAD, Event.PROBE_MISSED): State.DEAD,
    (State.DEAD, Event.RESTART_BEGAN): State.RESTARTING,
    (State.RESTARTING, Event.RESTARTED): State.STALE,
    (State.RESTARTING, Event.DIED): State.DEAD,
    (State.STALE, Event.PROBE_ANSWERED): State.STALE,
    (State.STALE, Event.PROBE_MISSED): State.DEAD,
    (State.STALE, Event.DIED): State.DEAD,
    (State.STALE, Event.SYNCED): State.HEALTHY,
    **{(state, Event.RETIRED): State.RETIRED for state in State},
}


@dataclass
class Member:
    """One engine as the fleet knows it."""

    name: str
    state: State = State.STALE
    restarts: int = 0
    history: list[Event] = field(default_factory=list)


class Fleet:
    """All engines of a run. Raises ``EnvironmentProblem`` where an engine has died too often."""

    def __init__(self, restart_limit: int) -> None:
        self.restart_limit = restart_limit
        self.members: dict[str, Member] = {}

    def join(self, name: str) -> Member:
        """A new engine; STALE until its first sync."""
        if name in self.members and self.members[name].state is not State.RETIRED:
            raise ValueError(f"engine {name} is in the fleet already")
        self.members[name] = Member(name)
        return self.members[name]

    def observe(self, name: str, event: Event) -> State:
        """Apply ``event`` to an engine and return its new state.

        Raises ``ValueError`` for an event that cannot happen in that state, and ``EnvironmentProblem``
        where the engine has used up its restarts.
        """
        member = self.members[name]
        if member.state is State.RETIRED:
            return State.RETIRED
        following = TRANSITIONS.get((member.state, event))
        if following is None:
            raise ValueError(f"engine {name}: {event} cannot follow while {member.state}")
        if event is Event.RESTART_BEGAN:
            member.restarts += 1
            if member.restarts > self.restart_limit:
                raise EnvironmentProblem(
                    f"rollout engine {name} died {member.restarts} times (rollout.restart_limit={self.restart_limit}); "
                    "its log under the Ray session folder says why, most often memory: lower rollout.kv_cache_gb, "
                    "rollout.gpu_memory_utilization or rollout.max_groups_per_worker"
                )
        member.state = following
        member.history.append(event)
        return following

    def names(self, *states: State) -> list[str]:
        """Engines in any of ``states``, in the order they joined."""
        return [m.name for m in self.members.values() if m.state in states]

    @property
    def routable(self) -> list[str]:
        """Engines that may be given new work."""
        return self.names(State.HEALTHY)

    @property
    def restarts(self) -> int:
        """Restarts of all engines so far."""
        return sum(m.restarts for m in self.members.values())

    def counts(self) -> dict[str, int]:
        """Engines by state, for the metrics."""
        return {state.value: len(self.names(state)) for state in State}
