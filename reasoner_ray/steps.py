"""Steps of a solution as token spans, the same in search, in labels, in process reward models and in training.

A step ends with the token that completes its separator, as vLLM ends an action with the token that completes a stop
string; token ids are its only representation, text is decoded to find the borders alone.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from reasoner_ray.errors import ConfigError
from reasoner_ray.registry import load_dotted
from reasoner_ray.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Structure = Callable[[str], Sequence[int]]
"""Where the steps of a solution's text end: ascending offsets of characters, one past the last one of each step."""
Cut = str | int | Structure
"""What cuts a solution into steps: a text that ends one, the number of tokens of each, or a function of the whole text."""
_CONTEXT = 4  # tokens decoded before a piece, so that tokenizers that drop a leading space do not drop it


class StepsBy(Section):
    """Steps by the structure of a solution's text; one of the two keys."""

    before: str | None = Field(None, description="a regular expression: a step begins where it matches, as in 'Step [0-9]+:'")
    function: str | None = Field(None, description="module:function of your own, text of a solution -> where its steps end (characters)")

    @field_validator("before")
    @classmethod
    def _is_a_pattern(cls, before: str | None) -> str | None:
        try:
            re.compile(before or "")
        except re.error as error:
            raise ValueError(f"{before!r} is no regular expression: {error}") from error
        return before

    @model_validator(mode="after")
    def _one_of_two(self) -> StepsBy:
        if bool(self.before) == bool(self.function):
            raise ValueError("steps by structure need one of `before` (a regular expression) and `function` (module:function)")
        return self

    def structure(self) -> Structure:
        """The function; what a user's own raises, or answers amiss, is a ``ConfigError``. Raises it too where there is none."""
        if self.before is not None:
            return before(self.before)
        name = str(self.function)
        function: Structure = load_dotted(name, "separator.function")

        def checked(text: str) -> list[int]:
            try:
                ends = [int(end) for end in function(text)]
            except Exception as error:  # someone else's code may raise anything
                raise ConfigError(f"separator.function: {name} raised {type(error).__name__}: {error}") from error
            if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= len(text)):
                raise ConfigError(f"separator.function: {name} must give ascending places within the text's {len(text)} characters: {ends}")
            return ends

        return checked


CutSetting = str | int | StepsBy
"""A ``Cut`` as a job's configuration has it."""


def read_cut(setting: CutSetting) -> Cut:
    """The cut that a setting names. Raises ``ConfigError`` where a function cannot be found."""
    return setting.structure() if isinstance(setting, StepsBy) else setting


def cut_problems(key: str, setting: CutSetting | None) -> list[str]:
    """What is wrong with the setting ``key``, as sentences. Raises ``ConfigError`` as ``read_cut`` does."""
    if setting is not None and (setting == "" or (isinstance(setting, int) and setting < 1)):
        return [f"{key}: must be a text that ends a step, the number of tokens of each step, or {{before: REGEX}} or {{function: ...}}"]
    if isinstance(setting, StepsBy):
        setting.structure()
    return []


@dataclass(frozen=True, slots=True)
class Partial:
    """A prompt and the steps of a solution so far. Raises ``ValueError`` where the steps do not cover what follows the prompt."""

    tokens: tuple[int, ...]  # the prompt, then the steps
    ends: tuple[int, ...]  # [steps]; one past the last token of each step, an index into ``tokens``
    start: int  # tokens of the prompt

    def __post_init__(self) -> None:
        borders = (self.start, *self.ends)
        if self.start < 0 or any(a >= b for a, b in zip(borders, self.ends, strict=False)) or borders[-1] != len(self.tokens):
            raise ValueError(f"steps that end at {self.ends} do not cover tokens {self.start} to {len(self.tokens)}")

    @classmethod
    def root(cls, prompt: Sequence[int]) -> Partial:
        """The solution without a step."""
        return cls(tuple(prompt), (), len(prompt))

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.tokens[: self.start]

    @property
    def solution(self) -> tuple[int, ...]:
        """Token ids of all steps."""
        return self.tokens[self.start :]

    @property
    def steps(self) -> list[tuple[int, ...]]:
        """Token ids of each step."""
        return [self.tokens[a:b] for a, b in zip((self.start, *self.ends), self.ends, strict=False)]

    def then(self, step: Sequence[int], *, joined: bool = False) -> Partial:
        """With one more step, or with ``joined`` the last step made longer (by special tokens alone: see ``segment``)."""
        tokens = (*self.tokens, *step)
        before = self.ends[:-1] if joined else self.ends
        return Partial(tokens, (*before, len(tokens)), self.start)

    def until(self, steps: int) -> Partial:
        """The first ``steps`` steps alone."""
        ends = self.ends[:steps]
        return Partial(self.tokens[: ends[-1] if ends else self.start], ends, self.start)


