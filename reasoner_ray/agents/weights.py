"""The files of a network in the folder model/ of a run."""

from __future__ import annotations

from pathlib import Path

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
