"""Texts put together piece by piece are the tokens of the whole text, whatever the tokenizer writes before a text."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reasoner_ray import tokens
from reasoner_ray.tokens import beginning, continuation, opening


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tokenizer that normalises as Llama 2's does: a space before every text, spaces as ▁."""
    letters = ["<unk>", "<s>", "▁", *string.ascii_lowercase, *".,\n", "▁w", "▁t"]
    merges = [("▁", "w"), ("▁", "t")]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(letters)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    """A byte-level one, which writes nothing of its own."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


PIECES = ("you are in the kitchen", " walk to", "\nyou see", " a pancake.", "x")


def test_pieces_are_the_tokens_of_the_whole_text(llama: Any, tokenizer: Any) -> None:
    for own in (llama, tokenizer):
        joined = [*beginning(own, PIECES[0]), *(token for piece in PIECES[1:] for token in continuation(own, piece))]
        assert joined == own.encode("".join(PIECES), add_special_tokens=False)


def test_a_piece_begins_with_no_space_that_nobody_wrote(llama: Any) -> None:
    assert llama.convert_ids_to_tokens(beginning(llama, " walk")) == ["▁", "▁w", "a", "l", "k"]
    assert llama.convert_ids_to_tokens(continuation(llama, " walk")) == ["▁w", "a", "l", "k"]
    assert llama.convert_ids_to_tokens(continuation(llama, "walk")) == ["w", "a", "l", "k"]
    assert continuation(llama, "") == () == opening(llama)


def test_long_texts_are_not_remembered(tokenizer: Any) -> None:
    tokens._kept.cache_clear()
    text = "word " * tokens.KEPT_LENGTH
    assert continuation(tokenizer, text) == beginning(tokenizer, text) == tuple(tokenizer.encode(text, add_special_tokens=False))
    assert tokens._kept.cache_info().currsize == 0
    continuation(tokenizer, "word")
    assert tokens._kept.cache_info().currsize == 1
