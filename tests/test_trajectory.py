"""The one data type: alignment, rewards, and the flat view the learner sees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.trajectory import ENV_VERSION, Status, Trajectory, TrajectoryBuilder, flatten


def two_turns(group: str = "g", status: Status = Status.FINISHED) -> Trajectory:
    """prompt(2) action(2) observation(1) action(1), rewards 0.5 after the first action and 1 at the end."""
    builder = TrajectoryBuilder(id="t", group_id=group, task="x", info={"prompt": "p"})
    builder.add_env([10, 11])
    builder.add_model([20, 21], [-0.1, -0.2], [3, 4])
    builder.add_reward(0.5)
    builder.add_env([12], turn=1)
    builder.add_model([22], [-0.3], [4], turn=1)
    builder.add_reward(1.0)
    return builder.build(status)


def test_builder_keeps_streams_aligned() -> None:
    t = two_turns()
    assert t.tokens.tolist() == [10, 11, 20, 21, 12, 22]
    assert t.loss_mask.tolist() == [False, False, True, True, False, True]
    assert t.rewards.tolist() == [0, 0, 0, 0.5, 0, 1]
    assert t.policy_versions.tolist() == [ENV_VERSION, ENV_VERSION, 3, 4, ENV_VERSION, 4]
    assert [(s.kind, s.start, s.end, s.turn) for s in t.spans] == [
        ("env", 0, 2, 0),
        ("model", 2, 4, 0),
        ("env", 4, 5, 1),
        ("model", 5, 6, 1),
    ]
    assert (t.total_reward, t.trainable_tokens, t.oldest_version) == (1.5, 3, 3)


def test_flatten_by_hand() -> None:
    streams = flatten([two_turns("a"), two_turns("b", Status.TRUNCATED), two_turns("a")])
    assert streams.rewards.tolist() == [0, 0.5, 1] * 3
    assert streams.trajectory_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert streams.action_index.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert streams.action_end.tolist() == [False, True, True] * 3
    assert streams.trajectory_end.tolist() == [False, False, True] * 3
    assert streams.group_index.tolist() == [0, 1, 0]
    assert streams.truncated.tolist() == [False, True, False]
    assert streams.returns_per_trajectory().tolist() == [1.5] * 3


def test_flatten_of_nothing_and_of_a_trajectory_without_actions() -> None:
    assert flatten([]).n_tokens == 0
    builder = TrajectoryBuilder(id="t", group_id="g", task="x")
    builder.add_env([1, 2, 3])
    streams = flatten([builder.build(Status.ABORTED), two_turns()])
    assert streams.n_tokens == 3 and streams.trajectory_index.tolist() == [1, 1, 1]


def test_an_outcome_lands_on_the_last_trainable_token_even_if_the_environment_speaks_last() -> None:
    builder = TrajectoryBuilder(id="t", group_id="g", task="x")
    builder.add_env([1])
    builder.add_model([2, 3], [0.0, 0.0], [0, 0])
    builder.add_env([4, 5])
    t = builder.build().with_outcome(2.0, scorer="x")
    assert t.rewards.tolist() == [0, 0, 2, 0, 0] and t.info["scorer"] == "x"
    assert flatten([t]).rewards.tolist() == [0, 2]


def test_misaligned_streams_are_refused() -> None:
    t = two_turns()
    with pytest.raises(ValueError, match="rewards has 2 entries for 6 tokens"):
        Trajectory(**{**{f: getattr(t, f) for f in Trajectory.__slots__}, "rewards": np.zeros(2, np.float32)})
    builder = TrajectoryBuilder(id="t", group_id="g", task="x")
    with pytest.raises(ValueError, match="do not align"):
        builder.add_model([1, 2], [0.0], [0, 0])
    with pytest.raises(ValueError, match="needs an action"):
        builder.add_reward(1.0)
    builder.add_model([1], [0.0], [0])
    with pytest.raises(ValueError, match="no context"):
        builder.build()


turn = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), max_size=4))


@settings(deadline=None)
@given(st.lists(st.lists(turn, min_size=1, max_size=4), min_size=1, max_size=4))
def test_observation_tokens_never_reach_the_learner(episodes: list[list[tuple[list[int], list[int]]]]) -> None:
    """The flat streams of an episode are those of its actions joined, whatever stands between them."""
    built = []
    for i, episode in enumerate(episodes):
        builder = TrajectoryBuilder(id=str(i), group_id="g", task="x")
        for n, (env, model) in enumerate(episode):
            builder.add_env(env, turn=n)
            builder.add_model(model, [float(t) for t in model], [0] * len(model), turn=n)
        built.append(builder.build())
    streams = flatten(built)
    assert streams.behaviour_logprobs.tolist() == [float(t) for e in episodes for _, model in e for t in model]
    assert int(streams.action_end.sum()) == sum(bool(model) for e in episodes for _, model in e)
    assert int(streams.trajectory_end.sum()) == sum(any(model for _, model in e) for e in episodes)
