"""Searches that plan one move ahead: infotaxis, entrotaxis, DCEE; a random walk, and an oracle that knows the source.

A planner weighs each move by what the belief would become. Readings at the place a move leads to are drawn from the belief, M of them,
and each reweights all particles: tensors [E, K moves, M readings, N particles], a part of the E episodes at a time. Entrotaxis weighs
bins of readings instead.
"""

from __future__ import annotations

import math

import torch

from reasoner_ray.agents.agdc.problem import View
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.envs.source_term.core import MOVES, SourceTermBatch, at_ground
from reasoner_ray.envs.source_term.plume import SMALLEST_SD, SensorTerms, concentration, read_sensor
from reasoner_ray.envs.source_term.settings import SensorConfig
from reasoner_ray.registry import Registry

ELEMENTS = 200_000
"""Log-likelihoods that exist at once: what a processor's cache holds."""
BINS, RATIO = 48, 2.0
"""Of readings that are not 0: 14 orders of magnitude, each bin about as wide as a noisy sensor tells apart."""
HEADINGS = 8
"""Directions that are weighed where an agent may take any."""


PLANNERS: Registry[type] = Registry("planner", "agdc.policy")


class _Moves:
    """The moves a planner chooses from."""

    def __init__(self, search: SourceTermBatch) -> None:
        self.discrete = search.config.moves == "discrete"
        angles = torch.arange(HEADINGS, device=search.device) * (2 * math.pi / HEADINGS)
        self._headings = torch.where(angles > math.pi, angles - 2 * math.pi, angles)
        turned = torch.stack([torch.cos(self._headings), torch.sin(self._headings)], dim=-1)
        directions = MOVES.to(search.device) if self.discrete else turned
        limits = torch.tensor([search.config.scene.width, search.config.scene.height], device=search.device)
        self.places = torch.minimum((search.position[:, None] + directions * search.config.speed).clamp_min(0.0), limits)
        """Where each move leads, [E, K, 2]."""

    def action(self, index: torch.Tensor) -> torch.Tensor:
        """What the environment takes for moves ``index`` [E]."""
        return index if self.discrete else self._headings[index]


class _Stream:
    """Random numbers of a planner, on the device where it is asked first."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def on(self, device: torch.device) -> torch.Generator:
        """The generator."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


