"""Recordings, windows, the buffer, and data sets in Minari's format: by hand, and with what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.agents.sequence.collect import collect
from reasoner_ray.agents.sequence.data import fingerprint, load_recordings
from reasoner_ray.agents.sequence.recordings import Recording, best, delayed, moments, read_minari, returns_to_go
from reasoner_ray.agents.sequence.spaces import Interface
from reasoner_ray.agents.sequence.windows import NO_ACTION, TrajectoryBuffer, Units, sample, stack
from reasoner_ray.errors import ConfigError, DataError
from tests.agents.sequence.jobs import job


def recording(rewards: list[float], first: float = 0.0) -> Recording:
    """States count from ``first``; actions are 0.5."""
    n = len(rewards)
    states = np.arange(first, first + n, dtype=np.float32)[:, None]
    actions, last = np.full((n, 1), 0.5, np.float32), np.array([first + n], np.float32)
    return Recording(states=states, actions=actions, rewards=np.array(rewards, np.float32), last=last, truncated=False)


UNITS = Units(mean=np.array([1.0], np.float32), std=np.array([2.0], np.float32), return_scale=10.0, no_action=NO_ACTION)


def test_returns_to_go_by_hand() -> None:
    assert returns_to_go(np.array([1.0, 0.0, 2.0, -1.0], np.float32)).tolist() == [2.0, 1.0, 1.0, -1.0]
    late = delayed(recording([1.0, 0.0, 2.0]))
    assert late.rewards.tolist() == [0.0, 0.0, 3.0] and returns_to_go(late.rewards).tolist() == [3.0, 3.0, 3.0]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_a_return_to_go_falls_by_the_reward(rewards: list[int]) -> None:
    found = returns_to_go(np.array(rewards, np.float32))
    assert found[0] == sum(rewards) == delayed(recording([float(r) for r in rewards])).total
    assert np.array_equal(found[:-1] - found[1:], rewards[:-1])


def test_the_best_share_of_the_steps() -> None:
    """Ten steps in all: 30 % hold the best trajectory of two steps, but not the second best of three as well."""
    a, b, c = recording([0.0] * 5), recording([5.0, 0.0]), recording([1.0, 1.0, 1.0])
    assert [r.total for r in best([a, b, c], 0.3)] == [5.0]
    assert [r.total for r in best([a, b, c], 0.5)] == [5.0, 3.0]
    assert [r.total for r in best([a, b, c], 0.01)] == [5.0], "at least one"
    assert len(best([a, b, c], 1.0)) == 3


def test_a_window_is_padded_on_the_left() -> None:
    windows = stack([UNITS.window(recording([1.0, 2.0, 3.0]), 1, 3), UNITS.window(recording([1.0, 2.0, 3.0]), 0, 3)])
    assert windows.states[..., 0].tolist() == [[0.0, 0.0, 0.5], [-0.5, 0.0, 0.5]], "(state - 1) / 2, and 0 where padded"
    assert windows.actions[..., 0].tolist() == [[-10.0, 0.5, 0.5], [0.5, 0.5, 0.5]]
    np.testing.assert_allclose(windows.returns, [[0.0, 0.5, 0.3], [0.6, 0.5, 0.3]], rtol=1e-6)
    assert windows.times.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert windows.mask.tolist() == [[False, True, True], [True, True, True]]


def test_long_trajectories_are_drawn_more_often() -> None:
    long, short = recording([0.0] * 9, first=100.0), recording([0.0], first=0.0)
    windows = sample([long, short], UNITS, 4000, 1, np.random.default_rng(0))
    assert abs(float((windows.states[:, 0, 0] > 10).float().mean()) - 0.9) < 4 * (0.09 / 4000) ** 0.5
    starts = np.bincount(windows.times[windows.states[:, 0, 0] > 10, 0], minlength=9)
    assert starts.min() > 300, "every step is a first step equally often"


def test_the_buffer_begins_with_the_best_and_keeps_its_length_at_its_end() -> None:
    """The published code's buffer could change its length where a write ran over its end."""
    buffer = TrajectoryBuffer(3, [recording([x]) for x in (4.0, 1.0, 3.0, 2.0)])
    assert [r.total for r in buffer.recordings] == [2.0, 3.0, 4.0]
    buffer.add([recording([9.0]), recording([8.0])])
    assert [r.total for r in buffer.recordings] == [4.0, 9.0, 8.0], "the oldest go first, the worst of the offline ones before the best"
    buffer.add([recording([float(x)]) for x in range(7)])
    assert [r.total for r in buffer.recordings] == [4.0, 5.0, 6.0], "more at once than there is room for"


def test_moments() -> None:
    mean, std = moments([recording([0.0, 0.0]), recording([0.0, 0.0], first=2.0)])
    assert mean.tolist() == [1.5] and std[0] == pytest.approx(np.std([0, 1, 2, 3]), abs=1e-5)


def test_actions_are_encoded_and_decoded() -> None:
    choice = Interface.of(spaces.Discrete(3), spaces.Discrete(2, start=5), "world")
    assert choice == Interface(state=3, choices=2, first=5)
    assert choice.encode(np.array([5, 6]), "here").tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert choice.decode(np.array([0.1, 0.9]), spaces.Discrete(2, start=5)) == 6
    with pytest.raises(DataError, match="here: an action outside the 2 choices from 5 on"):
        choice.encode(np.array([7]), "here")
    box = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
    numbers = Interface.of(spaces.Box(-1, 1, (2, 2)), box, "world")
    assert numbers.state == 4 and numbers.encode(np.array([[0.0, 10.0]]), "here").tolist() == [[0.0, 1.0]]
    assert numbers.decode(np.array([0.0, 1.0], np.float32), box).tolist() == [0.0, 10.0]
    with pytest.raises(DataError, match="not between its bounds"):
        numbers.encode(np.array([[0.0, 11.0]]), "here")
    for observation, action in (
        (spaces.Text(3), spaces.Discrete(2)),
        (box, spaces.MultiBinary(2)),
        (box, spaces.Box(-np.inf, np.inf, (1,))),
    ):
        with pytest.raises(ConfigError, match="kind sequence takes"):
            Interface.of(observation, action, "world")


