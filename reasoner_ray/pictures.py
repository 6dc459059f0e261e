"""Episodes as moving pictures: GIF, or MP4 where imageio and its ffmpeg are installed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reasoner_ray.errors import EnvironmentProblem

FPS = 8.0
MAX_FRAMES = 500
LAST_MS = 2000
"""How long the last picture stays."""


def write_video(frames: Sequence[np.ndarray], path: Path) -> Path:
    """The first ``MAX_FRAMES`` images, uint8 [H, W, 3] of one size, as what ``path`` ends in (.gif or .mp4); returns ``path``.

    Raises ``EnvironmentProblem`` where that cannot be written here, ``OSError``.
    """
    check_ending(path.name)
    return write_gif(frames, path) if path.suffix == ".gif" else _write_mp4(frames, path)


def check_ending(name: str) -> None:
    """Raise ``EnvironmentProblem`` where a video called ``name`` cannot be written here."""
    if Path(name).suffix not in (".gif", ".mp4"):
        raise EnvironmentProblem(f"{name}: videos are written as .gif or .mp4")
    if name.endswith(".mp4") and not all(importlib.util.find_spec(module) for module in ("imageio", "imageio_ffmpeg")):
        raise EnvironmentProblem(
            f"{name} needs imageio and its ffmpeg; run `pip install imageio==2.38.1 imageio-ffmpeg==0.8.1`, or take .gif"
        )


def encoded(frames: Sequence[np.ndarray], ending: str) -> bytes:
    """The content of the file that ``write_video`` writes for ``ending``. Raises ``EnvironmentProblem``, ``OSError``."""
    with tempfile.TemporaryDirectory() as folder:
        return write_video(frames, Path(folder) / f"episode{ending}").read_bytes()


def write_gif(frames: Sequence[np.ndarray], path: Path) -> Path:
    """An endless animation of the first ``MAX_FRAMES`` images, uint8 [H, W, 3] of one size; returns ``path``. Raises ``OSError``."""
    from PIL import Image

    images = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames[:MAX_FRAMES]]
    durations = [round(1000 / FPS)] * (len(images) - 1) + [LAST_MS]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path


def _write_mp4(frames: Sequence[np.ndarray], path: Path) -> Path:
    """H.264 in 4:2:0, which browsers play. That knows even sizes alone, so an odd side repeats its last line."""
    import imageio.v2

    kept = list(frames[:MAX_FRAMES])
    kept += [kept[-1]] * round(LAST_MS / 1000 * FPS - 1)
    height, width = kept[0].shape[:2]
    even: list[Any] = [np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") for frame in kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v2.mimwrite(path, even, fps=FPS, codec="libx264", pixelformat="yuv420p", macro_block_size=1)
    return path
