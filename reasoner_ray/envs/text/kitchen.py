"""The kitchen of the Overcooked tasks: its cells, what a cook's single steps do there, and the way across it.

One cook on a floor that counters enclose. Bumping into a counter is how things are taken, put down, chopped and served.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Cell = tuple[int, int]
"""Row and column."""
Place = Cell | Literal["hand", "bowl"]
"""Where a thing is: on a counter or board, held, or (an ingredient) in the bowl."""

MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0))
CHOPS = 3
"""Bumps that chop an ingredient."""
SYMBOLS = {"t": "tomato", "l": "lettuce", "o": "onion", "u": "bowl"}


class Ingredient(NamedTuple):
    """Where an ingredient is, and how often it was cut; ``CHOPS`` cuts make it chopped."""

    place: Place
    cuts: int = 0


class State(NamedTuple):
    """The hidden state. The cook remembers where things are: nobody else moves them, so the map it walks by is right."""

    cook: Cell
    ingredients: tuple[Ingredient, ...]  # in the order of ``Kitchen.names``
    bowl: Place  # a cell or the hand

    @property
    def held(self) -> int | None:
        """The ingredient in the hand, by its number."""
        return next((i for i, ingredient in enumerate(self.ingredients) if ingredient.place == "hand"), None)

    @property
    def empty_handed(self) -> bool:
        """Whether nothing is held."""
        return self.bowl != "hand" and self.held is None

    def lying_at(self, cell: Cell) -> int | None:
        """The ingredient that lies there by itself."""
        return next((i for i, ingredient in enumerate(self.ingredients) if ingredient.place == cell), None)

    def with_ingredient(self, i: int, place: Place, cuts: int | None = None) -> State:
        """The state with one ingredient elsewhere, or cut ``cuts`` times."""
        changed = Ingredient(place, self.ingredients[i].cuts if cuts is None else cuts)
        return self._replace(ingredients=(*self.ingredients[:i], changed, *self.ingredients[i + 1 :]))


class Tick(NamedTuple):
    """What one step led to."""

    state: State
    reward: float = 0.0
    served: bool = False


@dataclass(frozen=True)
class Kitchen:
    """A map and a dish: how the world answers to single steps. ``recipe`` holds numbers of ``names``."""

    floor: frozenset[Cell]
    boards: tuple[Cell, ...]
    delivery: Cell
    names: tuple[str, ...]
    recipe: frozenset[int]
    start: State

    @classmethod
    def read(cls, rows: Sequence[str], recipe: Sequence[str]) -> Kitchen:
        """From a map: ``.`` floor, ``@`` the cook, ``#`` counter, ``b`` board, ``*`` delivery, and the things of ``SYMBOLS``."""
        cells: dict[str, list[Cell]] = {}
        for x, row in enumerate(rows):
            for y, symbol in enumerate(row):
                cells.setdefault(SYMBOLS.get(symbol, symbol), []).append((x, y))
        names = tuple(name for name in SYMBOLS.values() if name in cells and name != "bowl")
        (cook,), (delivery,), (bowl,) = cells["@"], cells["*"], cells["bowl"]
        start = State(cook, tuple(Ingredient(cells[name][0]) for name in names), bowl)
        floor = frozenset([*cells["."], cook])
        return cls(floor, tuple(cells["b"]), delivery, names, frozenset(names.index(name) for name in recipe), start)

    def bump(self, state: State, cell: Cell, *, chopped: float, right: float, wrong: float) -> Tick:
        """Bump into a cell that is not floor. Rewards: ``chopped`` for an ingredient of the dish, ``right`` or ``wrong`` for serving."""
        if cell == self.delivery:
            return self._serve(state, right, wrong)
        lying, held = state.lying_at(cell), state.held
        if state.empty_handed:
            if lying is None:
                return Tick(state._replace(bowl="hand") if state.bowl == cell else state)
            if cell not in self.boards or state.ingredients[lying].cuts == CHOPS:
                return Tick(state.with_ingredient(lying, "hand"))
            cuts = state.ingredients[lying].cuts + 1
            return Tick(state.with_ingredient(lying, cell, cuts), chopped if cuts == CHOPS and lying in self.recipe else 0.0)
        into_bowl = lying if state.bowl == "hand" else held if state.bowl == cell else None
        if into_bowl is not None:
            is_chopped = state.ingredients[into_bowl].cuts == CHOPS
            return Tick(state.with_ingredient(into_bowl, "bowl") if is_chopped else state)
        if lying is not None:
            return Tick(state)
        return Tick(state._replace(bowl=cell) if held is None else state.with_ingredient(held, cell))

    def _serve(self, state: State, right: float, wrong: float) -> Tick:
        """Whatever is not the dish goes back to where it was at the start, uncut."""
        if state.empty_handed:
            return Tick(state)
        if state.bowl == "hand":
            if self.recipe == {i for i, ingredient in enumerate(state.ingredients) if ingredient.place == "bowl"}:
                return Tick(state, right, True)
            state = state._replace(bowl=self.start.bowl)
        back = (new if old.place in ("hand", "bowl") else old for old, new in zip(state.ingredients, self.start.ingredients, strict=True))
        return Tick(state._replace(ingredients=tuple(back)), wrong)

    def way(self, start: Cell, target: Cell) -> list[Cell]:
        """The floor cells from ``start`` (without it) to one next to ``target``, as few as possible (A*). Empty where it is next to it.

        Raises ``ValueError`` where there is no way.
        """
        waiting: list[tuple[int, int, Cell, list[Cell]]] = [(distance(start, target), 0, start, [])]
        seen = {start}
        while waiting:
            _, _, cell, path = heapq.heappop(waiting)
            if distance(cell, target) == 1:
                return path
            for move in MOVES:
                after = cell[0] + move[0], cell[1] + move[1]
                if after in self.floor and after not in seen:
                    seen.add(after)
                    estimate = len(path) + 1 + distance(after, target)
                    heapq.heappush(waiting, (estimate, len(seen), after, [*path, after]))
        raise ValueError(f"no way from {start} to {target}")


def distance(one: Cell, other: Cell) -> int:
    """Steps between two cells where nothing is in the way."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])