_STEP = 16
"""Tokens of a short step: so far ahead a separator is looked for first."""


class Separator:
    """Ends a step after the token that completes ``text``. Raises ``ValueError`` for an empty text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        if not text:
            raise ValueError("a separator of steps must have at least one character")
        self._tokenizer = tokenizer
        self.text = text

    def __call__(self, tokens: Sequence[int], start: int = 0) -> list[int]:
        """Ends of the steps of ``tokens[start:]``, indices into ``tokens``; what follows the last separator is a step too."""
        ends, at = [], start
        while at < len(tokens):
            at = self._next_end(tokens, at)
            ends.append(at)
        return _without_empty_end(ends, tokens, start, self._tokenizer)

    def _next_end(self, tokens: Sequence[int], at: int) -> int:
        reach = _STEP
        while self.text not in decode_piece(self._tokenizer, tokens, at, min(at + reach, len(tokens))):
            if at + reach >= len(tokens):
                return len(tokens)
            reach *= 2
        places = range(at + 1, min(at + reach, len(tokens)))  # a text that holds the separator still holds it when more follows
        return at + 1 + bisect_left(places, True, key=lambda end: self.text in decode_piece(self._tokenizer, tokens, at, end))


def segment(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, separator: Cut, start: int = 0) -> list[int]:
    """Ends of the steps of the solution ``tokens[start:]``, ascending indices into ``tokens``; the last is ``len(tokens)``.

    ``separator`` is a text (a step ends after the token that completes it), a number (steps of so many tokens), or a function of
    the solution's text that says where steps end; the rest is the last step. An end that consists of special tokens alone (an
    end-of-text token after a separator) belongs to the step before it. Raises ``ValueError`` for an empty separator.
    """
    if isinstance(separator, str):
        return Separator(tokenizer, separator)(tokens, start)
    if isinstance(separator, int):
        if separator < 1:
            raise ValueError(f"a step must have at least one token (got {separator})")
        return _without_empty_end([*range(start + separator, len(tokens), separator), len(tokens)], tokens, start, tokenizer)
    offsets = separator(decode_piece(tokenizer, tokens, start, len(tokens)))
    places = range(start + 1, len(tokens) + 1)
    found = (
        start + 1 + bisect_left(places, offset, key=lambda end: len(decode_piece(tokenizer, tokens, start, end)))
        for offset in offsets
        if offset > 0
    )
    ends = sorted({min(end, len(tokens)) for end in found} | {len(tokens)}) if len(tokens) > start else []
    return _without_empty_end(ends, tokens, start, tokenizer)


def before(pattern: str) -> Structure:
    """Steps that begin where the regular expression ``pattern`` matches: ``before(r"Step \\d+:")``. Raises ``re.error``."""
    compiled = re.compile(pattern)
    return lambda text: [match.start() for match in compiled.finditer(text) if text[: match.start()].strip()]


def decode_piece(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], start: int, end: int) -> str:
    """The text that ``tokens[start:end]`` adds to what stands before it, special tokens included."""
    context = max(0, start - _CONTEXT)
    known = str(tokenizer.decode(list(tokens[context:start]), skip_special_tokens=False)) if context < start else ""
    return str(tokenizer.decode(list(tokens[context:end]), skip_special_tokens=False))[len(known) :]


def only_special(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokens`` say nothing by themselves: end-of-text and the like."""
    return _special_ids(tokenizer).issuperset(tokens)


@lru_cache(maxsize=16)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """A tokenizer puts its list together anew each time it is asked."""
    return frozenset(tokenizer.all_special_ids)


def _without_empty_end(ends: list[int], tokens: Sequence[int], start: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ends with a last step of special tokens alone joined to the one before it."""
    if len(ends) > 1 and only_special(tokens[ends[-2] : ends[-1]], tokenizer):
        return [*ends[:-2], ends[-1]]
    return [] if len(tokens) == start else ends
