"""Checkpoints: written aside, flushed, renamed; the newest complete one wins.

``RUN/checkpoints/step-000010/`` holds ``learner/`` (DeepSpeed and scheduler state), ``driver.pkl`` and
``MANIFEST.json``, which lists every file with its size and is written last.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from reasoner_ray.errors import CheckpointError

MANIFEST = "MANIFEST.json"


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
    aside = final.with_suffix(".writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "learner").mkdir(parents=True)
        await save_learner(aside / "learner")
        _write_flushed(aside / "driver.pkl", pickle.dumps(driver_state))
        sizes = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        _write_flushed(aside / MANIFEST, json.dumps({"step": step, "files": sizes}, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush_folder(final.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} was not written: {error.strerror or error} ({final.parent}); earlier checkpoints are unharmed"
        ) from error
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without its manifest was never finished and does not count."""
    folder = run_dir / "checkpoints"
    return sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}") if not p.parent.name.endswith(".writing"))


def read_driver_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's part of a checkpoint, after checking every file against the manifest.

    Raises ``CheckpointError`` where a file is missing, truncated or unreadable.
    """
    hint = f"delete {checkpoint} to resume from the checkpoint before it, or start anew with --overwrite"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                raise CheckpointError(f"corrupt checkpoint: {checkpoint / name} has {actual} bytes, {size} were written; {hint}")
        state = pickle.loads((checkpoint / "driver.pkl").read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"corrupt checkpoint: {error.filename} is missing; {hint}") from error
    except (json.JSONDecodeError, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"corrupt checkpoint: {checkpoint} cannot be read ({error}); {hint}") from error
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
