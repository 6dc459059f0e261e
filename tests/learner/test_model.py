"""The policy model: packed results and gradients equal each trajectory computed alone by transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from reasoner_ray.config import ModelConfig
from reasoner_ray.errors import ModelError
from reasoner_ray.learner.model import PolicyModel, load_policy, policy_state, save_policy
from reasoner_ray.learner.settings import LearnerConfig, LoraConfig
from reasoner_ray.packing import Batch, pack, unpack, unpack_bootstrap
from reasoner_ray.trajectory import Status, Trajectory, flatten
from tests.forest import CASES, forests

TEMPERATURE = 0.8
Results = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # streams, gradients
Load = Callable[..., PolicyModel]


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Load:
    """Loads the tiny model with a small value head whose last layer is not zero."""

    def make(**changes: Any) -> PolicyModel:
        needs_reference = changes.pop("needs_reference", False)
        torch.manual_seed(0)
        model = load_policy(
            ModelConfig(path=str(tiny_model_dir), dtype="float32"),
            LearnerConfig(**{"critic_hidden": (16,), "logprob_chunk": 7, **changes}),
            needs_reference=needs_reference,
            temperature=TEMPERATURE,
        )
        if model.value_head is not None:
            torch.nn.init.normal_(model.value_head.layers[-1].weight)
        return model

    return make


@pytest.fixture(scope="module")
def shared(load: Load) -> PolicyModel:
    return load()


def token_weights(n: int) -> torch.Tensor:
    """Three fixed weights a token: of its log-prob, its entropy, its squared value."""
    return torch.rand(3, n, generator=torch.Generator().manual_seed(5)) - 0.3


def packed(
    model: PolicyModel, trajectories: list[Trajectory], weights: torch.Tensor | None = None, multiple: int = 1, **how: Any
) -> Results:
    """Streams and gradients of a weighted loss, accumulated over micro-batches, each padded to ``multiple`` tokens."""
    n = flatten(trajectories).n_tokens
    weights = token_weights(n) if weights is None else weights
    model.zero_grad()
    batches = [batch.padded(multiple) for batch in pack(trajectories, **how)]
    outputs = [model(batch) for batch in batches]
    for batch, out in zip(batches, outputs, strict=True):
        w = weights[:, batch.stream_index]
        loss = (w[0] * out.logprobs).sum() + (w[1] * out.entropy).sum() + (w[2] * out.values**2).sum()
        (loss / max(n, 1)).backward()
    streams = {
        "logprobs": unpack(batches, [o.logprobs for o in outputs], n),
        "entropy": unpack(batches, [o.entropy for o in outputs], n),
        "values": unpack(batches, [o.values for o in outputs], n),
        "bootstrap": unpack_bootstrap(batches, [o.bootstrap_values for o in outputs], len(trajectories)),
    }
    return streams, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def independent(folder: Path, model: PolicyModel, trajectories: list[Trajectory]) -> Results:
    """The same by transformers' own forward pass, one context at a time, nothing shared."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    n = flatten(trajectories).n_tokens
    weights = token_weights(n)
    model.zero_grad()
    streams: dict[str, list[torch.Tensor]] = {"logprobs": [], "entropy": [], "values": []}
    bootstrap = torch.zeros(len(trajectories))
    done = 0
    for i, t in enumerate(trajectories):
        if not t.trainable_tokens:
            continue
        for start, end in pairwise([*t.context_starts, len(t.tokens)]):
            out = lm(torch.from_numpy(t.tokens[start:end].astype(np.int64))[None], output_hidden_states=True)
            hidden = out.hidden_states[-1][0].detach()
            if t.status is Status.TRUNCATED and end == len(t.tokens):
                bootstrap[i] = model.value_head(hidden[-1:]).item()
            trained = np.flatnonzero(t.loss_mask[start:end])
            if not len(trained):
                continue
            logp = torch.log_softmax(out.logits[0] / TEMPERATURE, dim=-1)[trained - 1]
            parts = {
                "logprobs": logp[range(len(trained)), t.tokens[start:end][trained]],
                "entropy": -(logp.exp() * logp).sum(-1),
                "values": model.value_head(hidden[trained - 1]),
            }
            w = weights[:, done : done + len(trained)]
            loss = (w[0] * parts["logprobs"]).sum() + (w[1] * parts["entropy"]).sum() + (w[2] * parts["values"] ** 2).sum()
            (loss / n).backward()
            for name, part in parts.items():
                streams[name].append(part.detach())
            done += len(trained)
    grads = {f"lm.{name}": p.grad for name, p in lm.named_parameters()}
    grads |= {name: p.grad.clone() for name, p in model.named_parameters() if name.startswith("value_head")}
    return {**{k: torch.cat(v) for k, v in streams.items()}, "bootstrap": bootstrap}, grads


