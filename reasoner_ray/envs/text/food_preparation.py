"""Food Preparation: carry a thing to an appliance, open it, put the thing in, close it (VirtualHome's task in TWOSOME and POAD).

Rebuilt from its rules as a finite state machine. A state is (room, held, near the thing, near the appliance, appliance open,
thing inside); only the kitchen has anything to see. 28 of them can be reached; the original counts 45, some of which differ in nothing that
can be seen or done.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from reasoner_ray.envs.text.base import FiniteEnvironment, Machine, Outcome, Rules
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import suggest

KITCHEN, LIVING_ROOM, BATHROOM, BEDROOM = range(4)
ROOMS = ("kitchen", "living room", "bathroom", "bedroom")
GO = {0: LIVING_ROOM, 1: KITCHEN, 2: BATHROOM, 3: BEDROOM}  # action -> room
TO_THING, TO_APPLIANCE, GRAB, PUT, OPEN, CLOSE = range(4, 10)


class Wording(NamedTuple):
    """What the thing and the appliance are called, and what is done to it."""

    thing: str
    appliance: str
    goal: str = "heat up"


WORDINGS = {
    "pancake": Wording("pancake", "microwave"),
    "cheese": Wording("cheese", "microwave"),
    "hamburger": Wording("hamburger", "microwave"),
    "apple pie": Wording("apple pie", "microwave"),
    "pizza": Wording("pizza", "microwave"),
    "dishes": Wording("dishes", "dishwasher", "wash"),
    "laundry": Wording("laundry", "washing machine", "wash"),
}
"""The first is the one to train on."""


class State(NamedTuple):
    """The hidden state. ``near_*``: standing next to it."""

    room: int = KITCHEN
    held: bool = False
    near_thing: bool = False
    near_appliance: bool = False
    open: bool = False
    inside: bool = False

    @property
    def visible(self) -> bool:
        """Whether the thing can be seen."""
        return self.held or (self.room == KITCHEN and (not self.inside or self.open))

    @property
    def done(self) -> bool:
        """The goal: in the kitchen, and the thing shut away in the appliance."""
        return self.room == KITCHEN and not self.visible

    def admissible(self) -> tuple[int, ...]:
        """Numbers of the actions that the environment offers; never none."""
        if self.room != KITCHEN:
            return tuple(action for action, room in GO.items() if room != self.room)
        others = (0, 2, 3)
        if self.held:
            return (*others, TO_THING, PUT, OPEN, CLOSE) if self.near_appliance else (*others, TO_THING, TO_APPLIANCE)
        if self.near_thing and self.near_appliance:
            return (*others, OPEN, CLOSE) if self.open else (*others, CLOSE)
        if self.near_thing:
            return (*others, TO_APPLIANCE, GRAB)
        return (*others, TO_THING, OPEN, CLOSE) if self.near_appliance else (*others, TO_THING, TO_APPLIANCE)

    def after(self, action: int) -> State:
        """The next state; an action without effect keeps it."""
        if action in GO:
            return self._replace(room=GO[action], near_thing=self.held, near_appliance=False)
        if action == TO_THING:
            return self._replace(near_thing=True, near_appliance=self.inside)
        if action == TO_APPLIANCE:
            return self._replace(near_appliance=True, near_thing=self.held or self.inside)
        if action == GRAB and self.near_thing and (self.open or not self.inside):
            return self._replace(held=True, inside=False)
        if action == PUT and self.held and self.near_appliance and self.open:
            return self._replace(held=False, inside=True)
        if action in (OPEN, CLOSE) and self.near_appliance:
            return self._replace(open=action == OPEN)
        return self


class FoodRules(Rules[State, State]):
    """The machine in the words of ``wording``. An action is laid out as the state it leads to."""

    start = State()

    def __init__(self, wording: Wording) -> None:
        self.wording = wording

    def actions(self, state: State) -> dict[str, State]:
        """The admissible ones, in the order of their numbers in ``State.admissible``."""
        return {_action(self.wording, action): state.after(action) for action in state.admissible()}

    def outcome(self, state: State, action: State, budget: int) -> Outcome[State]:
        """A reward of 1 at the goal, else none."""
        return Outcome(action, float(action.done), action.done)

    def observe(self, state: State) -> str:
        """Only the kitchen has anything to see."""
        return _observation(self.wording, state)


@cache
def _machine(wording: Wording) -> Machine[State, State]:
    return Machine(FoodRules(wording))


def _action(wording: Wording, action: int) -> str:
    if action in GO:
        return f"walk to the {ROOMS[GO[action]]}"
    return {
        TO_THING: f"walk to the {wording.thing}",
        TO_APPLIANCE: f"walk to the {wording.appliance}",
        GRAB: f"pick up the {wording.thing}",
        PUT: f"put the {wording.thing} in the {wording.appliance}",
        OPEN: f"open the {wording.appliance}",
        CLOSE: f"close the {wording.appliance}",
    }[action]


def _observation(wording: Wording, state: State) -> str:
    thing, appliance, goal = wording
    says = [
        "There are four rooms: the kitchen, bathroom, bedroom, and living room.",
        f"The task is to {goal} the {thing} in the {appliance}.",
        f"You are in the {ROOMS[state.room]}.",
    ]
    if state.room == KITCHEN:
        seen = f" and the {thing}" if state.visible and not state.held else ""
        says.append(f"You notice the {appliance}{seen}.")
    if state.held:
        says.append(f"You are holding the {thing}.")
    elif state.near_thing and state.visible:
        says.append(f"You are next to the {thing}.")
    if state.near_appliance:
        says.append(f"You are next to the {appliance}.")
    if state.room == KITCHEN:
        says.append(f"The {appliance} is {'open' if state.open else 'closed'}.")
        if state.inside and state.open:
            says.append(f"The {thing} is in the {appliance}.")
    return " ".join([*says, "Your next step is to"])


class FoodPreparation(FiniteEnvironment[State, State]):
    """Heat up a pancake in the microwave, or its like in another ``wording`` (see ``WORDINGS``).

    Reward 1 when the thing is shut away in the appliance, which ends the episode; 50 actions cut it. The shortest way takes
    six: a discounted return of 0.95^5 = 0.7738. An action outside ``info["admissible"]`` keeps the state and costs its time.
    """

    limit = 50
    discount = 0.95

    def __init__(self, wording: str = "pancake") -> None:
        """Raises ``ConfigError`` for an unknown wording."""
        if wording not in WORDINGS:
            raise ConfigError(f"task.args.kwargs.wording: unknown wording {wording!r}; {suggest(wording, list(WORDINGS))}")
        super().__init__(_machine(WORDINGS[wording]))
