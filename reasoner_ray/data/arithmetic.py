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

from reasoner_ray.data.generated import Drawn, DrawnTask
from reasoner_ray.data.tasks import Item, register_task
from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import suggest

OPERATIONS = ("add", "largest", "multiply")


@register_task("arithmetic")
class ArithmeticTask(DrawnTask):
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
        super().__init__(
            seed=seed,
            train_size=train_size,
            held_out_size=held_out_size,
            held_out_fraction=held_out_fraction,
            style="text",
            instruction="",
        )
        self._op, self._digits, self._terms = op, digits, terms
        shot_source = random.Random(f"arithmetic/shots/{op}/{digits}/{terms}")
        self._shots = [self._operands(shot_source) for _ in range(shots)]
        self._shot_keys = {self._key(s) for s in self._shots}
        self.header = "".join(f"{self._question(s)} {self._solve(s)}\n" for s in self._shots)

    def _draw(self, source: random.Random, number: str) -> Drawn | None:
        numbers = self._operands(source)
        key, question = self._key(numbers), self._question(numbers)
        if key in self._shot_keys:
            return None
        item = Item(id=f"{self._op}-{'-'.join(map(str, numbers))}", prompt=self.header + question, answer=str(self._solve(numbers)))
        return Drawn(item, question, side=key)

    def _operands(self, source: random.Random) -> tuple[int, ...]:
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
