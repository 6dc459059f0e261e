"""Which run a job continues, before anything starts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reasoner_ray.config import JobConfig, parse_config
from reasoner_ray.errors import CheckpointError
from reasoner_ray.trainer.checkpoint import write_checkpoint
from reasoner_ray.trainer.launch import choose_run


async def save_nothing(folder: Path) -> None: ...


def job(folder: Path) -> JobConfig:
    return parse_config({"name": "run", "out": str(folder), "algorithm": {"name": "grpo"}})


def test_a_run_without_a_checkpoint_is_not_resumed_in_silence(tmp_path: Path) -> None:
    config = job(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        choose_run(config, "resume")
    config.run_dir.mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint.*--overwrite"):
        choose_run(config, "resume")
    checkpoint = asyncio.run(write_checkpoint(config.run_dir, 3, {}, save_nothing, keep=1))
    assert choose_run(config, "resume") == (config, checkpoint)
    assert choose_run(config, "overwrite") == (config, None)
