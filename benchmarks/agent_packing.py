"""Seconds of an update on a batch of actions in FoodPreparation, with prefix-tree packing and without.

The environment has 18 observations, so a batch of 128 actions repeats few prompts and few lists of candidates. Forward and
backward pass of log-probs over the lists, entropy and value in float32, sides alternating. Without sharing, every candidate
of every action is a row of its own, as in the reference code; its cost grows with the batch, so its time is measured on the
first ``--plain-actions`` of the batch and scaled by the number of tokens it computes.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks._agents import Encoder, trajectories
from benchmarks._record import alternate, ratios, record
from benchmarks.prefix_packing import train
from reasoner_ray.config import ModelConfig
from reasoner_ray.learner.model import load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.models import load_tokenizer, resolve_model
from reasoner_ray.packing import pack


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--actions", type=int, default=128)
    parser.add_argument("--plain-actions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    encoder = Encoder(load_tokenizer(resolve_model(args.model)))
    model = load_policy(ModelConfig(path=args.model, dtype="float32"), LearnerConfig())
    batch = trajectories(encoder, args.actions)
    shared = pack(batch, tokens_per_microbatch=4096)
    whole = pack(batch, tokens_per_microbatch=4096, share_prefixes=False)
    part = pack(trajectories(encoder, args.plain_actions), tokens_per_microbatch=4096, share_prefixes=False)
    scale = sum(b.n_packed for b in whole) / sum(b.n_packed for b in part)
    seconds = alternate({"shared": train(model, shared), "plain": train(model, part)}, args.repeats)
    plain = [s * scale for s in seconds["plain"]]
    record(
        "agent_packing",
        settings={**vars(args), "dtype": "float32", "threads": torch.get_num_threads()},
        figures={
            "tokens_shared": sum(b.n_packed for b in shared),
            "tokens_plain": sum(b.n_packed for b in whole),
            "tokens_plain_measured": sum(b.n_packed for b in part),
            "seconds_shared": seconds["shared"],
            "seconds_plain_scaled": plain,
            "speedup": ratios(plain, seconds["shared"]),
        },
    )


if __name__ == "__main__":
    main()
