"""A scripted engine that writes lines which are right or wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.rollout.fakes import ScriptedEngine

GOOD, BAD = "yes\n", "no\n"


class LineEngine(ScriptedEngine):
    """Goes on with a solution of ``lines`` lines and an end-of-text token; each line is wrong with probability ``error``."""

    def __init__(self, tokenizer: Any, *, lines: int = 4, error: float = 0.3, seed: int = 0) -> None:
        super().__init__(self._continue)
        self._tokenizer, self._lines, self._error, self._source = tokenizer, lines, error, random.Random(seed)

    def _continue(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        written = self._tokenizer.decode(list(prompt)).rpartition("=")[2].count("\n")
        text = "".join(BAD if self._source.random() < self._error else GOOD for _ in range(self._lines - written))
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id], "stop"
