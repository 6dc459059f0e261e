"""A learner's state on disk: one file a rank, written and read without a collective in between.

So a full disk on one rank is an error on every rank, never a hang. The caller renames the folder when it is complete.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from reasoner_ray.errors import CheckpointError

if TYPE_CHECKING:
    from reasoner_ray.learner.engine import GradientEngine

SHAPE = "learner.json"


def save_state(folder: Path, engine: GradientEngine, counters: dict[str, Any]) -> None:
    """Write this rank's state (weights, optimiser, RNG, ``counters``) into ``folder``, flushed to disk.

    Raises ``OSError`` on every rank where one of them could not write.
    """
    state = engine.state_dict() | {"rng": _rng_state(), "counters": counters}
    problem: OSError | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _rank_file(folder, engine.rank).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if engine.rank == 0:
            _write_shape(folder, engine)
    except OSError as error:
        problem = error
    except RuntimeError as error:  # what torch.save makes of a write that failed
        problem = OSError(errno.EIO, str(error))
    (failed,) = engine.reduce([float(problem is not None)], dist.ReduceOp.MAX)
    if failed:
        raise problem or OSError(errno.EIO, f"another learner rank could not write its state into {folder}")


def load_state(folder: Path, engine: GradientEngine) -> dict[str, Any]:
    """Restore what ``save_state`` wrote; returns its ``counters``.

    Raises ``CheckpointError`` where the files are missing, damaged, or of another model, ZeRO stage or number of ranks.
    """
    own: dict[str, Any] = {}
    first: dict[str, Any] = {}
    problem: CheckpointError | None = None
    try:
        _check_shape(folder, engine)
        own = _read(_rank_file(folder, engine.rank))
        first = own if engine.rank == 0 or engine.stage == 3 else _read(_rank_file(folder, 0))
    except CheckpointError as error:
        problem = error
    (failed,) = engine.reduce([float(problem is not None)], dist.ReduceOp.MAX)
    if failed:
        raise problem or CheckpointError(f"another learner rank could not read {folder}")
    engine.load_state_dict(own, first)
    _set_rng_state(own["rng"])
    return dict(own["counters"])


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _shape(engine: GradientEngine) -> dict[str, Any]:
    return {"ranks": engine.world_size, "zero_stage": engine.stage, "parameters": engine.changing_shapes()}


def _write_shape(folder: Path, engine: GradientEngine) -> None:
    with (folder / SHAPE).open("w") as file:
        json.dump(_shape(engine), file)
        file.flush()
        os.fsync(file.fileno())


def _check_shape(folder: Path, engine: GradientEngine) -> None:
    try:
        saved = json.loads((folder / SHAPE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"corrupt checkpoint: {folder / SHAPE} cannot be read ({error})") from error
    for key, key_path in (("ranks", "learner.ranks"), ("zero_stage", "learner.zero_stage")):
        if saved.get(key) != _shape(engine)[key]:
            raise CheckpointError(
                f"{folder} was written with {key_path}={saved.get(key)}, this run has {_shape(engine)[key]}; "
                f"resume with {key_path}={saved.get(key)}, or start a new run from its exported model"
            )
    saved_shapes, shapes = saved.get("parameters", {}), engine.changing_shapes()
    different = sorted(n for n in saved_shapes.keys() | shapes.keys() if saved_shapes.get(n) != shapes.get(n))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{folder} was written for another model: {len(different)} parameters that training changes differ, for example {name} is "
            f"{saved_shapes.get(name, 'absent')} there and {shapes.get(name, 'absent')} here; "
            "check model.path, learner.critic and learner.lora; of kind mat, the section mat"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        # The optimiser state of ZeRO holds plain Python objects beside its tensors; the file is the run's own.
        state = torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"corrupt checkpoint: {path} cannot be read ({error}); resume from an earlier one") from error
    if not isinstance(state, dict) or not {"optimizer", "rng", "counters"} <= state.keys():
        raise CheckpointError(f"corrupt checkpoint: {path} holds no learner state; resume from an earlier one")
    return state


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
