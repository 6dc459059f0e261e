"""The critic's regression loss."""

from __future__ import annotations

import torch


def value_loss(values: torch.Tensor, returns: torch.Tensor, old_values: torch.Tensor | None, *, clip: float | None) -> torch.Tensor:
    """``0.5 max((G - V)^2, (G - V_old - clamp(V - V_old, -clip, clip))^2)`` [k]; without ``clip``, ``0.5 (G - V)^2``.

    ``clip`` is in units of reward. Raises ``ValueError`` where it is set and ``old_values`` is None.
    """
    squared = (returns - values) ** 2
    if clip is None:
        return 0.5 * squared
    if old_values is None:
        raise ValueError("a clipped value loss needs the values before the update")
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(squared, (returns - near) ** 2)
