"""Trained samples a second with prefix-tree packing and without, and with a padded batch as most trainers run it.

Groups of 8 samples of one prompt that is four times as long as the answers; forward and backward pass of log-probs,
entropy and value in float32, sides alternating.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks._record import alternate, ratios, record
from reasoner_ray.config import ModelConfig
from reasoner_ray.learner.model import PolicyModel, load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.packing import Batch, pack
from reasoner_ray.trajectory import Trajectory, TrajectoryBuilder


def make_group(group: int, prompt_length: int, answer_length: int, samples: int, vocabulary: int) -> list[Trajectory]:
    """Random tokens: the cost does not depend on what they say."""
    rng = np.random.default_rng(group)
    prompt = rng.integers(0, vocabulary, prompt_length).tolist()
    made = []
    for i in range(samples):
        builder = TrajectoryBuilder(id=f"{group}-{i}", group_id=str(group), task="benchmark")
        builder.add_env(prompt)
        builder.add_model(rng.integers(0, vocabulary, answer_length).tolist(), [0.0] * answer_length, [0] * answer_length)
        made.append(builder.build())
    return made


def train(model: PolicyModel, batches: list[Batch]) -> Callable[[], None]:
    """A forward and backward pass over every batch."""

    def run() -> None:
        for batch in batches:
            out = model(batch)
            assert out.entropy is not None and out.values is not None
            (out.logprobs.mean() + 0.01 * out.entropy.mean() + out.values.square().mean()).backward()
        model.zero_grad()

    return run


def train_padded(model: PolicyModel, trajectories: list[Trajectory]) -> Callable[[], None]:
    """The same by transformers' own forward pass over a [samples, length] batch with logits of every position."""
    tokens = torch.from_numpy(np.stack([t.tokens for t in trajectories]).astype(np.int64))
    answer = trajectories[0].trainable_tokens

    def run() -> None:
        model.lm.set_attn_implementation("sdpa")
        logits = model.lm(tokens, use_cache=False).logits[:, -answer - 1 : -1]
        logp = torch.log_softmax(logits, dim=-1)
        chosen = logp.gather(2, tokens[:, -answer:, None])
        (chosen.mean() - 0.01 * (logp.exp() * logp).sum(-1).mean()).backward()
        model.zero_grad()
        model.lm.set_attn_implementation("reasoner_tree")

    return run


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer; the prompt has four times as many")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = load_policy(ModelConfig(path=args.model, dtype="float32"), LearnerConfig())
    vocabulary = model.head.weight.shape[0]
    groups = [make_group(g, 4 * args.answer, args.answer, args.samples, vocabulary) for g in range(args.groups)]
    trajectories = [t for group in groups for t in group]
    shared = pack(trajectories, tokens_per_microbatch=4096)
    plain = pack(trajectories, tokens_per_microbatch=4096, share_prefixes=False)
    sides = {"shared": train(model, shared), "plain": train(model, plain), "padded": train_padded(model, trajectories)}
    seconds = alternate(sides, args.repeats)
    record(
        "prefix_packing",
        settings={**vars(args), "prompt": 4 * args.answer, "dtype": "float32", "threads": torch.get_num_threads()},
        figures={
            "packed_tokens_shared": sum(b.n_packed for b in shared),
            "packed_tokens_plain": sum(b.n_packed for b in plain),
            **{f"samples_per_s_{side}": [len(trajectories) / s for s in times] for side, times in seconds.items()},
            "speedup_over_plain_packing": ratios(seconds["plain"], seconds["shared"]),
            "speedup_over_padded_batch": ratios(seconds["padded"], seconds["shared"]),
        },
    )


if __name__ == "__main__":
    main()
