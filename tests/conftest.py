"""What the tests share: a tiny Llama made on the spot, the real 135M model, one Ray, and the sample data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings

# Read by the libraries when they are first imported, so set before any test module is: tests never go to a hub,
# never report usage, and never open an online W&B run.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

hypothesis_settings.register_profile("unhurried", deadline=None)  # an example that takes long on a busy machine is no failure
hypothesis_settings.load_profile("unhurried")

TINY_VOCABULARY = 512
PAD, EOS = "<|pad|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _cpu_accelerator() -> Iterator[None]:
    """DeepSpeed guesses its accelerator from installed packages; without a GPU the guess is made for it."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def _corpus() -> Iterator[str]:
    """Short lines in the manner of the tests' prompts: sums, words, and the chat roles."""
    words = "the answer of this question is a number so add both terms and write it down then stop".split()
    for a in range(100):
        yield f"{a} + {(7 * a) % 100} = {a + (7 * a) % 100}\n"
        yield " ".join(words[(a + i) % len(words)] for i in range(6)) + ".\n"
        yield f"user: what is {a} times 3?\nassistant: {3 * a}\n"


def make_tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most ``TINY_VOCABULARY`` entries; encodes and decodes any text without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a two-layer Llama (hidden 64, 2 heads over 1 KV head, tied embeddings, fp32) with its tokenizer into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 dimensions, the least that the CPU attention of vLLM computes
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,  # the default 0.02 makes every distribution almost uniform, which hides errors
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with random, seeded weights and a real tokenizer; treat it as read-only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """Folder of the real SmolLM2-135M-Instruct (bf16 safetensors), converted once into the user's cache."""
    from reasoner_ray.models import resolve_model

    return Path(resolve_model("builtin:smollm2-135m"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray for the whole run: 8 logical CPUs (of however many real ones), a small object store, no dashboard."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of sample data sets: ``$REASONER_RAY_DATA``, or ``shared/data`` beside the checkout."""
    named = os.environ.get("REASONER_RAY_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set REASONER_RAY_DATA to a folder that has it")
    return folder


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine on which nobody has logged in to W&B."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    wandb.teardown()
    yield
    wandb.teardown()
