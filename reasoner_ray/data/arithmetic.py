"""Small arithmetic as text completion: a task whose learning curve a laptop can show.

All prompts share one few-shot header, so that the engine's prefix cache and prefix-tree packing compute it once:

    12 + 34 = 46
    ...
    56 + 27 =

with the answer `` 83\\n``. Whether a problem is held out depends on its operands alone, and problems that differ
only in the order of their operands fall on the same side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cached_property

from reasoner_ray.data.tasks import Item, Task, is_held_out, register_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import suggest

OPERATIONS = ("add", "largest", "multiply")
_MAX_REPEATS = 1000  # draws in a row that bring nothing new before the space counts as used up


@register_task("arithmetic")
class ArithmeticTask(Task):
    """``op`` (add, largest or multiply) of ``terms`` numbers with ``digits`` digits.

    ``shots`` solved examples make up the fixed header. The held-out set does not depend on ``seed``, so runs with
    different seeds are evaluated alike. Sizes are upper bounds: a small space (100 one-digit sums) yields what it has.
    """

    stop = ("\n",)

    def __init__(
        self,
        *,
        seed: int = 0,
        op: str = "add",
        digits: int = 2,
        terms: int = 2,
        shots: int = 4,
        train_size: int = 4096,
        held_out_size: int = 512,
        held_out_fraction: float = 0.15,
    ) -> None:
        if op not in OPERATIONS:
            raise ConfigError(f"task.args.op: unknown operation {op!r}; {suggest(op, list(OPERATIONS))}")
        for key, value, least in (("digits", digits, 1), ("terms", terms, 2), ("shots", shots, 0)):
            if value < least:
                raise ConfigError(f"task.args.{key}: must be at least {least} (got {value})")
        self._op, self._digits, self._terms = op, digits, terms
        self._fraction = held_out_fraction
        self._seed, self._sizes = seed, (train_size, held_out_size)
        shot_source = random.Random(f"arithmetic/shots/{op}/{digits}/{terms}")
        self._shots = [self._draw(shot_source) for _ in range(shots)]
        self._shot_keys = {self._key(s) for s in self._shots}
        self.header = "".join(f"{self._question(s)} {self._solve(s)}\n" for s in self._shots)

    def train(self) -> Sequence[Item]:
        """Problems drawn with the job's seed."""
        return self._train

    def held_out(self) -> Sequence[Item]:
        """The same problems for every seed."""
        return self._held_out

    @cached_property
    def _train(self) -> list[Item]:
        return self._collect(random.Random(f"arithmetic/train/{self._seed}"), self._sizes[0], held_out=False)

    @cached_property
    def _held_out(self) -> list[Item]:
        return self._collect(random.Random("arithmetic/held_out"), self._sizes[1], held_out=True)

    def _collect(self, source: random.Random, size: int, *, held_out: bool) -> list[Item]:
        items: dict[str, Item] = {}
        repeats = 0
        while len(items) < size and repeats < _MAX_REPEATS:
            numbers = self._draw(source)
            key, question = self._key(numbers), self._question(numbers)
            if question in items or key in self._shot_keys or is_held_out(key, self._fraction) != held_out:
                repeats += 1
                continue
            repeats = 0
            identity = f"{self._op}-{'-'.join(map(str, numbers))}"
            items[question] = Item(id=identity, prompt=self.header + question, answer=str(self._solve(numbers)))
        return list(items.values())

    def _draw(self, source: random.Random) -> tuple[int, ...]:
        low = 0 if self._digits == 1 else 10 ** (self._digits - 1)
        if self._op == "largest":  # without repeats, else the question is ambiguous to read
            return tuple(source.sample(range(low, 10**self._digits), self._terms))
        return tuple(source.randrange(low, 10**self._digits) for _ in range(self._terms))

    def _key(self, numbers: Sequence[int]) -> str:
        return f"{self._op}:{sorted(numbers)}"

    def _question(self, numbers: Sequence[int]) -> str:
        if self._op == "largest":
            return f"Largest of {', '.join(map(str, numbers))}:"
        return f" {'+' if self._op == 'add' else '*'} ".join(map(str, numbers)) + " ="

    def _solve(self, numbers: Sequence[int]) -> int:
        if self._op == "largest":
            return max(numbers)
        return sum(numbers) if self._op == "add" else math.prod(numbers)
