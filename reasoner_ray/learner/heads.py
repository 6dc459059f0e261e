"""The head of a process reward or value model beside a plain Hugging Face folder, and what kind of model it makes of it."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reasoner_ray.errors import ModelError
from reasoner_ray.learner.value import ValueHead

if TYPE_CHECKING:
    from reasoner_ray.config import JobConfig

INFO_FILE, WEIGHTS_FILE = "step_model.json", "step_head.safetensors"


HeadKind = Literal["prm", "value"]


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a folder with a head is."""

    kind: HeadKind  # the head gives the logit of "this step is right", or the value of a state
    hidden: tuple[int, ...] = ()  # widths of the head's hidden layers
    separator: str = "\n\n"  # what ended a step in the text records it was trained on
    labels: str = "soft"
    base: str = ""  # the model it was trained from

    @classmethod
    def of(cls, config: JobConfig) -> HeadInfo:
        """What a job's model becomes."""
        kind: HeadKind = "prm" if config.kind == "prm" else "value"
        supervised = config.supervised
        return cls(kind, tuple(config.learner.critic_hidden), supervised.separator, supervised.labels, config.model.path)


def save_head(folder: Path, head: ValueHead, info: HeadInfo) -> None:
    """Write the head's weights (float32) and ``info`` into ``folder``. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / WEIGHTS_FILE)
    except SafetensorError as error:  # what safetensors makes of a write that failed
        raise OSError(errno.EIO, str(error), str(folder)) from error
    (folder / INFO_FILE).write_text(json.dumps(asdict(info), indent=1))


def has_head(folder: Path) -> bool:
    """Whether ``folder`` holds a process reward or value model that was trained here."""
    return (folder / INFO_FILE).is_file()


def read_head_info(folder: Path) -> HeadInfo:
    """What the model in ``folder`` is. Raises ``ModelError``."""
    try:
        values = json.loads((folder / INFO_FILE).read_text())
        info = HeadInfo(**{**values, "hidden": tuple(values["hidden"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder} holds no process reward or value model ({INFO_FILE}: {error}); train one with kind: prm or kind: value"
        ) from error
    if info.kind not in ("prm", "value"):
        raise ModelError(f"{folder / INFO_FILE}: kind must be prm or value, not {info.kind!r}")
    return info


@torch.no_grad()
def load_head(folder: Path, head: ValueHead, kind: HeadKind | None = None) -> None:
    """Fill ``head`` with the weights in ``folder``. Raises ``ModelError`` where they are of another shape or cannot be read, or where
    they are not of ``kind``: the logit of a probability is no value of a state, nor the other way round."""
    info = read_head_info(folder)
    if kind is not None and info.kind != kind:
        raise ModelError(
            f"{folder} holds a model of kind {info.kind}, and kind {kind} would go on training its head as another thing; take kind: "
            f"{info.kind}, or a model without a head (copy the folder without {INFO_FILE} and {WEIGHTS_FILE})"
        )
    try:
        head.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"{folder}: its head has other layers; set learner.critic_hidden={list(info.hidden)}") from error
