"""What a learner says of trajectories that it does not learn from: the held-out figures of supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch

from reasoner_ray.packing import Batch, pack

if TYPE_CHECKING:
    from reasoner_ray.learner.learner import Learner
    from reasoner_ray.trajectory import Trajectory


@torch.no_grad()
def predict(learner: Learner, trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of the trainable tokens, by their place in the order of ``flatten``, and what the model says of each.

    That is the value of the state before it where the objective has a head, else its log-prob (nats): int64 [k] and float32 [k].
    Every rank gives the same trajectories; together the shares are all of them.
    """
    settings, engine, values = learner.config.learner, learner.engine, learner.algorithm.needs_critic
    batches = pack(
        trajectories, tokens_per_microbatch=settings.tokens_per_microbatch, share_prefixes=settings.share_prefixes, bootstrap="none"
    )
    own = batches[engine.rank :: engine.world_size]
    rounds = -(-len(batches) // engine.world_size)  # all ranks must compute equally often
    places, said = [], []
    for batch in own + [Batch.empty()] * (rounds - len(own)):
        out = engine.forward(batch, want_values=values, want_entropy=False, want_q=False, want_target=False)
        found = out.values if values else out.logprobs
        assert found is not None
        places.append(batch.stream_index)
        said.append(found.float().cpu())
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64), torch.cat(said) if said else torch.zeros(0)


def predict_stored(learner: Learner, stored: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``predict`` on the trajectories behind a reference to them, given in a list of its own."""
    (trajectories,) = ray.get(list(stored))
    return predict(learner, trajectories)
