"""Admission control: the staleness bound holds whatever the order in which groups finish."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.trainer.buffer import GroupBuffer, Stage


def test_on_policy_admits_one_step_and_waits_for_training() -> None:
    buffer = GroupBuffer(tasks_per_step=2, max_staleness=0)
    slots = [buffer.admit(0), buffer.admit(0)]
    with pytest.raises(ValueError, match="slots are taken"):
        buffer.admit(0)
    buffer.ready(slots[1].index, "b")
    assert not buffer.step_is_ready(0)
    buffer.ready(slots[0].index, "a")
    assert [s.payload for s in buffer.take_step(0)] == ["a", "b"]
    assert buffer.free == 0, "a slot is free only once its group was trained"
    assert buffer.release_trained() == 2 and buffer.free == 2


def test_a_fast_group_overtakes_only_while_the_slow_one_stays_in_time() -> None:
    buffer = GroupBuffer(tasks_per_step=1, max_staleness=1)
    slow, fast = buffer.admit(0), buffer.admit(0)
    buffer.ready(fast.index, "fast")
    assert buffer.take_step(0)[0] is fast
    buffer.release_trained()
    later = buffer.admit(1)
    buffer.ready(later.index, "later")
    assert not buffer.step_is_ready(1), "the slow group must be trained now, or it is two versions old"
    buffer.ready(slow.index, "slow")
    assert buffer.take_step(1)[0] is slow


def test_a_dropped_group_frees_its_slot_and_the_order_goes_on() -> None:
    buffer = GroupBuffer(tasks_per_step=1, max_staleness=0, next_index=7)
    buffer.drop(buffer.admit(0).index)
    assert buffer.admit(0).index == 8


@settings(deadline=None, max_examples=200)
@given(tasks=st.integers(1, 4), staleness=st.integers(0, 4), data=st.data())
def test_every_group_is_trained_once_and_in_time(tasks: int, staleness: int, data: st.DataObject) -> None:
    buffer = GroupBuffer(tasks, staleness)
    version, trained = 0, []
    for _ in range(120):
        while buffer.free:
            buffer.admit(version)
        running = buffer.slots(Stage.RUNNING)
        if running:
            buffer.ready(data.draw(st.sampled_from(running)).index, None)
        if buffer.step_is_ready(version):
            for slot in buffer.take_step(version):
                assert version - slot.admitted_at <= staleness
                trained.append(slot.index)
            buffer.release_trained()
            version += 1
        assert buffer.capacity - buffer.free <= (staleness + 1) * tasks
    assert len(trained) == len(set(trained)) == buffer.trained
    assert version > 0, "some order of finishing starved the loop"