def test_what_was_collected_is_a_minari_data_set_and_is_read_back(tmp_path: Path) -> None:
    config = job(tmp_path)
    data = minari.MinariDataset(tmp_path / "random-v0" / "data")
    assert data.total_episodes == 20 and data.spec.env_spec.id == "reasoner_ray/KeyToDoor-v0"
    recordings, interface, horizon = load_recordings(config)
    assert interface == Interface(state=8, choices=4) and horizon == 24
    first = data[0]
    assert np.array_equal(recordings[0].states, first.observations[:-1]) and np.array_equal(recordings[0].actions.argmax(1), first.actions)
    assert np.array_equal(recordings[0].rewards, first.rewards.astype(np.float32))
    again = job(tmp_path, sequence={"collect": {"out": str(tmp_path / "again-v0")}})
    collect(again)
    assert fingerprint(read_minari(tmp_path / "again-v0")[0]) == fingerprint(recordings), "the seed fixes what is collected"
    with pytest.raises(DataError, match="again-v0 exists"):
        collect(again)
    with pytest.raises(DataError, match="named with a version, for example again-v0"):
        collect(job(tmp_path, sequence={"collect": {"out": str(tmp_path / "again")}}))
    assert len(load_recordings(job(tmp_path, sequence={"keep_top": 0.1}))[0]) == 2


def test_other_policies_are_collected(tmp_path: Path) -> None:
    expert = {"policy": "reasoner_ray.envs.key_to_door:expert", "out": str(tmp_path / "expert-v0")}
    assert collect(job(tmp_path, sequence={"collect": expert}))["return"] == 1.0
    noisy = expert | {"noise": 1.0, "out": str(tmp_path / "noisy-v0"), "episodes": 40}
    assert collect(job(tmp_path, sequence={"collect": noisy}))["return"] < 0.5
    with pytest.raises(ConfigError, match="'nobody' is neither random"):
        collect(job(tmp_path, sequence={"collect": {"policy": "nobody", "out": str(tmp_path / "x-v0")}}))


def test_data_that_cannot_be_learnt_from_is_one_clear_error(tmp_path: Path) -> None:
    config = job(tmp_path)
    folder = tmp_path / "random-v0"
    with pytest.raises(DataError, match="no Minari data set in .*elsewhere; `reasoner collect"):
        read_minari(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="recorded in another environment than CartPole-v1"):
        load_recordings(job(tmp_path, sequence={"world": {"id": "CartPole-v1"}}))
    with pytest.raises(DataError, match=r"sequence.world.max_steps: 9, but a recorded trajectory has \d+ steps"):
        load_recordings(job(tmp_path, sequence={"world": {"max_steps": 9}}))
    with pytest.raises(ConfigError, match="have no limit of their own"):
        load_recordings(job(tmp_path, sequence={"world": {"max_steps": None}}))
    main = folder / "data" / "main_data.hdf5"
    with h5py.File(main, "a") as file:
        file["episode_3/rewards"][0] = np.nan
    with pytest.raises(DataError, match="random-v0, episode 3: a state or reward is not finite"):
        load_recordings(config)
    with h5py.File(main, "a") as file:
        del file["episode_3"]["rewards"]
        file["episode_3"]["rewards"] = np.zeros(2)
    with pytest.raises(DataError, match="episode 3: .* one observation more"):
        load_recordings(config)
    with h5py.File(main, "a") as file:
        del file["episode_3"]
    with pytest.raises(DataError, match="damaged or truncated"):
        load_recordings(config)
    main.write_bytes(main.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged or truncated"):
        load_recordings(config)
    about = folder / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()))[:50])
    with pytest.raises(DataError, match="damaged or truncated"):
        load_recordings(config)


@pytest.mark.parametrize("number", [48, -1])
def test_a_number_that_the_observation_space_does_not_have_is_named(tmp_path: Path, number: int) -> None:
    """Neither an IndexError, nor the last place of the one-hot."""
    world = {"id": "CliffWalking-v1", "max_steps": 5}
    config = job(tmp_path, sequence={"world": world, "collect": {"episodes": 3}})
    with h5py.File(tmp_path / "random-v0" / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/observations"][2] = number
    with pytest.raises(DataError, match=rf"random-v0, episode 1, step 2: the observation {number} is none of the 48 from 0 on"):
        load_recordings(config)


def test_observations_that_are_numbers_become_one_hot(tmp_path: Path) -> None:
    world = {"id": "CliffWalking-v1", "max_steps": 5}
    if "CliffWalking-v1" not in gymnasium.registry:
        world["id"] = "CliffWalking-v0"
    config = job(tmp_path, sequence={"world": world, "collect": {"episodes": 2}})
    recordings, interface, _ = load_recordings(config)
    assert interface.state == 48 and all((r.states.sum(1) == 1).all() for r in recordings)
    assert recordings[0].states[0].argmax() == 36, "where every episode begins"
