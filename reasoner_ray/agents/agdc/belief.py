"""Beliefs over the source of a plume, E of them at once, as weighted particles [E, N, 8]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reasoner_ray.agents.agdc.prior import SourcePrior, usual_estimates
from reasoner_ray.agents.agdc.settings import BeliefConfig, taken_sensor
from reasoner_ray.envs.source_term.core import at_ground
from reasoner_ray.envs.source_term.plume import PHI, TAU, D, Q, U, X, Y, Z, concentration, log_likelihood
from reasoner_ray.envs.source_term.settings import SourceTermConfig
from reasoner_ray.errors import ConfigError

BLOCKS = ((X, Y, Z), (Q,), (U, PHI), (D, TAU))
"""Parameters that a Metropolis move draws with their covariance."""
BISECTIONS = 16
SMALLEST_SHARE = 1e-24
"""Of a reading, in one stage: a reading next to the source is 1e17 nats less likely far from it."""
MAX_STAGES = 60
"""Of one reading; past it the rest of the reading counts at once."""
AT_ONCE = 64_000
"""Particles that are updated at once: what a processor's cache holds."""
ELEMENTS = 200_000
"""Concentrations that exist at once while moves are judged."""
FAULTS = ("nonfinite", "negative", "lost", "unknown", "unexplained", "broken", "forced", "collapsed")
"""What a ``ParticleBelief`` counts of what is out of order."""
LOWEST = -1e30
"""Stands for a log-probability of minus infinity where it is multiplied."""


@dataclass
class _Rows:
    """The episodes that are being updated, copied out of the belief."""

    index: torch.Tensor  # int64 [e]
    estimates: torch.Tensor  # [e, 4]
    columns: torch.Tensor  # [e, 8, N]; the particles
    log_weights: torch.Tensor  # [e, N]; normalised
    past: torch.Tensor  # [e, N]; log-likelihood of the readings before the newest
    now: torch.Tensor  # [e, N]; of the newest

    @property
    def particles(self) -> torch.Tensor:
        """[e, N, 8]; a view."""
        return self.columns.mT

    def part(self, chosen: torch.Tensor) -> _Rows:
        """The rows in ``chosen`` (bool [e]); itself, where that is all of them."""
        if bool(chosen.all()):
            return self
        fields = (self.index, self.estimates, self.columns, self.log_weights, self.past, self.now)
        return _Rows(*(field[chosen] for field in fields))

    def put(self, chosen: torch.Tensor, part: _Rows) -> None:
        """Write ``part`` back where it came from."""
        if part is not self:
            self.columns[chosen], self.log_weights[chosen] = part.columns, part.log_weights
            self.past[chosen], self.now[chosen] = part.past, part.now


