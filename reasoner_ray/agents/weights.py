"""The files of a network in the folder model/ of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from reasoner_ray.errors import ModelError

WEIGHTS, ABOUT = "network.safetensors", "network.json"


def read_weights(network: nn.Module, folder: Path, section: str) -> None:
    """Take the weights in ``folder``. Raises ``ModelError`` where they do not fit what the job's ``section`` says."""
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:400]
        raise ModelError(f"{folder}: the weights do not fit the network: {problem}; check the section {section}") from error


def check_settings(folder: Path, section: str, saved: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ``ModelError`` where the network in ``folder`` was made by other settings: the same weights would mean something else.

    ``saved`` and ``now`` are the job's ``section`` as plain data, there and here; what was not saved is not known, and not compared.
    """
    if other := [key for key in keys if key in saved and saved[key] != now[key]]:
        said = ", ".join(f"{section}.{key} was {_yaml(saved[key])} and is {_yaml(now[key])} here" for key in other)
        raise ModelError(f"{folder} holds a network of other settings: {said}; set them as they were, or begin with model.path=scratch")


def _yaml(value: Any) -> str:
    """As it is written in a job."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
