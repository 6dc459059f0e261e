"""Tasks whose items are made on first use and divided by their content."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reasoner_ray.data.questions import build_prompt, check_style
from reasoner_ray.data.tasks import Item, Message, Task, is_held_out
from reasoner_ray.errors import ConfigError


class GeneratedTask(Task):
    """Makes each split once, when it is first asked for. Raises ``ConfigError`` for a fraction or style that there is not."""

    def __init__(self, *, held_out_fraction: float, style: str, instruction: str) -> None:
        if not 0 <= held_out_fraction < 1:
            raise ConfigError(f"task.args.held_out_fraction: must be at least 0 and below 1 (got {held_out_fraction})")
        self._fraction, self._style, self._instruction = held_out_fraction, check_style(style), instruction

    def train(self) -> Sequence[Item]:
        """Made on first use."""
        return self._train

    def held_out(self) -> Sequence[Item]:
        """Made on first use; the same for every seed."""
        return self._held_out

    @cached_property
    def _train(self) -> list[Item]:
        return self._make(held_out=False)

    @cached_property
    def _held_out(self) -> list[Item]:
        return self._make(held_out=True)

    @abstractmethod
    def _make(self, *, held_out: bool) -> list[Item]:
        """The items of a split."""

    def _prompt(self, question: str) -> str | list[Message]:
        """The question as a line to be continued, or as a chat message with the instruction."""
        return f"{question}\n" if self._style == "text" else build_prompt(question, style="chat", instruction=self._instruction)


@dataclass(frozen=True, slots=True)
class Drawn:
    """An item that was drawn."""

    item: Item
    content: str  # what tells it from others
    side: str = ""  # what decides whether it is held out; its content, where nothing else is given


class DrawnTask(GeneratedTask):
    """Draws items at random until it has as many as asked for, or finds no new ones."""

    most_repeats = 1000
    """Draws in a row that bring nothing new before the space counts as used up."""

    def __init__(self, *, seed: int, train_size: int, held_out_size: int, held_out_fraction: float, style: str, instruction: str) -> None:
        super().__init__(held_out_fraction=held_out_fraction, style=style, instruction=instruction)
        self._seed, self._sizes = seed, (train_size, held_out_size)

    @abstractmethod
    def _draw(self, source: random.Random, number: str) -> Drawn | None:
        """An item; ``number`` is its place, for an id. None for a draw that leads to none."""

    def _make(self, *, held_out: bool) -> list[Item]:
        split, kind = ("held_out" if held_out else "train"), type(self).name
        source = random.Random(f"{kind}/held_out" if held_out else f"{kind}/train/{self._seed}")
        items: dict[str, Item] = {}
        repeats = 0
        while len(items) < self._sizes[held_out] and repeats < self.most_repeats:
            repeats += 1
            drawn = self._draw(source, f"{split}-{len(items)}")
            if drawn is None or drawn.content in items or is_held_out(drawn.side or drawn.content, self._fraction) != held_out:
                continue
            repeats = 0
            items[drawn.content] = drawn.item
        return list(items.values())
