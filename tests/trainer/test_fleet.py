"""The fleet's states, without Ray."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.errors import EnvironmentProblem
from reasoner_ray.trainer.fleet import TRANSITIONS, Event, Fleet, State


def fleet_with(state_events: list[Event], restart_limit: int = 3) -> Fleet:
    fleet = Fleet(restart_limit)
    fleet.join("e0")
    for event in state_events:
        fleet.observe("e0", event)
    return fleet


def test_an_engine_gets_work_only_after_its_first_sync() -> None:
    fleet = fleet_with([])
    assert fleet.routable == []
    fleet.observe("e0", Event.SYNCED)
    assert fleet.routable == ["e0"]


def test_a_restarted_engine_is_stale_until_a_sync() -> None:
    fleet = fleet_with([Event.SYNCED, Event.DIED, Event.RESTART_BEGAN, Event.RESTARTED, Event.PROBE_ANSWERED])
    assert fleet.names(State.STALE) == ["e0"]
    assert fleet.observe("e0", Event.SYNCED) is State.HEALTHY
    assert fleet.restarts == 1


def test_one_missed_probe_withholds_work_and_two_mean_death() -> None:
    fleet = fleet_with([Event.SYNCED, Event.PROBE_MISSED])
    assert fleet.names(State.SUSPECT) == ["e0"] and fleet.routable == []
    assert fleet.observe("e0", Event.PROBE_MISSED) is State.DEAD


def test_an_impossible_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot follow"):
        fleet_with([Event.SYNCED, Event.RESTARTED])


def test_too_many_restarts_end_the_job_with_a_remedy() -> None:
    fleet = fleet_with([Event.DIED, Event.RESTART_BEGAN, Event.RESTARTED, Event.DIED], restart_limit=1)
    with pytest.raises(EnvironmentProblem, match="kv_cache_gb"):
        fleet.observe("e0", Event.RESTART_BEGAN)


def test_a_retired_engine_stays_retired() -> None:
    fleet = fleet_with([Event.SYNCED, Event.RETIRED, Event.DIED])
    assert fleet.counts()["retired"] == 1
    fleet.join("e0")
    assert fleet.names(State.STALE) == ["e0"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([e for e in Event if e is not Event.RETIRED]), max_size=40))
def test_no_history_makes_an_unsynced_engine_routable(events: list[Event]) -> None:
    """Whatever happens, an engine is routable only if a sync came after its last restart."""
    fleet = Fleet(restart_limit=100)
    fleet.join("e0")
    synced = False
    for event in events:
        if (fleet.members["e0"].state, event) not in TRANSITIONS:
            continue
        fleet.observe("e0", event)
        synced = event is Event.SYNCED or (synced and event is not Event.RESTARTED and fleet.members["e0"].state is not State.DEAD)
        assert not fleet.routable or synced
