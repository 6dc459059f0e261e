"""Countdown: make a target of some numbers, each used once, with + - * / and brackets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

from reasoner_ray.data.game24 import INSTRUCTION, write_question
from reasoner_ray.data.generated import Drawn, DrawnTask
from reasoner_ray.data.number_games import SIGNS, Term, apply, check_lines, join_terms, write_step
from reasoner_ray.data.tasks import Item, register_task
from reasoner_ray.errors import ConfigError

Game = tuple[tuple[int, ...], int, str]
"""Numbers, target, and the solution that the game was made by."""


@register_task("countdown")
class CountdownTask(DrawnTask):
    """``numbers`` numbers up to ``highest`` and a target up to ``highest_target``, made by playing at random, so each has a solution.

    Every step of that solution has a positive integer as its result; others may be shorter to find. Whether a game is held out
    depends on its numbers and target alone, and the held-out games do not depend on ``seed``. An item's ``info`` has
    ``numbers``, ``target`` and ``solution``, the text to be learnt by supervised fine-tuning.
    """

    default_scorer = "number_game"
    most_repeats = 10_000

    def __init__(
        self,
        *,
        seed: int = 0,
        numbers: int = 4,
        highest: int = 99,
        highest_target: int = 99,
        train_size: int = 4096,
        held_out_size: int = 512,
        held_out_fraction: float = 0.15,
        style: str = "text",
        instruction: str = INSTRUCTION,
    ) -> None:
        super().__init__(
            seed=seed,
            train_size=train_size,
            held_out_size=held_out_size,
            held_out_fraction=held_out_fraction,
            style=style,
            instruction=instruction,
        )
        for key, value, least, most in (
            ("numbers", numbers, 2, 6),
            ("highest", highest, 2, 10**6),
            ("highest_target", highest_target, 2, 10**6),
        ):
            if not least <= value <= most:
                raise ConfigError(f"task.args.{key}: must be in {least}..{most} (got {value})")
        self._numbers, self._highest, self._highest_target = numbers, highest, highest_target

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        """Exact labels of steps: see ``number_games.check_lines``; with six numbers a step may take seconds."""
        return check_lines(steps, item.info["numbers"], item.info["target"])

    def _draw(self, source: random.Random, number: str) -> Drawn | None:
        game = self._play(source)
        if game is None:
            return None
        numbers, target, solution = game
        identity = f"countdown-{'-'.join(map(str, sorted(numbers)))}-to-{target}"
        info = {"numbers": list(numbers), "target": target, "solution": solution}
        return Drawn(Item(id=identity, prompt=self._prompt(write_question(numbers, target)), answer=target, info=info), identity)

    def _play(self, source: random.Random) -> Game | None:
        """Play one game backwards: random numbers, random operations; None where it leads to no allowed target."""
        numbers = tuple(source.randint(1, self._highest) for _ in range(self._numbers))
        terms, lines = [Term(Fraction(n), str(n)) for n in numbers], []
        while len(terms) > 1:
            b, a = sorted(source.sample(terms, 2), key=lambda t: t.value)
            sign = source.choice(SIGNS)
            value = apply(sign, a.value, b.value)
            if value is None or value < 1 or value.denominator != 1:
                return None
            terms.remove(a)
            terms.remove(b)
            terms = sorted([*terms, join_terms(sign, a, b, value)], key=lambda t: t.value)
            lines.append(write_step(a.value, sign, b.value, [t.value for t in terms]))
        target = int(terms[0].value)
        if not 1 < target <= self._highest_target:
            return None
        return numbers, target, "\n".join([*lines, f"The answer is {terms[0].text} = {target}"])