class ParticleBelief:
    """A particle filter of static parameters: reweighting, systematic resampling, Metropolis moves.

    A reading's likelihood is raised in stages (adaptive tempering, Del Moral, Doucet and Jasra 2006), each as large as the effective
    sample size allows, with resampling and moves in between (resample-move, Gilks and Berzuini 2001). The moves keep the posterior given
    all readings, so the belief is calibrated. ``move="reading"`` is the filter of published source-term code (Ristic's): one stage, moves
    judged by the newest reading alone; it grows over-confident.

    A reading that is not finite says nothing (``nonfinite`` counts it), nor does one at a place that is not (``lost``); one below 0, which
    no sensor with a threshold gives, is taken for 0 (``negative``); one that no particle explains is set aside (``unexplained``). For a
    weather estimate that is not finite stands the middle of the scene's range (``unknown``). A particle whose likelihood is not a number
    explains nothing (``broken``). Where ``MAX_STAGES`` stages do not take a reading in, the rest of it counts at once (``forced``). Where
    a stage leaves less than half of the effective sample size that is asked for, the belief is narrower than it should be (``collapsed``;
    not of ``move="reading"`` and ``"none"``, which have no stages).

    ``move="reading"`` follows the published code but for this: its unseen readings' term has the sensor's deviation, not its threshold,
    and a proposal that cannot be (or lies outside the prior's ranges) is rejected, not drawn again.
    """

    def __init__(
        self, settings: BeliefConfig, environment: SourceTermConfig, n: int, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """``n`` beliefs at once. Raises ``ConfigError`` for a sensor without noise."""
        self.settings, self.n, self.device = settings, n, torch.device(device)
        self.sensor = taken_sensor(settings, environment)
        self._prior, self._usual = SourcePrior(environment), usual_estimates(environment).to(self.device)
        self._stream = torch.Generator(self.device).manual_seed(seed)
        count, readings = settings.particles, environment.max_steps + 1
        self._columns = torch.zeros(n, 8, count, device=self.device)  # a parameter's values side by side: several times faster
        self.log_weights = torch.zeros(n, count, device=self.device)
        self._log_likelihood = torch.zeros(n, count, device=self.device)
        self._estimates = torch.zeros(n, 4, device=self.device)
        self._places = torch.zeros(n, readings, 3, device=self.device)
        self._readings = torch.full((n, readings), torch.nan, device=self.device)
        self._length = torch.zeros(n, dtype=torch.long, device=self.device)
        self.nonfinite = self.negative = self.lost = self.unknown = self.unexplained = self.broken = self.forced = self.collapsed = 0
        self.resampled = 0
        blocks = torch.zeros(8, 8, device=self.device)
        for block in BLOCKS:
            for place in block:
                blocks[place, list(block)] = 1.0
        self._blocks = blocks
        dimensions = 8
        self._width = (4 / (dimensions + 2)) ** (1 / (dimensions + 4)) * count ** (-1 / (dimensions + 4))

    def seed(self, seed: int) -> None:
        """Draw from ``seed`` on."""
        self._stream.manual_seed(seed)

    @property
    def particles(self) -> torch.Tensor:
        """[E, N, 8]; a view."""
        return self._columns.mT

    @property
    def weights(self) -> torch.Tensor:
        """[E, N]; each belief's sum to 1."""
        return self.log_weights.exp()

    @property
    def effective_size(self) -> torch.Tensor:
        """Effective sample size 1 / sum w² [E]."""
        return _effective_size(self.log_weights)

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Begin the beliefs in ``mask`` [E] from the prior and the first ``observation`` [E, 7] (``core.OBSERVATION``).

        Raises ``ConfigError`` as ``update`` does.
        """
        rows = mask.nonzero().flatten()
        if not len(rows):
            return
        estimates = observation[rows, 3:7]
        known = torch.isfinite(estimates)
        self.unknown += int((~known).any(dim=-1).sum())
        self._estimates[rows] = torch.where(known, estimates, self._usual)
        self._columns[rows] = self._prior.draw(self._estimates[rows], self.settings.particles, self._stream).mT
        self.log_weights[rows] = -math.log(self.settings.particles)
        self._log_likelihood[rows], self._length[rows], self._readings[rows] = 0.0, 0, torch.nan
        self.update(mask, observation)

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Take in the reading of ``observation`` [E, 7] for the beliefs in ``mask`` [E].

        Raises ``ConfigError`` for more readings than an episode of ``max_steps`` has.
        """
        chosen = mask.nonzero().flatten()
        if len(chosen) and int(self._length[chosen].max()) >= self._readings.shape[1]:
            raise ConfigError(
                f"max_steps: this belief was made for episodes of {self._readings.shape[1] - 1} steps, and its environment goes on; make "
                "it with the environment's own settings"
            )
        place, reading = observation[:, :2], observation[:, 2]
        lost, seen = ~torch.isfinite(place).all(dim=-1), torch.isfinite(reading)
        self.nonfinite += int((~seen[chosen]).sum())
        self.negative += int((seen & (reading < 0))[chosen].sum())
        self.lost += int(lost[chosen].sum())
        place = torch.where(lost[:, None], 0.0, place)
        reading = torch.where(seen & ~lost, reading.clamp_min(0.0), torch.nan)
        for rows in chosen.split(max(1, AT_ONCE // self.settings.particles)):
            self._update(rows, at_ground(place[rows]), reading[rows])

    def _update(self, rows: torch.Tensor, place: torch.Tensor, reading: torch.Tensor) -> None:
        """A ``reading`` [e] at ``place`` [e, 3] for the beliefs ``rows`` [e]."""
        columns = self._columns[rows]
        now = log_likelihood(concentration(columns.mT, place[:, None]), reading[:, None], self.sensor)
        broken = torch.isnan(now)
        self.broken += int(broken.sum())
        now = now.masked_fill(broken, -torch.inf)
        unexplained = torch.isneginf(now).all(dim=-1)
        self.unexplained += int(unexplained.sum())
        now = torch.where(unexplained[:, None], torch.zeros_like(now), now).clamp_min(LOWEST)
        at = self._length[rows]
        self._places[rows, at], self._readings[rows, at] = place, torch.where(unexplained, torch.nan, reading)
        self._length[rows] = at + 1
        state = _Rows(rows, self._estimates[rows], columns, self.log_weights[rows], self._log_likelihood[rows], now)
        self._take_in(state)
        self._columns[rows], self.log_weights[rows] = state.columns, state.log_weights
        self._log_likelihood[rows] = state.past + state.now

    def faults(self) -> dict[str, int]:
        """How often something was out of order, since the beliefs were made."""
        return {name: getattr(self, name) for name in FAULTS}

    def mean(self) -> torch.Tensor:
        """[E, 8]."""
        return (self._columns @ self.weights[..., None]).squeeze(-1)

    def covariance(self) -> torch.Tensor:
        """[E, 8, 8]."""
        return _covariance(self._columns, self.weights)

    def sample(self, n: int) -> torch.Tensor:
        """``n`` particles of each belief by their weights, [E, n, 8]."""
        return _take(self._columns, _systematic(self.weights, n, self._stream)).mT

    # -- one reading ---------------------------------------------------------------------------------------

    def _take_in(self, state: _Rows) -> None:
        """Reweight ``state`` by its newest reading, in stages, resampling and moving in between."""
        done = torch.zeros(len(state.index), device=self.device)
        least = self.settings.resample_below * self.settings.particles
        single = self.settings.move != "posterior"
        for stage in range(MAX_STAGES):
            active = done < 1
            if not bool(active.any()):
                return
            part, share = state.part(active), 1 - done[active]
            if not single and stage < MAX_STAGES - 1:
                share = self._largest_share(part, share, least)
            elif not single:
                self.forced += len(share)
            part.log_weights = _normalised(part.log_weights + share[:, None] * part.now)
            if not single:
                self.collapsed += int((_effective_size(part.log_weights) < least / 2).sum())
            done[active] += share
            done[done > 1 - 1e-6] = 1.0
            self._renew(part, done[active], least)
            state.put(active, part)

    def _largest_share(self, part: _Rows, left: torch.Tensor, least: float) -> torch.Tensor:
        """The largest share [e] of the newest reading, at most ``left``, that keeps the effective sample size at ``least``."""

        def enough(share: torch.Tensor) -> torch.Tensor:
            return _effective_size(part.log_weights + share[:, None] * part.now) >= least

        whole = enough(left)
        if bool(whole.all()):
            return left
        low, high = torch.full_like(left, math.log(SMALLEST_SHARE)), left.log()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = enough(middle.exp())
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(whole, left, high.exp())  # just past the border: then resampling is due

    def _renew(self, part: _Rows, done: torch.Tensor, least: float) -> None:
        """Resample and move the beliefs of ``part`` whose effective sample size is below ``least``; ``done`` [e] of the reading counts."""
        poor = _effective_size(part.log_weights) < least
        if not bool(poor.any()):
            return
        worn = part.part(poor)
        self.resampled += len(worn.index)
        spread = _covariance(worn.columns, worn.log_weights.exp()) * self._blocks
        chosen = _systematic(worn.log_weights.exp(), self.settings.particles, self._stream)
        worn.columns = _take(worn.columns, chosen)
        worn.past, worn.now = torch.gather(worn.past, 1, chosen), torch.gather(worn.now, 1, chosen)
        worn.log_weights = torch.full_like(worn.log_weights, -math.log(self.settings.particles))
        if self.settings.move != "none":
            factor = self._width * _cholesky(spread)
            for _ in range(self.settings.move_steps):
                self._move(worn, done[poor], factor)
        part.put(poor, worn)

    def _move(self, worn: _Rows, done: torch.Tensor, factor: torch.Tensor) -> None:
        """One Metropolis step of every particle, drawn with ``factor`` [e, 8, 8]."""
        noise = torch.randn(worn.columns.shape, generator=self._stream, device=self.device)
        columns = worn.columns + factor @ noise
        proposed = columns.mT
        density = self._prior.log_density(proposed, worn.estimates)
        if self.settings.move == "posterior":
            past, now = self._log_history(worn.index, proposed)
            ratio = density - self._prior.log_density(worn.particles, worn.estimates) + past - worn.past
            ratio = ratio + done[:, None] * (now - worn.now)
        else:  # published: the density of the step itself, which is symmetric, takes the place of the prior and the past
            past, now = worn.past, self._log_newest(worn.index, proposed)
            ratio = now - worn.now - 0.5 * (noise**2).sum(dim=1)
            ratio = torch.where(torch.isneginf(density), density, ratio)
        uniform = torch.rand(ratio.shape, generator=self._stream, device=self.device)
        accepted = torch.log(uniform) < ratio
        worn.columns = torch.where(accepted[:, None], columns, worn.columns)
        worn.past, worn.now = torch.where(accepted, past, worn.past), torch.where(accepted, now, worn.now)

    def _log_newest(self, rows: torch.Tensor, particles: torch.Tensor) -> torch.Tensor:
        """Log-likelihood [e, N] of the newest reading alone."""
        newest = self._length[rows] - 1
        means = concentration(particles, self._places[rows, newest][:, None])
        return log_likelihood(means, self._readings[rows, newest][:, None], self.sensor).clamp_min(LOWEST)

    def _log_history(self, rows: torch.Tensor, particles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihoods [e, N] of the readings before the newest, and of the newest, for ``particles`` [e, N, 8] of ``rows`` [e]."""
        length = int(self._length[rows].max())
        past, now = torch.empty_like(particles[..., 0]), torch.empty_like(particles[..., 0])
        at_once = max(1, ELEMENTS // (particles.shape[1] * length))
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            places, readings = self._places[rows[some], :length], self._readings[rows[some], :length]
            means = concentration(particles[some, :, None], places[:, None])  # [e', N, L]
            each = log_likelihood(means, readings[:, None], self.sensor).clamp_min(LOWEST)
            newest = (self._length[rows[some]] - 1)[:, None, None].expand(-1, particles.shape[1], 1)
            now[some] = torch.gather(each, 2, newest).squeeze(-1)
            past[some] = each.sum(dim=-1) - now[some]
        return past, now


def _normalised(log_weights: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(log_weights, dim=-1)


def _effective_size(log_weights: torch.Tensor) -> torch.Tensor:
    """[E]; of log-weights that need not be normalised."""
    return 1 / torch.softmax(log_weights, dim=-1).square().sum(dim=-1)


def _covariance(columns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted covariance [E, 8, 8] of ``columns`` [E, 8, N]."""
    off = columns - columns @ weights[..., None]
    return (weights[:, None] * off) @ off.mT


def _take(columns: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The particles ``chosen`` [E, n] of ``columns`` [E, 8, N]."""
    return torch.gather(columns, 2, chosen[:, None].expand(-1, 8, -1))


def _cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """Lower factors [E, 8, 8]; a small diagonal keeps those of beliefs that are points along some direction. What is known stays put."""
    diagonal = torch.diagonal(covariance, dim1=-2, dim2=-1)
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(1e-5 * diagonal + 1e-10))
    return factor * (diagonal > 0)[..., None]


def _systematic(weights: torch.Tensor, n: int, stream: torch.Generator) -> torch.Tensor:
    """Indices [E, n] by systematic resampling of ``weights`` [E, N]."""
    first = torch.rand(len(weights), 1, generator=stream, device=weights.device)
    places = (torch.arange(n, device=weights.device) + first) / n
    return torch.searchsorted(weights.cumsum(dim=-1), places).clamp_max(weights.shape[1] - 1)
