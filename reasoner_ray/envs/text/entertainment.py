"""Entertainment: bring chips and milk to the living room, switch the TV on and sit down (VirtualHome's task in TWOSOME and POAD).

Rebuilt from its description as a finite state machine; published are the features, the actions, the goal and some figures,
not the transitions and admissible lists. Of several readings this one was chosen because it meets the figures for
observations (92), the shortest way (11 actions) and a random policy (success 0.17 %, return 0.0002).
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from reasoner_ray.envs.text.base import FiniteEnvironment, Machine, Outcome, Rules

Room = Literal["living room", "kitchen", "bathroom", "bedroom"]
Where = Literal["kitchen", "hand", "coffee table"]

ROOMS: tuple[Room, ...] = ("living room", "kitchen", "bathroom", "bedroom")
ITEMS = ("chips", "milk")
FURNITURE = ("coffee table", "TV", "sofa")


class State(NamedTuple):
    """The hidden state."""

    room: Room = "kitchen"
    things: tuple[Where, ...] = ("kitchen", "kitchen")  # where each of ITEMS is
    near: str = ""  # one of ITEMS or FURNITURE, or nothing
    tv_on: bool = False
    sitting: bool = False  # on the sofa, which faces the TV

    @property
    def done(self) -> bool:
        """The goal: on the sofa in front of a TV that is on, chips and milk in the hand or on the table."""
        return self.sitting and self.tv_on and "kitchen" not in self.things

    def those(self, where: Where) -> list[str]:
        """The things that are there."""
        return [item for item, place in zip(ITEMS, self.things, strict=True) if place == where]

    def moved(self, item: str, where: Where) -> State:
        """The state with a thing elsewhere."""
        places = zip(ITEMS, self.things, strict=True)
        return self._replace(things=tuple(where if name == item else place for name, place in places))


class EntertainmentRules(Rules[State, State]):
    """An action is laid out as the state it leads to."""

    start = State()

    def actions(self, state: State) -> dict[str, State]:
        """What can be of use now. Things stay on the table once they are there; who sits must stand up first."""
        if state.sitting:
            return {"stand up from the sofa": state._replace(sitting=False)}
        found = {f"walk to the {room}": state._replace(room=room, near="") for room in ROOMS if room != state.room}
        if state.room == "kitchen":
            for item in state.those("kitchen"):
                if state.near == item:
                    found[f"pick up the {item}"] = state.moved(item, "hand")._replace(near="")
                else:
                    found[f"walk to the {item}"] = state._replace(near=item)
        elif state.room == "living room":
            found.update(self._in_living_room(state))
        return found

    def _in_living_room(self, state: State) -> dict[str, State]:
        carried = state.those("hand")
        useful = {"coffee table": len(state.those("kitchen")) < len(ITEMS), "TV": True, "sofa": state.tv_on}
        found = {f"walk to the {spot}": state._replace(near=spot) for spot in FURNITURE if useful[spot] and spot != state.near}
        if state.near == "coffee table":
            found.update({f"put the {item} on the coffee table": state.moved(item, "coffee table") for item in carried})
        elif len(carried) < len(ITEMS):  # switching and sitting down take a free hand
            if state.near == "TV":
                found.update({f"turn {word} the TV": state._replace(tv_on=on) for word, on in (("on", True), ("off", False))})
            elif state.near == "sofa":
                found["sit down on the sofa"] = state._replace(sitting=True)
        return found

    def outcome(self, state: State, action: State, budget: int) -> Outcome[State]:
        """A reward of 1 at the goal, else none."""
        return Outcome(action, float(action.done), action.done)

    def observe(self, state: State) -> str:
        """What the published features tell: only the room one is in can be seen."""
        says = [
            "There are four rooms: the kitchen, bathroom, bedroom, and living room.",
            "The task is to enjoy the chips and the milk in front of the TV.",
            f"You are in the {state.room}.",
        ]
        if state.room == "kitchen" and (here := state.those("kitchen")):
            says.append(f"You notice the {' and the '.join(here)}.")
        if carried := state.those("hand"):
            says.append(f"You are holding the {' and the '.join(carried)}.")
        if state.room == "living room":
            says.append("You notice the coffee table, the TV and the sofa.")
            if served := state.those("coffee table"):
                says.append(f"The coffee table holds the {' and the '.join(served)}.")
            says.append(f"The TV is {'on' if state.tv_on else 'off'}.")
        if state.sitting:
            says.append("You are sitting on the sofa.")
        elif state.near:
            says.append(f"You are next to the {state.near}.")
        return " ".join([*says, "Your next step is to"])


@cache
def _machine() -> Machine[State, State]:
    return Machine(EntertainmentRules())


class Entertainment(FiniteEnvironment[State, State]):
    """Sit in front of the running TV with chips and milk at hand.

    Reward 1 at the goal, which ends the episode; 50 actions cut it. The shortest way takes eleven: a discounted return of
    0.95^10 = 0.5987.
    """

    limit = 50
    discount = 0.95

    def __init__(self) -> None:
        super().__init__(_machine())
