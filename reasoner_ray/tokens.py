"""Texts that are put together piece by piece, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from reasoner_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = ("▁", "Ġ")
"""How SentencePiece's and byte-level vocabularies write a space."""
BEFORE = ("\n", ".", "x")
"""Texts that a piece is encoded behind, in this order, until one stays a token of its own."""
KEPT_TEXTS, KEPT_LENGTH = 8192, 1000
"""Texts whose token ids are remembered, and their most characters: some 80 MB at most, however many texts there are."""


@lru_cache(maxsize=64)
def opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer writes before any text: a token, or nothing."""
    return tuple(int(t) for t in tokenizer.encode(""))


def beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text that nothing stands before, without special tokens."""
    return _kept(tokenizer, text, False) if len(text) <= KEPT_LENGTH else _ids(tokenizer, text)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text that goes on from another one, without special tokens.

    Some tokenizers (Llama 2's) write a space before whatever they encode. Inside a text that is a token nobody wrote, which
    costs every candidate of a list the same log-prob, whatever its length. Raises ``ModelError`` where it cannot be told apart.
    """
    return _kept(tokenizer, text, True) if len(text) <= KEPT_LENGTH else _continued(tokenizer, text)


@lru_cache(maxsize=KEPT_TEXTS)
def _kept(tokenizer: PreTrainedTokenizerBase, text: str, goes_on: bool) -> tuple[int, ...]:
    """Episodes meet the same observations and actions over and over."""
    return _continued(tokenizer, text) if goes_on else _ids(tokenizer, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    found: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
    return tuple(int(t) for t in found)


def _continued(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    if not text or not _writes_a_space(tokenizer):
        return _ids(tokenizer, text)
    for before in BEFORE:
        head, whole = _kept(tokenizer, before, False), _ids(tokenizer, before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    raise ModelError(f"the tokenizer {tokenizer.name_or_path} joins {text[:40]!r} to whatever stands before it; take another model")


@lru_cache(maxsize=64)
def _writes_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.tokenize("x")[0].startswith(MARKS)
