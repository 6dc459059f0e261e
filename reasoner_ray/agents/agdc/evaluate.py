"""How well a policy searches: does it stop, is it right when it does, how far did it walk. Episodes are fixed by their seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reasoner_ray.agents.agdc.cessation import CessationRule
from reasoner_ray.agents.agdc.detection import GoalDetector
from reasoner_ray.agents.agdc.problem import Policy, Problem, View
from reasoner_ray.agents.agdc.settings import FeedbackConfig
from reasoner_ray.seeds import LOOK, derived_seed

FIRST_SEED = 1_000_000
"""Of evaluation: training episodes never begin from these."""
CALIBRATION_SEED = 2_000_000
"""Of the episodes that a probability of being right is fitted to."""
_QUANTILE = 1.959964


@dataclass(frozen=True, slots=True)
class Searches:
    """What became of n episodes. Lengths and errors are in the problem's unit: of SourceTerm m; of ObjectSearch cells and objects."""

    stopped: torch.Tensor  # bool [n]; by the agent
    error: torch.Tensor  # float32 [n]; of the estimate at the end
    steps: torch.Tensor  # int64 [n]
    travelled: torch.Tensor  # float32 [n]
    distance: torch.Tensor  # float32 [n]; of the agent to the goal at the end
    evidence: torch.Tensor  # float32 [n, C]; what `Calibrated` reads, at a random time of the episode
    evidence_error: torch.Tensor  # float32 [n]; of the estimate at that time
    faults: dict[str, int]  # what the detector and the beliefs count as out of order
    believed: bool = True  # the policy has a belief, so that the estimate is its own

    @staticmethod
    def join(parts: list[Searches]) -> Searches:
        """All of ``parts``."""
        names = [name for name in Searches.__dataclass_fields__ if name not in ("faults", "believed")]
        faults = {name: sum(part.faults[name] for part in parts) for name in parts[0].faults}
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return Searches(**whole, faults=faults, believed=all(part.believed for part in parts))


@dataclass(frozen=True, slots=True)
class Arena:
    """Where policies are compared."""

    problem: Problem
    rule: CessationRule
    feedback: FeedbackConfig
    tolerance: float
    at_once: int = 256
    believed: bool = True
    """The policies that are compared have a belief (``agdc.detect``)."""

    def run(self, policy: Policy, episodes: int, first_seed: int = FIRST_SEED) -> Searches:
        """Play the episodes of seeds ``first_seed``, ``first_seed + 1``, ..."""
        parts = []
        for first in range(first_seed, first_seed + episodes, self.at_once):
            seeds = list(range(first, min(first + self.at_once, first_seed + episodes)))
            parts.append(self._play(policy, seeds))
        return Searches.join(parts)

    def _play(self, policy: Policy, seeds: list[int]) -> Searches:
        n = len(seeds)
        search, belief = self.problem.search(n), self.problem.belief(n)
        detector = GoalDetector(belief, self.rule, self.feedback, n)
        detector.seed(seeds[0])
        active = torch.ones(n, dtype=torch.bool)
        features = detector.begin(active, search.reset(seeds=list(seeds)))
        stopped, travelled = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
        error, distance, steps = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.long)
        looks = torch.Generator().manual_seed(derived_seed(seeds[0], LOOK))
        look = torch.randint(1, self.problem.max_steps + 1, (n,), generator=looks)
        evidence, evidence_error = torch.zeros(n, 0), torch.zeros(n)
        while bool(active.any()):
            step = search.step(policy.act(View(search, belief, features)))
            found = detector.advance(active, step.observation)
            features, summary = found.features, belief.summary()
            travelled += step.travelled.cpu() * active  # a search may be on a GPU; what is kept of it is not
            steps += active
            off = self.problem.error(search, summary).cpu()
            error, distance = torch.where(active, off, error), torch.where(active, search.distance.cpu(), distance)
            vector = summary.evidence_vector().cpu()
            evidence = torch.where((active & (steps <= look))[:, None], vector, evidence if evidence.shape[1] else vector)
            evidence_error = torch.where(active & (steps <= look), off, evidence_error)
            stopped |= found.ceased
            active &= ~(found.ceased | step.truncated.cpu())
        faults = detector.faults()
        return Searches(stopped, error, steps, travelled, distance, evidence, evidence_error, faults, self.believed)


def search_metrics(searches: Searches, tolerance: float) -> dict[str, float]:
    """Shares and means with 95 % intervals (``_low``, ``_high``): Wilson's for shares, the normal one for means.

    ``stop_rate``: the agent ended the episode; ``correct_stops``: of those, the estimate's error was at most ``tolerance``;
    ``success``: stopped, and correct; ``wrong_stops``: stopped and not correct, a share of all; ``right``: the estimate's error was at
    most ``tolerance`` when the episode ended, stopped or not, which is what agents that never stop can reach (absent where the policy has
    no belief); ``error``, ``distance`` (travelled), ``steps``, ``final_distance`` (of the agent to the goal when the episode ended): means
    over all episodes; ``belief_*``: totals of what is counted as out of order.
    """
    right = searches.error <= tolerance
    n, stops = len(right), int(searches.stopped.sum())
    success = int((searches.stopped & right).sum())
    figures: dict[str, float] = {"episodes": float(n)}
    for name, hits, total in (
        ("stop_rate", stops, n),
        ("correct_stops", success, stops),
        ("success", success, n),
        ("wrong_stops", stops - success, n),
    ):
        figures |= _share(name, hits, total)
    if searches.believed:
        figures |= _share("right", int(right.sum()), n)
    figures |= {f"belief_{name}": float(total) for name, total in searches.faults.items()}
    means = {"error": searches.error, "distance": searches.travelled, "steps": searches.steps.float(), "final_distance": searches.distance}
    for name, values in means.items():
        figures |= _mean(name, values)
    return figures


def _share(name: str, hits: int, total: int) -> dict[str, float]:
    """Wilson's interval; without a single trial the share is unknown and left out."""
    if not total:
        return {}
    share, z = hits / total, _QUANTILE
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return {name: share, f"{name}_low": max(0.0, middle - half), f"{name}_high": min(1.0, middle + half)}


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    mean, n = float(values.mean()), len(values)
    half = _QUANTILE * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
