"""Data sets of what an Online-DT run plays as it learns: its buffer, out of its newest checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest

from reasoner_ray.agents.sequence.collect import collect
from reasoner_ray.agents.sequence.recordings import read_minari
from reasoner_ray.config import JobConfig, to_yaml
from reasoner_ray.errors import CheckpointError, ConfigError, DataError
from reasoner_ray.trainer.checkpoint import list_checkpoints
from tests.agents.sequence.jobs import PENDULUM, job
from tests.agents.sequence.test_learner import driver

CLIFF = {
    "world": {"id": "CliffWalking-v1", "max_steps": 6, "envs": 4},
    "targets": [-6.0],
    "online": {"offline_steps": 1, "episodes": 3, "buffer": 12, "target": -6.0},
}
"""Online, with numbers for observations and choices for actions."""


def trained(folder: Path, sequence: dict[str, Any]) -> tuple[JobConfig, Any]:
    """A finished run of three steps, and its driver."""
    config = job(folder, sequence=sequence)
    run = driver(config)
    asyncio.run(run.run())
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return config, run


def exported(folder: Path, config: JobConfig, sequence: dict[str, Any], **collected: Any) -> dict[str, float]:
    settings = {"policy": "replay", "run": str(config.run_dir), "out": str(folder / "replay-v0"), **collected}
    return collect(job(folder, sequence={**sequence, "collect": settings}))


@pytest.mark.parametrize("sequence", [PENDULUM, CLIFF], ids=["numbers", "choices"])
def test_the_buffer_of_a_run_becomes_a_data_set(tmp_path: Path, sequence: dict[str, Any]) -> None:
    config, run = trained(tmp_path, sequence)
    kept = run.parts.learners.learner.buffer.recordings
    figures = exported(tmp_path, config, sequence)
    assert figures["episodes"] == len(kept) == 12 and figures["return"] == pytest.approx(np.mean([r.total for r in kept]), rel=1e-5)
    found, _ = read_minari(tmp_path / "replay-v0")
    for there, here in zip(kept, found, strict=True):
        for name in ("states", "rewards", "last"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name), name)
        np.testing.assert_allclose(here.actions, there.actions, atol=1e-6)
        assert here.truncated == there.truncated
    assert found[-1].truncated and len(found[-1]) == sequence["world"]["max_steps"], "these worlds end by time"
    data = minari.MinariDataset(tmp_path / "replay-v0" / "data")
    assert data.storage.metadata["algorithm_name"] == "replay" and data.observation_space.contains(data[0].observations[0])


def test_the_newest_episodes_are_exported_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    config, run = trained(tmp_path, PENDULUM)
    assert exported(tmp_path, config, PENDULUM, episodes=2)["episodes"] == 2
    found, _ = read_minari(tmp_path / "replay-v0")
    assert [r.total for r in found] == [r.total for r in run.parts.learners.learner.buffer.recordings[-2:]]


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path: Path) -> None:
    config, _ = trained(tmp_path, PENDULUM)
    with pytest.raises(ConfigError, match=r"sequence\.collect\.run: name the folder of a run with sequence\.online"):
        exported(tmp_path, config, PENDULUM, run=None)
    with pytest.raises(ConfigError, match=r"sequence\.collect\.noise: 0\.5, but replay plays nothing; set it to 0"):
        exported(tmp_path, config, PENDULUM, noise=0.5)
    with pytest.raises(ConfigError, match=r"sequence\.collect\.run: .*run played Pendulum-v1 with {}, this job CliffWalking-v1"):
        exported(tmp_path, config, CLIFF)
    with pytest.raises(CheckpointError, match=r"elsewhere has no checkpoint; give the folder of a run with sequence\.online"):
        exported(tmp_path, config, PENDULUM, run=str(tmp_path / "elsewhere"))
    (file,) = (list_checkpoints(config.run_dir)[-1] / "learner").glob("rank-*.pt")
    file.write_bytes(b"0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt cannot be read"):
        exported(tmp_path, config, PENDULUM)
    offline, _ = trained(tmp_path / "offline", PENDULUM | {"online": None})
    with pytest.raises(CheckpointError, match=r"keeps no episodes, as only runs with sequence\.online do"):
        exported(tmp_path, offline, PENDULUM)
    assert not (tmp_path / "replay-v0").exists()
    (tmp_path / "replay-v0").mkdir()
    with pytest.raises(DataError, match="replay-v0 exists"):
        exported(tmp_path, config, PENDULUM)
