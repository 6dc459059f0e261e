"""What is known of a source before the first reading: draws of it, and its density."""

from __future__ import annotations

import math

import torch

from reasoner_ray.envs.source_term.plume import PHI, TAU, D, Q, U, X, Y, Z
from reasoner_ray.envs.source_term.settings import SourceTermConfig


class SourcePrior:
    """Independent parameters around weather estimates [E, 4] (wind, direction, diffusivity, lifetime).

    x, y uniform over the domain, z uniform, strength gamma, wind normal above 0, direction normal, diffusivity uniform above its estimate,
    lifetime uniform below its own. The weather's estimates err just so (``SourceTermBatch``; a wind below 0 is taken for 0). Position and
    strength of an environment's sources have the ranges of its scene: there the prior knows less than there is to know.
    """

    def __init__(self, config: SourceTermConfig) -> None:
        self._scene, self._prior = config.scene, config.prior
        self._direction_sd = math.radians(config.prior.direction_sd)

    def draw(self, estimates: torch.Tensor, n: int, stream: torch.Generator) -> torch.Tensor:
        """Sources [E, n, 8] around ``estimates`` [E, 4]."""
        prior, device = self._prior, estimates.device
        wind, direction, diffusivity, lifetime = (column[:, None] for column in estimates.unbind(-1))
        unit = torch.rand(len(estimates), n, 8, generator=stream, device=device)
        normal = torch.randn(len(estimates), n, generator=stream, device=device)
        out = torch.empty_like(unit)
        out[..., X], out[..., Y] = unit[..., X] * self._scene.width, unit[..., Y] * self._scene.height
        out[..., Z] = prior.z[0] + unit[..., Z] * (prior.z[1] - prior.z[0])
        shape = torch.full_like(unit[..., Q], prior.strength_shape)
        out[..., Q] = torch._standard_gamma(shape, generator=stream) * prior.strength_scale
        below = torch.special.ndtr(-wind / prior.wind_sd)  # the normal above 0, by its inverse
        share = (below + unit[..., U] * (1 - below)).clamp(1e-6, 1 - 1e-6)
        out[..., U] = (wind + prior.wind_sd * torch.special.ndtri(share)).clamp_min(0.0)
        out[..., PHI] = direction + self._direction_sd * normal
        out[..., D] = diffusivity + unit[..., D] * prior.diffusivity_width
        out[..., TAU] = lifetime - unit[..., TAU] * prior.lifetime_width
        return out

    def log_density(self, sources: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
        """Log-density [E, N] of ``sources`` [E, N, 8] up to a constant; -inf where one cannot be."""
        prior = self._prior
        wind, direction, diffusivity, lifetime = (column[:, None] for column in estimates.unbind(-1))
        x, y, z, q, u, phi, d, tau = sources.unbind(-1)
        possible = (x >= 0) & (x <= self._scene.width) & (y >= 0) & (y <= self._scene.height) & (z >= prior.z[0]) & (z <= prior.z[1])
        possible &= (q > 0) & (u >= 0) & (d > 0) & (tau > 0)
        possible &= (d >= diffusivity) & (d <= diffusivity + prior.diffusivity_width)
        possible &= (tau <= lifetime) & (tau >= lifetime - prior.lifetime_width)
        density = (prior.strength_shape - 1) * torch.log(q.clamp_min(1e-30)) - q / prior.strength_scale
        density = density - 0.5 * ((u - wind) / prior.wind_sd) ** 2 - 0.5 * ((phi - direction) / self._direction_sd) ** 2
        return torch.where(possible, density, torch.full_like(density, -torch.inf))


def usual_estimates(config: SourceTermConfig) -> torch.Tensor:
    """Wind, direction (radians), diffusivity and lifetime in the middle of the scene's ranges, [4]."""
    scene = config.scene
    wind, direction, diffusivity, lifetime = (
        sum(limits) / 2 for limits in (scene.wind, scene.direction, scene.diffusivity, scene.lifetime)
    )
    return torch.tensor([wind, math.radians(direction), diffusivity, lifetime])
