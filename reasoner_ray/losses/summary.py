"""From summed metric pieces to the figures that are shown."""

from __future__ import annotations

from collections.abc import Mapping

PIECES = ("return_mean", "return_square", "error_mean", "error_square")


def summarise(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step, summed over micro-batches and ranks, with the critic's pieces turned into one figure.

    ``explained_variance = 1 - Var(G - V) / Var(G)``: 1 for a perfect critic, 0 for one no better than a constant,
    below 0 for a worse one. Left out where the returns do not vary, since it is undefined there.
    """
    shown = {key: value for key, value in metrics.items() if key not in PIECES}
    if not all(piece in metrics for piece in PIECES):
        return shown
    spread = metrics["return_square"] - metrics["return_mean"] ** 2
    # Below rounding of float32 sums a difference of squares is noise, not a variance.
    if spread > 1e-6 * max(metrics["return_square"], 1e-12):
        shown["explained_variance"] = 1 - (metrics["error_square"] - metrics["error_mean"] ** 2) / spread
    return shown
