"""Checkpoints: written aside, flushed, renamed; the newest complete one wins.

``RUN/checkpoints/step-000010/`` holds ``learner/`` (DeepSpeed and scheduler state), ``driver.pkl`` and
``MANIFEST.json``, which lists every file with its size, the SHA-256 of ``driver.pkl``, and is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasoner_ray.errors import CheckpointError

if TYPE_CHECKING:
    from reasoner_ray.config import TrainerConfig
    from reasoner_ray.data.tasks import DataOrder

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
UNREADABLE = (
    *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OSError),
    *(OverflowError, RecursionError, TypeError, ValueError),
)
"""What damaged JSON, and a pickle that is damaged or was written by other code, raise. (Broken JSON and Unicode are ``ValueError``s.)"""


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


async def write_checkpoint(
    run_dir: Path, step: int, driver_state: dict[str, Any], save_learner: Callable[[Path], Awaitable[None]], keep: int
) -> Path:
    """Write a checkpoint and drop all but the newest ``keep``.

    Raises ``CheckpointError`` where it cannot be written (a full disk, say); earlier checkpoints stay as they are.
    """
    final = checkpoint_dir(run_dir, step)
    aside, replaced = final.with_suffix(".writing"), final.with_suffix(".replaced")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "learner").mkdir(parents=True)
        await save_learner(aside / "learner")
        state = pickle.dumps(driver_state)
        _write_flushed(aside / "driver.pkl", state)
        sizes = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        manifest = {"step": step, "driver_sha256": hashlib.sha256(state).hexdigest(), "files": sizes}
        _write_flushed(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)  # not deleted before the new one is in its place: it may be the only one
        os.replace(aside, final)
        _flush_folder(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} was not written: {error.strerror or error} ({final.parent}); earlier checkpoints are unharmed"
        ) from error
    complete = list_checkpoints(run_dir)
    for old in [*(p for p in complete if p.suffix), *[p for p in complete if not p.suffix][:-keep]]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", old, error.strerror or error)
    return final


async def write_model(run_dir: Path, export: Callable[[Path], Awaitable[None]]) -> None:
    """Have the trained model written into ``RUN/model``. Raises ``CheckpointError`` where it cannot be."""
    folder = run_dir / "model"
    try:
        await export(folder)
    except OSError as error:
        raise CheckpointError(
            f"the trained model was not written: {error.strerror or error} ({folder}); "
            "the run's checkpoints are unharmed: make room, then go on with --resume"
        ) from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without its manifest was never finished and does not count.

    One that was being replaced when the run was killed comes before its successor.
    """
    found = (manifest.parent for manifest in (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}"))
    return sorted((p for p in found if p.suffix != ".writing"), key=lambda p: (p.stem, not p.suffix))


def check_resumable(state: dict[str, Any], trainer: TrainerConfig, data: DataOrder) -> None:
    """Raises ``CheckpointError`` where a run with these settings and this data cannot go on from a driver's ``state``."""
    data.check(state["data"])
    groups = len(state["ready"]) + len(state["running"])
    age = max((state["version"] - admitted_at for admitted_at, _ in state["ready"].values()), default=0)
    room = (trainer.max_staleness + 1) * trainer.tasks_per_step
    if groups > room or age > trainer.max_staleness:
        raise CheckpointError(
            f"the checkpoint holds {groups} groups under way, up to {age} versions old; trainer.max_staleness={trainer.max_staleness} and "
            f"trainer.tasks_per_step={trainer.tasks_per_step} take {room} groups, up to {trainer.max_staleness} versions old; resume with "
            "the values it was written with (reasoner train RUN/config.yaml --resume), or larger ones"
        )


def read_driver_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's part of a checkpoint, after checking every file against the manifest.

    Raises ``CheckpointError`` where a file is missing, truncated or unreadable, or where ``driver.pkl`` is not, byte by byte, what
    was written: a damaged pickle may load as something else. The learner's files are compared by their sizes.
    """
    hint = f"delete {checkpoint} to resume from the checkpoint before it, or start anew with --overwrite"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                raise CheckpointError(f"corrupt checkpoint: {checkpoint / name} has {actual} bytes, {size} were written; {hint}")
        content = (checkpoint / "driver.pkl").read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["driver_sha256"]:
            raise CheckpointError(f"corrupt checkpoint: {checkpoint / 'driver.pkl'} is not what was written; {hint}")
        state = pickle.loads(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"corrupt checkpoint: {error.filename} is missing; {hint}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"corrupt checkpoint: {checkpoint} cannot be read ({type(error).__name__}: {error}); {hint}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"corrupt checkpoint: {checkpoint / 'driver.pkl'} holds no driver state; {hint}")
    return state


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
