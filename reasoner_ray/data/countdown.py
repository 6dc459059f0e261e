"""Countdown: make a target of some numbers, each used once, with + - * / and brackets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

from reasoner_ray.data.game24 import INSTRUCTION, build_number_prompt
from reasoner_ray.data.number_games import SIGNS, Term, apply, check_lines, join_terms, write_step
from reasoner_ray.data.questions import check_style
from reasoner_ray.data.tasks import Item, Task, is_held_out, register_task
from reasoner_ray.errors import ConfigError

_MAX_REPEATS = 10_000  # draws in a row that bring nothing new before the space counts as used up
Game = tuple[tuple[int, ...], int, str]
"""Numbers, target, and the solution that the game was made by."""


@register_task("countdown")
class CountdownTask(Task):
    """``numbers`` numbers up to ``highest`` and a target up to ``highest_target``, made by playing at random, so each has a solution.

    Every step of that solution has a positive integer as its result; others may be shorter to find. Whether a game is held out
    depends on its numbers and target alone, and the held-out games do not depend on ``seed``. An item's ``info`` has
    ``numbers``, ``target`` and ``solution``, the text to be learnt by supervised fine-tuning.
    """

    default_scorer = "number_game"

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
        for key, value, least, most in (
            ("numbers", numbers, 2, 6),
            ("highest", highest, 2, 10**6),
            ("highest_target", highest_target, 2, 10**6),
        ):
            if not least <= value <= most:
                raise ConfigError(f"task.args.{key}: must be in {least}..{most} (got {value})")
        self._numbers, self._highest, self._highest_target = numbers, highest, highest_target
        self._sizes, self._fraction, self._seed = (train_size, held_out_size), held_out_fraction, seed
        self._style, self._instruction = check_style(style), instruction

    def train(self) -> Sequence[Item]:
        """Games drawn with the job's seed."""
        return self._train

    def held_out(self) -> Sequence[Item]:
        """The same games for every seed."""
        return self._held_out

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        """Exact labels of steps: see ``number_games.check_lines``; with six numbers a step may take seconds."""
        return check_lines(steps, item.info["numbers"], item.info["target"])

    @cached_property
    def _train(self) -> list[Item]:
        return self._collect(random.Random(f"countdown/train/{self._seed}"), self._sizes[0], held_out=False)

    @cached_property
    def _held_out(self) -> list[Item]:
        return self._collect(random.Random("countdown/held_out"), self._sizes[1], held_out=True)

    def _collect(self, source: random.Random, size: int, *, held_out: bool) -> list[Item]:
        items: dict[str, Item] = {}
        repeats = 0
        while len(items) < size and repeats < _MAX_REPEATS:
            repeats += 1
            game = self._draw(source)
            if game is None:
                continue
            numbers, target, solution = game
            identity = f"countdown-{'-'.join(map(str, sorted(numbers)))}-to-{target}"
            if identity in items or is_held_out(identity, self._fraction) != held_out:
                continue
            repeats = 0
            prompt = build_number_prompt(numbers, target, self._style, self._instruction)
            info = {"numbers": list(numbers), "target": target, "solution": solution}
            items[identity] = Item(id=identity, prompt=prompt, answer=target, info=info)
        return list(items.values())

    def _draw(self, source: random.Random) -> Game | None:
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
