"""Game of 24: four cards, each used once, must make 24 (format of steps: Tree of Thoughts, arXiv:2305.10601)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

from reasoner_ray.data.generated import GeneratedTask
from reasoner_ray.data.number_games import check_lines, is_reachable, solve
from reasoner_ray.data.tasks import Item, is_held_out, register_task, stable_hash
from reasoner_ray.errors import ConfigError

TARGET, CARDS, HIGHEST = 24, 4, 13
INSTRUCTION = (
    "Make the target of the numbers, each used exactly once, with + - * / and brackets. Write one operation a line, with the numbers "
    "that are then left, and the whole expression at the end, like this:\n"
    "6 - 1 = 5 (left: 2 4 5)\n5 * 4 = 20 (left: 2 20)\n..."
    "\nThe answer is EXPRESSION = TARGET"
)


def write_question(numbers: Sequence[int], target: int) -> str:
    """A game's question: ``Numbers: 1 1 4 6 Target: 24``."""
    return f"Numbers: {' '.join(map(str, numbers))} Target: {target}"


@register_task("game24")
class Game24Task(GeneratedTask):
    """All 1,362 hands of four cards from 1 to 13 that make 24, ``held_out_fraction`` of them held out by their content; in an order that
    is the same everywhere and says nothing.

    An item's ``info`` has ``numbers``, ``target`` and ``solution``, the text to be learnt by supervised fine-tuning. With
    ``solutions`` above 1 a training hand comes that often at most, each time with another solution, the simplest first.
    """

    default_scorer = "number_game"

    def __init__(
        self, *, seed: int = 0, held_out_fraction: float = 0.2, solutions: int = 1, style: str = "text", instruction: str = INSTRUCTION
    ) -> None:
        del seed  # the order is the driver's business
        super().__init__(held_out_fraction=held_out_fraction, style=style, instruction=instruction)
        if solutions < 1:
            raise ConfigError(f"task.args.solutions: must be at least 1 (got {solutions})")
        self._solutions = solutions

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        """Exact labels of steps: see ``number_games.check_lines``."""
        return check_lines(steps, item.info["numbers"], item.info["target"])

    def _make(self, *, held_out: bool) -> list[Item]:
        hands = [hand for hand in solvable_hands() if is_held_out(f"game24:{hand}", self._fraction) is held_out]
        hands.sort(key=lambda hand: stable_hash(f"order:{hand}"))  # so that the first so many are like all of them
        return [item for hand in hands for item in self._items(hand, 1 if held_out else self._solutions)]

    def _items(self, hand: tuple[int, ...], most: int) -> list[Item]:
        prompt = self._prompt(write_question(hand, TARGET))
        name = f"game24-{'-'.join(map(str, hand))}"
        return [
            Item(
                id=f"{name}/{n}" if most > 1 else name,
                prompt=prompt,
                answer=TARGET,
                info={"numbers": list(hand), "target": TARGET, "solution": solution.write(TARGET)},
            )
            for n, solution in enumerate(solve(hand, TARGET)[:most])
        ]


def solvable_hands() -> list[tuple[int, ...]]:
    """Every hand that makes 24, each sorted, in ascending order."""
    return [hand for hand in combinations_with_replacement(range(1, HIGHEST + 1), CARDS) if is_reachable(hand, TARGET)]
