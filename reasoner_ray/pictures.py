"""Episodes as moving pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

FPS = 8.0
MAX_FRAMES = 500
LAST_MS = 2000
"""How long the last picture stays."""


def write_gif(frames: Sequence[np.ndarray], path: Path) -> Path:
    """An endless animation of the first ``MAX_FRAMES`` images, uint8 [H, W, 3] of one size; returns ``path``. Raises ``OSError``."""
    from PIL import Image

    images = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames[:MAX_FRAMES]]
    durations = [round(1000 / FPS)] * (len(images) - 1) + [LAST_MS]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path
