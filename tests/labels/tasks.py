"""Tasks with a check of steps of their own, for the process that the check runs in."""

from __future__ import annotations

import time
from collections.abc import Sequence

from reasoner_ray.data.tasks import Item, Task


class Checked(Task):
    """Questions whose right lines say yes; the check hangs where ``hang`` is in a line."""

    name = "checked"

    def __init__(self, *, seed: int = 0, hang: str = "", chat: bool = False) -> None:
        self._hang, self._chat = hang, chat

    def train(self) -> Sequence[Item]:
        prompt = [{"role": "user", "content": "what is 1 + 0 ="}] if self._chat else "1 + 0 ="
        return [Item(id="q", prompt=prompt, answer="1")]

    def held_out(self) -> Sequence[Item]:
        return []

    def check_steps(self, item: Item, steps: Sequence[str]) -> list[bool]:
        while self._hang and any(self._hang in step for step in steps):
            time.sleep(1)
        return ["no" not in step for step in steps]
