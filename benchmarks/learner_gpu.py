"""What the learner's model reaches on this device: tokens a second, model FLOPs utilisation, peak memory.

Random weights of a known shape, one row of groups packed as prefix trees, a forward and backward pass and an AdamW step.
Needs torch and transformers alone. Without a GPU, ``--shape tiny`` shows that it runs.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks._record import record
from reasoner_ray.learner.attention import TREE_ATTENTION, Backend
from reasoner_ray.learner.model import PolicyModel
from reasoner_ray.packing import Batch, pack
from reasoner_ray.trajectory import TrajectoryBuilder

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 64, "mlp": 128, "heads": 4, "kv": 2, "vocabulary": 512},
    "qwen2.5-0.5b": {"layers": 24, "hidden": 896, "mlp": 4864, "heads": 14, "kv": 2, "vocabulary": 151_936},
    "qwen2.5-1.5b": {"layers": 28, "hidden": 1536, "mlp": 8960, "heads": 12, "kv": 2, "vocabulary": 151_936},
    "llama-1b": {"layers": 16, "hidden": 2048, "mlp": 8192, "heads": 32, "kv": 8, "vocabulary": 128_256},
}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}  # dense bfloat16, makers' data sheets


def build(shape: str, device: str, checkpointing: bool, backend: Backend) -> PolicyModel:
    """A policy with a shared critic and random weights."""
    s = SHAPES[shape]
    common = {
        "num_hidden_layers": s["layers"],
        "hidden_size": s["hidden"],
        "intermediate_size": s["mlp"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "vocab_size": s["vocabulary"],
        "tie_word_embeddings": True,
        "attn_implementation": TREE_ATTENTION,
        "max_position_embeddings": 32_768,
    }
    with torch.device(device):
        lm = Qwen2ForCausalLM(Qwen2Config(**common)) if shape.startswith("qwen") else LlamaForCausalLM(LlamaConfig(**common))
        model = PolicyModel(
            lm.float(),
            critic="shared",
            gradient_checkpointing=checkpointing,
            compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        )
    model.backend = backend
    return model.to(device).train()


def make_batch(budget: int, prompt: int, answer: int, samples: int, vocabulary: int, share: bool) -> Batch:
    """Groups of random tokens that fill one row of at most ``budget`` computed tokens."""
    rng = np.random.default_rng(0)
    per_group = prompt + samples * (answer - 1) if share else samples * (prompt + answer - 1)
    made = []
    for group in range(max(1, budget // per_group)):
        start = rng.integers(0, vocabulary, prompt).tolist()
        for i in range(samples):
            builder = TrajectoryBuilder(id=f"{group}-{i}", group_id=str(group), task="benchmark")
            builder.add_env(start)
            builder.add_model(rng.integers(0, vocabulary, answer).tolist(), [0.0] * answer, [0] * answer)
            made.append(builder.build())
    return pack(made, tokens_per_microbatch=budget + per_group, share_prefixes=share)[0]


def model_flops(shape: str, batch: Batch) -> float:
    """Multiply-adds times two of a forward and a backward pass that recomputes nothing (PaLM, appendix B)."""
    s = SHAPES[shape]
    head = s["hidden"] // s["heads"]
    per_layer = s["hidden"] * (2 * s["hidden"] + 2 * s["kv"] * head + 3 * s["mlp"])
    linear = s["layers"] * per_layer * batch.n_packed
    attention = 2 * s["layers"] * s["hidden"] * int((batch.position_ids + 1).sum())
    lm_head = s["vocabulary"] * s["hidden"] * len(batch.predictors.unique())
    return 6.0 * (linear + attention + lm_head)


def measure(model: PolicyModel, batch: Batch, steps: int, warmup: int) -> tuple[list[float], float]:
    """Seconds of each step and peak memory in GiB (0 on a CPU)."""
    cuda = model.head.weight.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)
    batch = batch.to(model.head.weight.device)
    seconds = []
    for i in range(warmup + steps):
        if cuda:
            torch.cuda.synchronize()
            if i == warmup:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = model(batch)
        assert out.values is not None
        (out.logprobs.mean() + out.values.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def main() -> None:
    """Measure and record."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b" if cuda else "tiny")
    parser.add_argument("--tokens", type=int, default=16_384 if cuda else 512, help="packed tokens of the row")
    parser.add_argument("--prompt", type=int, default=512 if cuda else 32)
    parser.add_argument("--answer", type=int, default=512 if cuda else 8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    figures: dict[str, Any] = {}
    own: Backend = "flex" if cuda else "sdpa"
    variants: list[tuple[str, Backend, bool, bool]] = [("shared", own, True, False), ("plain", own, False, False)]
    variants.append(("shared_checkpointed", own, True, True))
    if cuda:
        variants.append(("shared_sdpa", "sdpa", True, False))
    for label, backend, share, checkpointing in variants:
        batch = make_batch(args.tokens, args.prompt, args.answer, args.samples, SHAPES[args.shape]["vocabulary"], share)
        model = build(args.shape, device, checkpointing, backend)
        seconds, memory = measure(model, batch, args.steps, args.warmup)
        del model
        gc.collect()
        flops = model_flops(args.shape, batch)
        figures[f"{label}_packed_tokens"] = batch.n_packed
        figures[f"{label}_packed_tokens_per_s"] = [batch.n_packed / s for s in seconds]
        figures[f"{label}_trajectory_tokens_per_s"] = [batch.unshared_tokens / s for s in seconds]
        figures[f"{label}_tflops"] = [flops / s / 1e12 for s in seconds]
        if peak is not None:
            figures[f"{label}_mfu"] = [flops / s / 1e12 / peak for s in seconds]
        if cuda:
            figures[f"{label}_peak_gib"] = memory
    record(
        f"learner_{device}",
        settings={**vars(args), "dtype": "bfloat16 autocast" if cuda else "float32", "peak_tflops": peak},
        figures=figures,
    )


if __name__ == "__main__":
    main()
