"""The search for an unknown number of objects as a problem of kind agdc: its exact posterior, and plain ways to search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from reasoner_ray.agents.agdc.cessation import BeliefSummary
from reasoner_ray.agents.agdc.problem import View
from reasoner_ray.agents.agdc.settings import AgdcConfig
from reasoner_ray.envs.object_search.environment import DIRECTIONS, FIRST, MOVES, ObjectSearch, ObjectSearchVector, floor_of
from reasoner_ray.envs.object_search.settings import ObjectSearchConfig
from reasoner_ray.envs.source_term.core import Step
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import Registry

SMALLEST_SPREAD = 0.05
"""Objects: of a belief that has no doubt left, so that its logarithm is finite and moderate."""
NEAR = 0.8
"""Weight of what is a move further away, in features and in ``Greedy``."""


class ObjectBelief:
    """A ``Belief``: the exact posterior over the objects that are not found yet, in float64.

    A priori each number of objects up to ``most`` is equally likely, and so is each set of cells of that number. An object that was in
    sight v times and not noticed has the likelihood w = (1 - detection)^v, so a set of r cells left after k finds has the posterior
    P(r, cells) ~ 1 / C(F, k + r) * product of their w: sums over sets are elementary symmetric polynomials e_r(w).
    """

    def __init__(self, config: ObjectSearchConfig, n: int) -> None:
        """``n`` episodes."""
        floor = floor_of(config.size, config.view)
        self._config, self.floor, self._cells = config, floor, len(floor.cells)
        self._moves, self._sees, self._far = (torch.as_tensor(part) for part in (floor.moves, floor.sees, floor.far))
        self._reach = NEAR ** self._far.double()
        self._index = torch.as_tensor(floor.index)
        self.weights = torch.ones(n, self._cells, dtype=torch.double)
        """w of each cell, [E, F]; 0 where an object was found."""
        self.found = torch.zeros(n, dtype=torch.long)
        self.pose = torch.zeros(n, dtype=torch.long)
        self._steps = torch.zeros(n, dtype=torch.long)
        self._log_sets = torch.tensor([math.log(math.comb(self._cells, k)) for k in range(config.most + 1)], dtype=torch.double)
        self.left = torch.zeros(n, config.most + 1, dtype=torch.double)
        """Probability that r objects are left, [E, most + 1]."""
        self.occupied = torch.zeros(n, self._cells, dtype=torch.double)
        """Probability that a cell holds an object that is not found yet, [E, F]."""
        self.n_features = 9 + 3 * len(MOVES)

    def reset(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Begin from the prior and an episode's first observation [E, 3 + 2 F]."""
        self.weights[mask], self.found[mask], self._steps[mask] = 1.0, 0, -1
        self.update(mask, observation)

    def update(self, mask: torch.Tensor, observation: torch.Tensor) -> None:
        """Take in what was in sight, and what was found; an observation with a number that is not finite says nothing.

        Raises ``ConfigError`` where more is found than there can be.
        """
        whole = torch.isfinite(observation).all(dim=-1)
        self._steps += mask & ~whole
        mask, observation = mask & whole, torch.where(whole[:, None], observation, 0.0)
        seen, hit = (part > 0.5 for part in observation[:, FIRST:].split(self._cells, dim=-1))
        column, row, direction = observation[:, :FIRST].long().unbind(-1)
        weights = torch.where(seen, self.weights * (1 - self._config.detection), self.weights).masked_fill(hit, 0.0)
        self.weights = torch.where(mask[:, None], weights, self.weights)
        self.found += hit.sum(-1) * mask
        if int(self.found.max()) > self._config.most:
            raise ConfigError(f"agdc.objects.most: {int(self.found.max())} objects were found where at most {self._config.most} can lie")
        self._steps += mask
        self.pose = torch.where(mask, self._index[column, row] * DIRECTIONS + direction, self.pose)
        self._infer()

    def _infer(self) -> None:
        most, w = self._config.most, self.weights
        sums = torch.zeros(len(w), most + 1, dtype=torch.double)  # e_0 to e_most
        sums[:, 0] = 1.0
        for cell in w.unbind(-1):
            sums[:, 1:] = sums[:, 1:] + cell[:, None] * sums[:, :-1]
        total = self.found[:, None] + torch.arange(most + 1)
        log_sets = self._log_sets[total.clamp_max(most)]
        joint = torch.where(total <= most, sums * torch.exp(-log_sets), 0.0)
        self.left = joint / joint.sum(-1, keepdim=True)
        without, occupied = torch.ones_like(w), torch.zeros_like(w)  # e_(r - 1) of all cells but one
        for r in range(1, most + 1):
            ratio = torch.where(sums[:, r, None] > 0, w * without / sums[:, r, None], 0.0)
            occupied += self.left[:, r, None] * ratio
            without = (sums[:, r, None] - w * without).clamp_min(0.0)
        self.occupied = occupied

    def summary(self) -> BeliefSummary:
        """Of the number of all objects; spread: over the cells; mass: that no object is left; evidence: finds and looks."""
        number = torch.arange(self.left.shape[-1], dtype=torch.double)
        expected = self.left @ number
        deviation = (self.left @ number.square() - expected.square()).clamp_min(0.0).sqrt()
        spread = (self.occupied * (1 - self.occupied)).clamp_min(0.0).sum(-1).sqrt() + SMALLEST_SPREAD
        evidence = torch.stack([self.found.float(), expected.float()], dim=-1)
        mean = (self.found + expected).float()
        return BeliefSummary(mean[:, None], deviation.float()[:, None], spread.float(), self.left[:, 0].float(), evidence)

    def prospects(self, near: torch.Tensor) -> torch.Tensor:
        """For each of ``MOVES``, [E, 3]: the expected objects left, each times ``near`` [poses, F] of its cell from the pose after it."""
        after = self._moves[self.pose]
        return (near[after] * self.occupied[:, None]).sum(-1)

    def features(self) -> torch.Tensor:
        """float32 [E, 18]: where the agent is and looks, what it has found, what may be left, and what each move is worth."""
        cells, poses = torch.as_tensor(self.floor.cells), self.pose
        place = 2 * cells[poses // DIRECTIONS] / (self._config.size - 1) - 1
        angle = (poses % DIRECTIONS) * (math.pi / 2)
        summary, expected = self.summary(), self.occupied.sum(-1, keepdim=True)
        per_object = expected.clamp_min(1e-9)
        columns = [
            place,
            torch.cos(angle)[:, None],
            torch.sin(angle)[:, None],
            self.found[:, None] / self._config.most,
            expected / self._config.most,
            self.left[:, :1],
            summary.log_spread()[:, None] / 3,
            self._steps[:, None] / self._config.max_steps,
            self.prospects(self._sees.double()) / per_object,
            self.prospects(self._reach) / per_object,
            self.prospects(self._reach.square()) / per_object,
        ]
        return torch.cat([column.float() for column in columns], dim=-1)


class ObjectSearches:
    """E episodes of ``ObjectSearch``, for evaluation."""

    def __init__(self, config: ObjectSearchConfig, n: int) -> None:
        """``n`` episodes."""
        self.envs, self.n = [ObjectSearch(config, render_mode="rgb_array") for _ in range(n)], n
        self.position = torch.zeros(n, 2)
        self.left = torch.zeros(n)
        """Objects that are not found, in truth."""
        self._shown = torch.zeros(n, FIRST + 2 * len(floor_of(config.size, config.view).cells))

    @property
    def distance(self) -> torch.Tensor:
        """Objects left."""
        return self.left

    def reset(self, mask: torch.Tensor | None = None, seeds: Sequence[int | None] | None = None) -> torch.Tensor:
        """Begin the episodes in ``mask``."""
        for i in range(self.n) if mask is None else mask.nonzero().flatten().tolist():
            shown, info = self.envs[i].reset(seed=None if seeds is None else seeds[i])
            self._shown[i], self.left[i] = torch.as_tensor(shown), info["left"]
        self.position = self._shown[:, :2].clone()
        return self._shown.clone()

    def step(self, actions: torch.Tensor) -> Step:
        """A step of all."""
        before, truncated = self.position, torch.zeros(self.n, dtype=torch.bool)
        for i, action in enumerate(actions.tolist()):
            shown, _, _, truncated[i], info = self.envs[i].step(action)
            self._shown[i], self.left[i] = torch.as_tensor(shown), info["left"]
        self.position = self._shown[:, :2].clone()
        return Step(self._shown.clone(), -torch.ones(self.n), truncated, (self.position - before).abs().sum(-1))

    def observe(self) -> torch.Tensor:
        """float32 [E, 3 + 2 F]."""
        return self._shown.clone()


OBJECT_PLANNERS: Registry[type] = Registry("planner", "agdc.policy")


@OBJECT_PLANNERS.register("random")
class RandomMoves:
    """A uniform move."""

    def __init__(self, seed: int = 0) -> None:
        """Repeatable by ``seed``."""
        self._stream = torch.Generator().manual_seed(seed)

    def act(self, view: View) -> torch.Tensor:
        """Any move."""
        return torch.randint(len(MOVES), (view.search.n,), generator=self._stream)


@OBJECT_PLANNERS.register("coverage")
class Coverage:
    """A sweep: on the shortest way to a cell that was looked at least often, until each was looked at equally often, and again."""

    def __init__(self, seed: int = 0) -> None:
        pass

    def act(self, view: View) -> torch.Tensor:
        """The move after which the nearest such cell is the fewest moves away."""
        belief: ObjectBelief = view.belief
        least = belief.weights >= belief.weights.amax(-1, keepdim=True)
        far = torch.as_tensor(belief.floor.far)[torch.as_tensor(belief.floor.moves)[belief.pose]]  # [E, 3, F]
        return far.masked_fill(~least[:, None], far.max() + 1).amin(-1).argmin(-1)


@OBJECT_PLANNERS.register("greedy")
class Greedy:
    """Where the belief expects most, soonest: the largest sum of the cells' probabilities, each times ``NEAR`` ^ moves until in sight."""

    def __init__(self, seed: int = 0) -> None:
        pass

    def act(self, view: View) -> torch.Tensor:
        """The best move."""
        belief: ObjectBelief = view.belief
        return belief.prospects(NEAR ** torch.as_tensor(belief.floor.far).double()).argmax(-1)


class ObjectSearchProblem:
    """The estimate of an agent that ends its search is that no object is left; its error: how many are."""

    planners = OBJECT_PLANNERS

    def __init__(self, agdc: AgdcConfig) -> None:
        self._config, self.max_steps = agdc.objects, agdc.objects.max_steps

    def vector(self, n: int) -> ObjectSearchVector:
        """The Gymnasium environment."""
        return ObjectSearchVector(n, self._config)

    def search(self, n: int) -> ObjectSearches:
        """For evaluation."""
        return ObjectSearches(self._config, n)

    def belief(self, n: int) -> ObjectBelief:
        """Exact posteriors."""
        return ObjectBelief(self._config, n)

    def plain(self, observation: torch.Tensor) -> torch.Tensor:
        """Place, direction, cells in sight and finds."""
        scale = torch.tensor([self._config.size - 1, self._config.size - 1, DIRECTIONS - 1])
        return torch.cat([2 * observation[:, :FIRST] / scale - 1, observation[:, FIRST:]], dim=-1).float()

    def action(self, chosen: torch.Tensor) -> torch.Tensor:
        """Indices of moves."""
        return chosen.long().reshape(-1)

    def error(self, search: ObjectSearches, summary: BeliefSummary) -> torch.Tensor:
        """Objects left."""
        return search.left.clone()

    def picture(self, search: ObjectSearches, belief: ObjectBelief, way: torch.Tensor, title: str) -> np.ndarray:
        """The rooms with what is in sight; beside them, where the belief still expects objects and the way so far."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        expected = np.full((self._config.size, self._config.size), np.nan)
        expected[tuple(belief.floor.cells.T)] = belief.occupied[0].numpy()
        figure = Figure(figsize=(7.2, 3.8), layout="constrained", dpi=80)
        canvas = FigureCanvasAgg(figure)
        rooms, map_ = figure.subplots(1, 2)
        rooms.imshow(search.envs[0].render())
        map_.imshow(expected.T, cmap="Blues", vmin=0, vmax=max(0.1, float(np.nanmax(expected))))
        map_.plot(way[:, 0], way[:, 1], color="#D55E00", linewidth=1.4)
        rooms.set_title(title, fontsize=9)
        map_.set_title(f"{int(belief.found[0])} found, {float(belief.left[0, 0]):.0%} sure that none is left", fontsize=9)
        for axes in (rooms, map_):
            axes.set_axis_off()
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
