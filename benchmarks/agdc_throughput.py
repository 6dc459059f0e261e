"""Environment steps a second of source-term estimation: 256 searches in one batch against one at a time in numpy.

Both sides do the same work with the same particles: plume, sensor, reweighting, resampling with the published Metropolis moves (a fair
comparison needs moves that numpy can do in a step), and, on the planning side, infotaxis over four moves and 25 readings each. What the
batch does with the jobs' own filter, which moves particles by all readings, and with the other planners, is measured beside it. The
numpy side is vectorised over particles, moves and readings; what it lacks is other searches to share its calls with. A third side
plans move by move and reading by reading, as the published scripts do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.special import ndtr

from benchmarks._record import alternate, ratios, record
from reasoner_ray.agents.agdc.planners import PLANNERS
from reasoner_ray.agents.agdc.problem import View
from reasoner_ray.agents.agdc.settings import BeliefConfig
from reasoner_ray.agents.agdc.source_belief import SourceBelief
from reasoner_ray.envs.source_term.core import MOVES, SourceTermBatch
from reasoner_ray.envs.source_term.settings import SourceTermConfig

CONFIG = SourceTermConfig.model_validate({"prior": {"centred": True}})
TRUTH = np.array([15.5, 16.6, 0.0, 5.0, 2.0, np.pi / 4, 2.0, 10.0])
BLOCKS = ((0, 1, 2), (3,), (4, 5), (6, 7))


class NumpySearch:
    """One search, as a careful script does it."""

    def __init__(self, particles: int, readings: int, seed: int) -> None:
        self.rng, self.n, self.readings = np.random.default_rng(seed), particles, readings
        draw, prior = self.rng, CONFIG.prior
        self.particles = np.stack(
            [
                *(draw.uniform(0, 25, particles), draw.uniform(0, 25, particles), draw.uniform(*prior.z, particles)),
                draw.gamma(prior.strength_shape, prior.strength_scale, particles),
                np.abs(draw.normal(2, prior.wind_sd, particles)),
                draw.normal(np.pi / 4, np.radians(prior.direction_sd), particles),
                *(draw.uniform(2, 4, particles), draw.uniform(8, 10, particles)),
            ],
            axis=-1,
        )
        self.weights = np.full(particles, 1 / particles)
        self.position = np.zeros(2)

    @staticmethod
    def plume(sources: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Concentrations of sources [..., 8] at places [..., 2]."""
        x, y, z, q, u, phi, d, tau = np.moveaxis(sources, -1, 0)
        across, along = places[..., 0] - x, places[..., 1] - y
        distance = np.maximum(np.sqrt(across**2 + along**2 + z**2), 1e-5)
        reach = np.sqrt(d * tau / (1 + u**2 * tau / (4 * d)))
        exponent = -(across * np.cos(phi) + along * np.sin(phi)) * u / (2 * d) - distance / reach
        return q / (4 * np.pi * d * distance) * np.exp(exponent)

    def sense(self, mean: np.ndarray) -> np.ndarray:
        """Readings where the concentrations are ``mean``."""
        sensor = CONFIG.sensor
        reading = mean + (sensor.noise * mean + sensor.background) * self.rng.normal(size=np.shape(mean))
        seen = (reading >= sensor.threshold) & (self.rng.uniform(size=np.shape(mean)) < sensor.detection)
        return np.where(seen, reading, 0.0)

    @staticmethod
    def likelihood(mean: np.ndarray, reading: np.ndarray) -> np.ndarray:
        """Densities."""
        sensor = CONFIG.sensor
        sigma = sensor.noise * mean + sensor.background
        unseen = sensor.detection * ndtr((sensor.threshold - mean) / sigma) + 1 - sensor.detection
        seen = sensor.detection * np.exp(-0.5 * ((reading - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        return np.where(reading > 0, seen, unseen) + 1e-300

    def places(self) -> np.ndarray:
        """Where the four moves lead."""
        return np.clip(self.position + MOVES.numpy(), 0, 25)

    def plan(self) -> int:
        """Infotaxis."""
        places = self.places()
        chosen = self.particles[self.rng.choice(self.n, self.readings, p=self.weights)]
        readings = self.sense(self.plume(chosen[None], places[:, None]))
        likelihood = self.likelihood(self.plume(self.particles[None], places[:, None])[:, None], readings[..., None])
        joint = self.weights * likelihood
        evidence = joint.sum(-1, keepdims=True)
        divergence = (joint / evidence * np.log(likelihood / evidence)).sum(-1)
        return int(divergence.mean(-1).argmax())

    def plan_by_loops(self) -> int:
        """The same in the manner of the scripts that this problem comes with: move by move, reading by reading."""
        gains = []
        for place in self.places():
            mean, gained = self.plume(self.particles, place), 0.0
            for source in self.particles[self.rng.choice(self.n, self.readings, p=self.weights)]:
                likelihood = self.likelihood(mean, self.sense(self.plume(source, place)))
                after = self.weights * likelihood
                evidence = after.sum()
                gained += float((after / evidence * np.log(likelihood / evidence)).sum())
            gains.append(gained / self.readings)
        return int(np.argmax(gains))

    def step(self, move: int) -> None:
        """Move, sense, reweight, resample."""
        self.position = self.places()[move]
        reading = self.sense(self.plume(TRUTH, self.position))
        likelihood = self.likelihood(self.plume(self.particles, self.position), reading)
        self.weights = self.weights * likelihood
        self.weights /= self.weights.sum()
        if 1 / (self.weights**2).sum() < self.n / 2:
            self.renew(reading)

    def renew(self, reading: np.ndarray) -> None:
        """Systematic resampling and one Metropolis move by blocks."""
        width = 0.4 ** (1 / 12) * self.n ** (-1 / 12)
        off = self.particles - self.weights @ self.particles
        covariance = (off * self.weights[:, None]).T @ off
        places = (np.arange(self.n) + self.rng.uniform()) / self.n
        self.particles = self.particles[np.minimum(np.searchsorted(self.weights.cumsum(), places), self.n - 1)]
        self.weights = np.full(self.n, 1 / self.n)
        noise, proposed = self.rng.normal(size=self.particles.shape), self.particles.copy()
        for block in BLOCKS:
            part = covariance[np.ix_(block, block)]
            factor = np.linalg.cholesky(part + 1e-5 * np.diag(np.diag(part)) + 1e-10 * np.eye(len(block)))
            proposed[:, block] += width * noise[:, block] @ factor.T
        inside = (proposed[:, :2] >= 0) & (proposed[:, :2] <= 25)
        possible = np.all(np.concatenate([inside, proposed[:, [2, 3, 4]] >= 0, proposed[:, 6:] > 0], axis=-1), axis=-1)
        proposed = np.where(possible[:, None], proposed, self.particles)
        old = self.likelihood(self.plume(self.particles, self.position), reading)
        new = self.likelihood(self.plume(proposed, self.position), reading)
        accepted = possible & (self.rng.uniform(size=self.n) < new / old * np.exp(-0.5 * (noise**2).sum(-1)))
        self.particles = np.where(accepted[:, None], proposed, self.particles)


def one_at_a_time(particles: int, searches: int, steps: int, plan: str) -> None:
    """``searches`` one after the other."""
    draw = np.random.default_rng(0)
    for seed in range(searches):
        search = NumpySearch(particles, 25, seed)
        choose = {"none": lambda: int(draw.integers(4)), "numpy": search.plan, "loops": search.plan_by_loops}[plan]
        for _ in range(steps):
            search.step(choose())


PUBLISHED = {"move": "reading", "move_steps": 1}
OURS = BeliefConfig(particles=300)
"""The filter of jobs/agdc."""


def together(settings: BeliefConfig, searches: int, steps: int, planner: str) -> None:
    """``searches`` in one batch."""
    core = SourceTermBatch(CONFIG, searches)
    belief, everyone = SourceBelief(settings, CONFIG, searches), torch.ones(searches, dtype=torch.bool)
    policy = PLANNERS.get(planner)(seed=0)
    belief.reset(everyone, core.reset(seeds=list(range(searches))))
    features = torch.zeros(searches, 0)
    for _ in range(steps):
        belief.update(everyone, core.step(policy.act(View(core, belief, features))).observation)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=256, help="in the batch")
    parser.add_argument("--alone", type=int, default=8, help="of the other side, whose steps a second do not depend on their number")
    parser.add_argument("--particles", type=int, default=500, help="of both sides")
    parser.add_argument("--steps", type=int, default=40, help="of each search")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, in turns")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    published = BeliefConfig.model_validate({"particles": args.particles, **PUBLISHED})
    for name, planner, others in (("filter", "random", ("none",)), ("infotaxis", "infotaxis", ("numpy", "loops"))):
        sides: dict[str, Callable[[], None]] = {"batch": partial(together, published, args.searches, args.steps, planner)}
        sides |= {other: partial(one_at_a_time, args.particles, args.alone, args.steps, other) for other in others}
        seconds = alternate(sides, args.repeats)
        rates = {
            side: [(args.searches if side == "batch" else args.alone) * args.steps / s for s in found] for side, found in seconds.items()
        }
        figures[f"{name}_steps_per_s_in_a_batch"] = rates["batch"]
        for other in others:
            label = {"none": "in_numpy", "numpy": "in_numpy", "loops": "in_numpy_by_loops"}[other]
            figures |= {f"{name}_steps_per_s_{label}": rates[other], f"{name}_speedup_over_{label}": ratios(rates["batch"], rates[other])}
    ours = {name: partial(together, OURS, args.searches, args.steps, name) for name in ("random", "infotaxis", "entrotaxis", "dcee")}
    for name, found in alternate(ours, args.repeats).items():
        figures[f"own_filter_with_{name}_steps_per_s_in_a_batch"] = [args.searches * args.steps / seconds for seconds in found]
    record("agdc_throughput", settings={**vars(args), "threads": torch.get_num_threads()}, figures=figures)


if __name__ == "__main__":
    main()
