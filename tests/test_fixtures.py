"""The fixtures that the other tests stand on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_model_loads_and_its_tokenizer_is_lossless(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    text = "12 + 7 = 19\nWörter, 数学 and more."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= model.config.vocab_size
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
        == "user: hi\nassistant: "
    )
    assert next(model.parameters()).dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(torch.tensor([tokenizer.encode("1 + 1 =")])).logits
    assert logits.std() > 0.1
