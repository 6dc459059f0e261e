"""The token-level critic: a small head that reads the hidden state that predicts a token.

``V(o, w^{<j}) = MLP(h)`` with h the last hidden state at the position that predicts ``w^j`` (POAD, Wen et al. 2024,
section 4: Linear(d, 1024) without bias, ReLU, Linear(1024, 512), ReLU, Linear(512, 1), float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class ValueHead(nn.Module):
    """Hidden states [k, d] -> values [k], float32.

    The last layer starts at zero, so that the first values are 0 and the first advantages are the plain returns.
    """

    def __init__(self, hidden_size: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise([hidden_size, *widths])):
            layers += [nn.Linear(inputs, outputs, bias=i > 0), nn.ReLU()]
        last = nn.Linear(widths[-1] if widths else hidden_size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values of ``hidden`` [k, d]: [k]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layers(hidden.float()).squeeze(-1)
