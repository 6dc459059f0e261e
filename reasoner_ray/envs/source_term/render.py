"""Pictures of a search: the field, the way, the particles."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reasoner_ray.envs.source_term.core import at_ground
from reasoner_ray.envs.source_term.plume import concentration
from reasoner_ray.envs.source_term.settings import SceneConfig

_CELLS = 120
"""Cells of the field along x."""


def draw_scene(
    scene: SceneConfig, source: np.ndarray, path: np.ndarray, particles: np.ndarray | None = None, title: str = ""
) -> np.ndarray:
    """An RGB image, uint8 [H, W, 3]: the field of ``source`` [8], the way ``path`` [T, 2], the positions of ``particles`` [N, 8]."""
    columns, rows = _CELLS, max(1, round(_CELLS * scene.height / scene.width))
    xs, ys = torch.linspace(0, scene.width, columns), torch.linspace(0, scene.height, rows)
    places = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    field = concentration(torch.as_tensor(source), at_ground(places)).clamp_min(1e-6).log10()
    figure = Figure(figsize=(4.8, max(1.2, 4.8 * scene.height / scene.width)), layout="constrained", dpi=90)
    canvas = FigureCanvasAgg(figure)  # no display, no global state
    axes = figure.subplots()
    axes.imshow(field.numpy(), origin="lower", extent=(0, scene.width, 0, scene.height), cmap="Greys", vmin=-6, vmax=1, aspect="equal")
    if particles is not None:
        axes.scatter(particles[:, 0], particles[:, 1], s=3, alpha=0.35, color="#0072B2", linewidths=0, label="belief")
    axes.plot(path[:, 0], path[:, 1], color="#D55E00", linewidth=1.4, label="way")
    axes.plot(*path[-1], marker="o", color="#D55E00", markersize=5)
    axes.plot(source[0], source[1], marker="*", color="#009E73", markersize=11, linestyle="", label="source")
    axes.set(xlim=(0, scene.width), ylim=(0, scene.height), title=title)
    axes.legend(loc="upper right", fontsize=7, framealpha=0.8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
