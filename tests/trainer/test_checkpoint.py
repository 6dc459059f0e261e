"""Checkpoints are complete or do not exist."""

import asyncio
import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoner_ray.errors import CheckpointError
from reasoner_ray.trainer.checkpoint import MANIFEST, list_checkpoints, read_driver_state, write_checkpoint
from reasoner_ray.trainer.driver import Counters


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


STATE: dict[str, Any] = {"step": 1, "counters": Counters(groups_failed=2), "ready": {3: (0, [np.arange(5), "text"])}, "data": "seed 0"}


def damaged(content: bytes, source: random.Random) -> bytes:
    """``content`` with three bytes changed."""
    changed = bytearray(content)
    for place in source.sample(range(len(content)), 3):
        changed[place] ^= source.randrange(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("file", ["driver.pkl", MANIFEST])
def test_random_damage_is_never_loaded(tmp_path: Path, file: str) -> None:
    """One clear error, or (where the manifest's white space was hit) the state as it was written."""
    checkpoint = asyncio.run(write_checkpoint(tmp_path, 1, STATE, save_some, keep=2))
    content, expected = (checkpoint / file).read_bytes(), repr(read_driver_state(checkpoint))
    refused = []
    for seed in range(300):
        (checkpoint / file).write_bytes(damaged(content, random.Random(seed)))
        try:
            assert repr(read_driver_state(checkpoint)) == expected
        except CheckpointError as error:
            refused.append(str(error))
    assert all(text.startswith("corrupt checkpoint: ") for text in refused)
    assert len(refused) == 300 if file == "driver.pkl" else len(refused) > 200


def test_a_pickle_of_other_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are as they were written, but a class has gone since."""
    checkpoint = asyncio.run(write_checkpoint(tmp_path, 1, STATE, save_some, keep=2))
    monkeypatch.delattr("reasoner_ray.trainer.driver.Counters")
    with pytest.raises(CheckpointError, match="corrupt checkpoint: .*AttributeError"):
        read_driver_state(checkpoint)


def test_rewriting_a_step_never_leaves_it_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    with monkeypatch.context() as patch:
        real = os.replace

        def refuse(source: Path, target: Path) -> None:
            if source.suffix == ".writing":
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)

        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            write(tmp_path, 2)
    assert read_driver_state(list_checkpoints(tmp_path)[-1]) == {"step": 2}
    write(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, keep=1)

    def refuse(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert write(tmp_path, 2, keep=1) == list_checkpoints(tmp_path)[-1]
    assert "step-000001 could not be deleted: Permission denied" in caplog.text