class _Planner:
    """A planner that scores moves; the least score wins."""

    outcomes: int
    """Readings that it thinks of at each move."""

    def act(self, view: View) -> torch.Tensor:
        """The best move of each episode."""
        moves, belief = _Moves(view.search), view.belief.filter
        k, n = moves.places.shape[1], belief.settings.particles
        at_once = max(1, ELEMENTS // (k * self.outcomes * n))
        scores = [self._some(moves.places[i : i + at_once], view.belief, slice(i, i + at_once)) for i in range(0, belief.n, at_once)]
        return moves.action(torch.cat(scores).argmin(dim=-1))

    def _some(self, places: torch.Tensor, belief: SourceBelief, some: slice) -> torch.Tensor:
        """Scores [e, K] of a part of the episodes."""
        raise NotImplementedError


class _Lookahead(_Planner):
    """A planner that scores moves by reweighted beliefs."""

    def __init__(self, readings: int = 25, seed: int = 0) -> None:
        """``readings``: M, drawn for each move."""
        self.outcomes = readings
        self._stream = _Stream(seed)

    def _some(self, places: torch.Tensor, belief: SourceBelief, some: slice) -> torch.Tensor:
        inner, grounded = belief.filter, at_ground(places)
        stream = self._stream.on(inner.device)
        particles, log_weights = inner.particles[some], inner.log_weights[some]
        chosen = torch.multinomial(log_weights.exp(), self.outcomes, replacement=True, generator=stream)
        sources = torch.gather(particles, 1, chosen[..., None].expand(-1, -1, 8))
        means = concentration(sources[:, None], grounded[:, :, None])  # [e, K, M]
        normal = torch.randn(means.shape, generator=stream, device=inner.device)
        uniform = torch.rand(means.shape, generator=stream, device=inner.device)
        readings = read_sensor(means, normal, uniform, inner.sensor)
        terms = SensorTerms.of(concentration(particles[:, None], grounded[:, :, None]), inner.sensor).unsqueeze(2)
        log_likelihood = terms.of_reading(readings[..., None])  # [e, K, M, N]
        joint = log_likelihood + log_weights[:, None, None]
        after = torch.log_softmax(joint, dim=-1)
        best = after.argmax(dim=-1, keepdim=True)  # log p(reading) is joint - after, wherever that is finite
        evidence = (torch.gather(joint, -1, best) - torch.gather(after, -1, best)).squeeze(-1)
        return self.score(places, particles, after.exp_(), log_likelihood, evidence).mean(dim=-1)

    def score(
        self, places: torch.Tensor, particles: torch.Tensor, weights: torch.Tensor, log_likelihood: torch.Tensor, evidence: torch.Tensor
    ) -> torch.Tensor:
        """[e, K, M], the less the better, of reweighted beliefs ``weights`` [e, K, M, N]; ``evidence`` [e, K, M]: log p(reading)."""
        raise NotImplementedError


@PLANNERS.register("infotaxis")
class Infotaxis(_Lookahead):
    """The largest expected information: KL(belief after || belief before), Vergassola et al. 2007 in particle form."""

    def score(
        self, places: torch.Tensor, particles: torch.Tensor, weights: torch.Tensor, log_likelihood: torch.Tensor, evidence: torch.Tensor
    ) -> torch.Tensor:
        """Minus the divergence: sum w' log(w' / w) = sum w' log-likelihood - log p(reading)."""
        return evidence - (weights * log_likelihood.clamp_min(-1e6)).sum(dim=-1)


@PLANNERS.register("entrotaxis")
class Entrotaxis(_Planner):
    """The most uncertain reading: the entropy -sum p log p of its predictive distribution over bins, Hutchinson et al. 2018.

    Bins: 0, then ``BINS`` from the sensor's threshold on, each ``RATIO`` times as wide as the one before, the last one open. What counts
    is thus which order of magnitude a reading has, whatever the unit of concentration. Nothing is drawn.
    """

    outcomes = BINS + 1

    def __init__(self, seed: int = 0) -> None:
        pass

    def _some(self, places: torch.Tensor, belief: SourceBelief, some: slice) -> torch.Tensor:
        inner = belief.filter
        means = concentration(inner.particles[some][:, None], at_ground(places)[:, :, None])  # [e, K, N]
        shares = (bin_shares(means, inner.sensor) * inner.log_weights[some].exp()[:, None, None]).sum(dim=-1)
        return torch.xlogy(shares, shares).sum(dim=-1)


def bin_shares(means: torch.Tensor, sensor: SensorConfig) -> torch.Tensor:
    """Probabilities [..., B, N] that a reading falls into each of ``Entrotaxis``' bins, B = BINS + 1, for concentrations [..., N]."""
    scale = (sensor.noise * means + sensor.background).clamp_min(SMALLEST_SD)
    edges = sensor.threshold * RATIO ** torch.arange(BINS, dtype=means.dtype, device=means.device)
    below = torch.special.ndtr((edges[:, None] - means[..., None, :]) / scale[..., None, :])
    below = torch.cat([below, torch.ones_like(below[..., :1, :])], dim=-2)
    seen = sensor.detection * torch.diff(below, dim=-2)
    unseen = sensor.detection * below[..., :1, :] + (1 - sensor.detection)
    return torch.cat([unseen, seen], dim=-2)


@PLANNERS.register("dcee")
class DCEE(_Lookahead):
    """Dual control for exploitation and exploration: the least E[|p - E(s|y)|² + tr Cov(s|y)], Chen, Rhodes and Liu 2021."""

    def score(
        self, places: torch.Tensor, particles: torch.Tensor, weights: torch.Tensor, log_likelihood: torch.Tensor, evidence: torch.Tensor
    ) -> torch.Tensor:
        """Squared way to the source's expected place, and the variance about that."""
        place = particles[..., :2]
        moments = torch.cat([place, place.square().sum(dim=-1, keepdim=True)], dim=-1)
        found = weights @ moments[:, None]  # [e, K, M, 3]
        mean = found[..., :2]
        variance = (found[..., 2] - mean.square().sum(dim=-1)).clamp_min(0.0)
        return (places[:, :, None] - mean).square().sum(dim=-1) + variance


@PLANNERS.register("random")
class RandomWalk:
    """A uniform move."""

    def __init__(self, seed: int = 0) -> None:
        """Repeatable by ``seed``."""
        self._stream = _Stream(seed)

    def act(self, view: View) -> torch.Tensor:
        """Any move."""
        moves = _Moves(view.search)
        device = view.search.device
        return moves.action(torch.randint(moves.places.shape[1], (view.search.n,), generator=self._stream.on(device), device=device))


@PLANNERS.register("oracle")
class Oracle:
    """Walks to the true source, which it knows: what a search cannot do, as a bound on the way."""

    def __init__(self, seed: int = 0) -> None:
        pass

    def act(self, view: View) -> torch.Tensor:
        """The move that comes nearest."""
        moves = _Moves(view.search)
        off = torch.linalg.vector_norm(moves.places - view.search.source[:, None, :2], dim=-1)
        return moves.action(off.argmin(dim=-1))