def assert_close(got: Results, expected: Results) -> None:
    for part_got, part_expected in zip(got, expected, strict=True):
        assert part_got.keys() == part_expected.keys()
        for name in part_got:
            torch.testing.assert_close(part_got[name], part_expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_shared_prefixes_give_the_unshared_gradients(case: str, shared: PolicyModel, tiny_model_dir: Path) -> None:
    trajectories = CASES[case]()
    expected = independent(tiny_model_dir, shared, trajectories)
    assert_close(packed(shared, trajectories, tokens_per_microbatch=1000), expected)
    assert_close(packed(shared, trajectories, tokens_per_microbatch=1000, share_prefixes=False), expected)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trajectories=forests(max_size=6),
    budget=st.integers(5, 40),
    share=st.booleans(),
    multiple=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 99),
)
def test_order_padding_packing_and_cut_do_not_matter(
    shared: PolicyModel, trajectories: list[Trajectory], budget: int, share: bool, multiple: int, seed: int
) -> None:
    if not any(t.trainable_tokens for t in trajectories):
        return
    whole = packed(shared, trajectories, tokens_per_microbatch=1000, share_prefixes=False)
    order = np.random.default_rng(seed).permutation(len(trajectories))
    starts = np.cumsum([0, *(t.trainable_tokens for t in trajectories)])
    moved = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order]))
    streams, grads = packed(
        shared,
        [trajectories[i] for i in order],
        token_weights(len(moved))[:, moved],
        multiple,
        tokens_per_microbatch=budget,
        share_prefixes=share,
    )
    back = {
        name: torch.empty_like(s).index_copy_(0, torch.from_numpy(order) if name == "bootstrap" else moved, s)
        for name, s in streams.items()
    }
    assert_close((back, grads), whole)


def test_padding_changes_nothing(shared: PolicyModel) -> None:
    trajectories = CASES["multi_turn"]()
    (batch,) = pack(trajectories, tokens_per_microbatch=1000)
    assert batch.n_packed % 64
    plain = packed(shared, trajectories, tokens_per_microbatch=1000)
    assert_close(packed(shared, trajectories, multiple=64, tokens_per_microbatch=1000), plain)


def test_gradient_checkpointing_changes_nothing(load: Load, shared: PolicyModel) -> None:
    trajectories = CASES["same_state"]()
    checkpointed = load(gradient_checkpointing=True).train()
    assert_close(packed(checkpointed, trajectories, tokens_per_microbatch=1000), packed(shared, trajectories, tokens_per_microbatch=1000))


def test_an_empty_batch_gives_zero_gradients_for_every_parameter(shared: PolicyModel) -> None:
    shared.zero_grad()
    out = shared(Batch.empty())
    assert out.logprobs.shape == out.entropy.shape == out.values.shape == (0,)
    (out.logprobs.sum() + out.values.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in shared.parameters())


@pytest.mark.parametrize("critic", ["shared", "frozen", "separate"])
def test_the_value_loss_never_moves_the_policy(critic: str, load: Load) -> None:
    model = load(critic=critic)
    out = model(pack(CASES["multi_turn"](), tokens_per_microbatch=1000)[0])
    (out.values.square().sum() + out.bootstrap_values.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.policy_parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.critic_parameters())


def test_frozen_critic_and_reference_stay_with_the_initial_model(load: Load) -> None:
    batch = pack(CASES["same_state"](), tokens_per_microbatch=1000)[0]
    for lora in (None, LoraConfig(rank=4)):
        model = load(critic="frozen", lora=lora, needs_reference=True)
        before = model(batch)
        torch.testing.assert_close(model.reference_logprobs(batch), before.logprobs)
        with torch.no_grad():
            for p in model.policy_parameters():
                p.add_(0.05 * torch.randn_like(p))
        after = model(batch)
        assert (after.logprobs - before.logprobs).abs().max() > 0.01
        torch.testing.assert_close(after.values, before.values)
        torch.testing.assert_close(model.reference_logprobs(batch), before.logprobs)
        if lora is None:  # one frozen copy serves both
            assert sum(1 for name, _ in model.named_parameters() if name.endswith("embed_tokens.weight")) == 2


def test_without_a_critic_there_are_no_values(load: Load) -> None:
    model = load(critic="none")
    out = model(pack(CASES["alone"](), tokens_per_microbatch=1000)[0], want_entropy=False)
    assert out.values is out.bootstrap_values is out.entropy is None
    assert model.critic_parameters() == []
    with pytest.raises(ValueError, match="needs_reference"):
        model.reference_logprobs(Batch.empty())


