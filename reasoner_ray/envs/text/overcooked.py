"""Overcooked's salads as text: macro actions that walk, take, chop and serve (gym-macro-overcooked's tasks in TWOSOME and POAD).

Rebuilt from the rules: a macro action runs to its end step by step, and is described by what it would do now. What the
cook does not see within two cells is left out of the observation; it walks by what it remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, Literal, NamedTuple

from reasoner_ray.envs.text.base import FiniteEnvironment, Machine, Outcome, Rules
from reasoner_ray.envs.text.kitchen import CHOPS, Cell, Kitchen, State, Tick, distance

DISCOUNT = 0.99
"""For each step, within a macro action too."""
STEP, CHOPPED, RIGHT_DISH, WRONG_DISH = -0.001, 0.2, 1.0, -0.1
SIGHT = 2
"""Rows and columns that the cook sees around it."""

TOMATO_SALAD = ("#####t#", "b...@.#", "#.....#", "*.....#", "#.....#", "#.....#", "#####u#")
TOMATO_LETTUCE_SALAD = ("#####t#", "b...@.l", "b.....o", "*.....#", "#.....#", "#.....#", "#####u#")


class Macro(NamedTuple):
    """A macro action. ``number`` is the ingredient's or the board's."""

    kind: Literal["ingredient", "bowl", "board", "deliver", "chop"]
    number: int = 0


class SaladRules(Rules[State, Macro]):
    """The kitchen as its macro actions and its descriptions present it."""

    def __init__(self, kitchen: Kitchen) -> None:
        """Everything at its place, nothing cut."""
        self.kitchen = kitchen
        self.start = kitchen.start

    def actions(self, state: State) -> dict[str, Macro]:
        """Every macro action, always; the words follow the state."""
        kitchen, held = self.kitchen, self._held(state)
        names = kitchen.names
        verb = "put the {} in the bowl" if state.bowl == "hand" else "pick up the {}"
        found = {verb.format(name): Macro("ingredient", i) for i, name in enumerate(names)}
        filled = any(ingredient.place == "bowl" for ingredient in state.ingredients)
        found["take the bowl" if filled else "take the empty bowl"] = Macro("bowl")
        for i in range(len(kitchen.boards)):
            found[f"put the {held} on the {self._board(i)}" if held else f"walk to the {self._board(i)}"] = Macro("board", i)
        found["serve the dish" if held else "serve nothing"] = Macro("deliver")
        cell = self._choppable(state)
        lying = None if cell is None else state.lying_at(cell)
        found["chop nothing" if lying is None else f"chop the {names[lying]}"] = Macro("chop")
        return found

    def outcome(self, state: State, action: Macro, budget: int) -> Outcome[State]:
        """Run a macro action: its reward is its steps' rewards, each discounted by the steps before it in the action."""
        reward, steps, tick = 0.0, 0, Tick(state)
        for tick in islice(self._run(state, action), budget):
            reward += DISCOUNT**steps * (tick.reward + STEP)
            steps += 1
        return Outcome(tick.state, reward, tick.served, steps)

    def refusal(self, state: State) -> Outcome[State]:
        """Standing still for a step."""
        return Outcome(state, STEP)

    def _run(self, state: State, macro: Macro) -> Iterator[Tick]:
        """The steps of a macro action: walk there, bump as long as it serves the purpose, or else stand still once."""
        cell = self._target(state, macro)
        way = [] if cell is None else self.kitchen.way(state.cook, cell)
        for step in way:
            state = state._replace(cook=step)
            yield Tick(state)
        bumps = 0
        while cell is not None and self._should_bump(state, macro, cell, bumps):
            tick = self.kitchen.bump(state, cell, chopped=CHOPPED, right=RIGHT_DISH, wrong=WRONG_DISH)
            yield tick
            state, bumps = tick.state, bumps + 1
            if tick.served:
                return
        if not way and not bumps:
            yield Tick(state)

    def _target(self, state: State, macro: Macro) -> Cell | None:
        """The cell to bump into; None where there is nothing to walk to."""
        if macro.kind == "chop":
            return self._choppable(state)
        if macro.kind == "board":
            return self.kitchen.boards[macro.number]
        if macro.kind == "deliver":
            return self.kitchen.delivery
        place = state.bowl if macro.kind == "bowl" else state.ingredients[macro.number].place
        place = state.bowl if place == "bowl" else place
        return place if isinstance(place, tuple) else None

    def _should_bump(self, state: State, macro: Macro, cell: Cell, bumps: int) -> bool:
        if macro.kind == "chop":
            return self._choppable(state) == cell
        if macro.kind == "board":
            return not bumps and not state.empty_handed
        if macro.kind == "bowl":  # a second time to take it, after what was held has gone into it
            return not bumps or (state.empty_handed and state.bowl == cell)
        if macro.kind == "ingredient":  # not if that took the whole bowl, or began to chop
            lies_there = state.ingredients[macro.number].place == cell
            return not bumps and lies_there and not (state.empty_handed and self._uncut_on_board(state, cell))
        return not bumps

    def _choppable(self, state: State) -> Cell | None:
        """The board in front of the cook whose ingredient it could chop now."""
        if not state.empty_handed:
            return None
        return next((b for b in self.kitchen.boards if distance(state.cook, b) == 1 and self._uncut_on_board(state, b)), None)

    def _uncut_on_board(self, state: State, cell: Cell) -> bool:
        lying = state.lying_at(cell)
        return cell in self.kitchen.boards and lying is not None and state.ingredients[lying].cuts < CHOPS

    def observe(self, state: State) -> str:
        """What the cook sees around it, what it holds, and what it is to serve."""
        kitchen = self.kitchen
        says = [f"This kitchen has {_listed([f'a {self._board(i)}' for i in range(len(kitchen.boards))])}."]
        if seen := self._seen_on_tables(state):
            says.append(f"You see {_listed(seen)} on {'the table' if len(seen) == 1 else 'different tables'}.")
        for i, cell in enumerate(kitchen.boards):
            if self._sees(state, cell) and (thing := self._thing_at(state, cell)):
                says.append(f"On the {self._board(i)} lies {thing}.")
        fronts = [self._board(i) for i, cell in enumerate(kitchen.boards) if distance(state.cook, cell) == 1]
        where = f"stand in front of the {fronts[0]} and " if fronts else ""
        says.append(f"You {where}{self._hands(state)}.")
        dish = " and ".join(f"chopped {kitchen.names[i]}" for i in sorted(kitchen.recipe))
        return " ".join([*says, f"To serve a bowl with {dish} and nothing else, you should first"])

    def _seen_on_tables(self, state: State) -> list[str]:
        """Things in sight that lie where they were at the start."""
        found = [
            f"{'an' if name == 'onion' else 'a'} {name}"
            for name, now, origin in zip(self.kitchen.names, state.ingredients, self.start.ingredients, strict=True)
            if now.place == origin.place and self._sees(state, now.place)
        ]
        return found + (["a bowl"] if state.bowl == self.start.bowl and self._sees(state, state.bowl) else [])

    def _thing_at(self, state: State, cell: Cell) -> str | None:
        if state.bowl == cell:
            return self._bowl(state)
        lying = state.lying_at(cell)
        return None if lying is None else self._ingredient(state, lying)

    def _hands(self, state: State) -> str:
        if state.empty_handed:
            return "carry nothing"
        return f"carry {self._bowl(state) if state.held is None else self._ingredient(state, state.held)}"

    def _ingredient(self, state: State, i: int) -> str:
        return f"{'a chopped' if state.ingredients[i].cuts == CHOPS else 'an unchopped'} {self.kitchen.names[i]}"

    def _bowl(self, state: State) -> str:
        inside = [f"chopped {self.kitchen.names[i]}" for i, ingredient in enumerate(state.ingredients) if ingredient.place == "bowl"]
        return f"a bowl with {_listed(inside)}" if inside else "an empty bowl"

    def _held(self, state: State) -> str | None:
        if state.bowl == "hand":
            return "bowl"
        return None if state.held is None else self.kitchen.names[state.held]

    def _board(self, i: int) -> str:
        return "cutting board" if len(self.kitchen.boards) == 1 else f"{('first', 'second')[i]} cutting board"

    @staticmethod
    def _sees(state: State, place: Any) -> bool:
        return isinstance(place, tuple) and max(abs(place[0] - state.cook[0]), abs(place[1] - state.cook[1])) <= SIGHT


