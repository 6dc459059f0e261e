"""Checkpoints are complete or do not exist."""

import asyncio
import errno
from pathlib import Path

import pytest

from reasoner_ray.errors import CheckpointError
from reasoner_ray.trainer.checkpoint import MANIFEST, list_checkpoints, read_driver_state, write_checkpoint


async def save_some(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"w" * 100)


def write(run: Path, step: int, save=save_some, keep: int = 2) -> Path:
    return asyncio.run(write_checkpoint(run, step, {"step": step}, save, keep))


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert read_driver_state(list_checkpoints(tmp_path)[-1]) == {"step": 3}


def test_a_full_disk_leaves_the_previous_checkpoint_usable(tmp_path: Path) -> None:
    write(tmp_path, 1)

    async def fill_disk(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2, fill_disk)
    (only,) = list_checkpoints(tmp_path)
    assert read_driver_state(only) == {"step": 1}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"], "nothing half-written is left behind"


def test_a_crash_while_writing_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)

    async def crash(folder: Path) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write(tmp_path, 2, crash)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "pickle"])
def test_a_corrupt_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    checkpoint = write(tmp_path, 1)
    if damage == "truncate":
        (checkpoint / "learner/weights.bin").write_bytes(b"w")
    elif damage == "remove":
        (checkpoint / "learner/weights.bin").unlink()
    elif damage == "manifest":
        (checkpoint / MANIFEST).write_text("{")
    else:
        size = (checkpoint / "driver.pkl").stat().st_size
        (checkpoint / "driver.pkl").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match="corrupt checkpoint"):
        read_driver_state(checkpoint)