def test_first_values_are_zero(tiny_model_dir: Path) -> None:
    model = load_policy(ModelConfig(path=str(tiny_model_dir), dtype="float32"), LearnerConfig())
    assert not model(pack(CASES["alone"](), tokens_per_microbatch=1000)[0]).values.any()


def test_only_adapters_and_the_critic_train_under_lora(load: Load) -> None:
    model = load(lora=LoraConfig(rank=4))
    assert model.policy_parameters() and all(p.ndim == 2 and 4 in p.shape for p in model.policy_parameters())
    packed(model, CASES["alone"](), tokens_per_microbatch=1000)
    trained = {id(p) for p in [*model.policy_parameters(), *model.critic_parameters()]}
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_exported_weights_are_the_policy(lora: LoraConfig | None, load: Load, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(lora=lora)
    with torch.no_grad():
        for p in model.policy_parameters():
            p.add_(0.05 * torch.randn_like(p))
    state = {name: tensor.clone() for name, tensor in policy_state(model)}
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert state.keys() == {name for name, _ in original.named_parameters()}
    save_policy(model, state, tmp_path)
    shutil.copy(tiny_model_dir / "tokenizer.json", tmp_path)
    reloaded = load_policy(ModelConfig(path=str(tmp_path), dtype="float32"), LearnerConfig(), temperature=TEMPERATURE)
    batch = pack(CASES["group_of_samples"](), tokens_per_microbatch=1000)[0]
    torch.testing.assert_close(reloaded(batch).logprobs, model(batch).logprobs, rtol=1e-5, atol=1e-5)


def test_temperature_scales_the_logits(shared: PolicyModel, tiny_model_dir: Path) -> None:
    batch = pack(CASES["alone"](), tokens_per_microbatch=1000)[0]
    plain = load_policy(ModelConfig(path=str(tiny_model_dir)), LearnerConfig(critic="none"))
    assert shared(batch).entropy.sum() < plain(batch).entropy.sum()


# ---- models that cannot be trained ----


@pytest.fixture
def write_model(tiny_model_dir: Path) -> Callable[..., str]:
    """Writes a random model of any architecture, with a tokenizer beside it."""

    def write(folder: Path, config: Any, architecture: Any) -> str:
        torch.manual_seed(0)
        architecture(config).save_pretrained(folder)
        shutil.copy(tiny_model_dir / "tokenizer.json", folder)
        return str(folder)

    return write


def test_architectures_with_other_attention_layouts_are_exact(write_model: Callable[..., str], tmp_path: Path) -> None:
    """Sliding windows, untied heads, query and key norms, biases, partial rotary positions."""
    import transformers as hf

    common = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "qwen2": (hf.Qwen2Config(**common, num_key_value_heads=2), hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config(**common, num_key_value_heads=2, head_dim=8), hf.Qwen3ForCausalLM),
        "mistral": (hf.MistralConfig(**common, num_key_value_heads=2, sliding_window=3), hf.MistralForCausalLM),
    }
    for name, (config, architecture) in made.items():
        load_policy(ModelConfig(path=write_model(tmp_path / name, config, architecture)), LearnerConfig())


def test_unsupported_architectures_are_refused(write_model: Callable[..., str], tmp_path: Path) -> None:
    import transformers as hf

    common = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    made = {
        "recurrent": (hf.MambaConfig(**common, state_size=4), hf.MambaForCausalLM, "cannot be trained on packed rows"),
        "capped": (
            hf.Gemma2Config(
                **common, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0
            ),
            hf.Gemma2ForCausalLM,
            "softcap",
        ),
        "encoder": (
            hf.BertConfig(**common, intermediate_size=48, num_attention_heads=4),
            hf.BertModel,
            "cannot load a causal language model|cannot be trained|lacks",
        ),
    }
    for name, (config, architecture, message) in made.items():
        with pytest.raises(ModelError, match=message):
            load_policy(ModelConfig(path=write_model(tmp_path / name, config, architecture)), LearnerConfig())


def test_missing_and_broken_models_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_policy(ModelConfig(path=str(tmp_path / "nowhere")), LearnerConfig())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="lacks"):
        load_policy(ModelConfig(path=str(tmp_path)), LearnerConfig())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError):
        load_policy(ModelConfig(path=str(tmp_path)), LearnerConfig())


def test_adapters_on_the_head_are_refused(tiny_model_dir: Path) -> None:
    for target in ("lm_head", "embed_tokens", "no_such_layer"):
        with pytest.raises(ModelError, match="target_modules"):
            load_policy(ModelConfig(path=str(tiny_model_dir)), LearnerConfig(lora=LoraConfig(target_modules=(target,))))