def _listed(things: Sequence[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)


@cache
def _machine(rows: tuple[str, ...], recipe: tuple[str, ...]) -> Machine[State, Macro]:
    return Machine(SaladRules(Kitchen.read(rows, recipe)))


class Salad(FiniteEnvironment[State, Macro]):
    """A salad's environment: 200 steps, of which a macro action takes one or more (``info["steps_taken"]``).

    -0.001 a step, +0.2 for each ingredient of the dish that is chopped, +1 for the right dish, which ends the episode,
    -0.1 for a wrong one, which goes back to where it came from. An action outside the list stands still for a step.
    """

    limit = 200
    discount = DISCOUNT

    def _metrics(self) -> dict[str, float]:
        return {**super()._metrics(), "primitive_steps": self._elapsed}


class TomatoSalad(Salad):
    """A bowl of chopped tomato: six macro actions, 28 steps, a discounted return of 0.9205."""

    def __init__(self) -> None:
        super().__init__(_machine(TOMATO_SALAD, ("tomato",)))


class TomatoLettuceSalad(Salad):
    """A bowl of chopped tomato and lettuce, with an onion in the way: ten macro actions, 45 steps, a return of 0.9477."""

    def __init__(self) -> None:
        super().__init__(_machine(TOMATO_LETTUCE_SALAD, ("tomato", "lettuce")))
