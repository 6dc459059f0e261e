"""Actions chosen from lists, in packed rows: the learner's numbers against a plain enumeration of the list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reasoner_ray.choices import Choice
from reasoner_ray.config import ModelConfig
from reasoner_ray.learner.model import PolicyModel, load_policy
from reasoner_ray.learner.settings import LearnerConfig
from reasoner_ray.packing import pack, unpack
from reasoner_ray.trajectory import Status, Trajectory, TrajectoryBuilder, flatten

OBSERVATIONS = [[11, 12, 13, 14], [11, 12, 13, 15, 16], [21, 22]]
LISTS = [((5, 6), (5, 7, 8), (9,)), ((5, 6), (5,), (30, 31, 32)), ((40, 41), (42, 41))]


def episode(states: list[int], moves: list[int], *, forget: bool, group: str = "g", status: Status = Status.FINISHED) -> Trajectory:
    """An episode that meets ``states`` and picks candidate ``moves`` of each state's list."""
    builder = TrajectoryBuilder(id="t", group_id=group, task="test")
    for turn, (state, move) in enumerate(zip(states, moves, strict=True)):
        choice = Choice(candidates=LISTS[state], divisors=tuple(float(len(c)) for c in LISTS[state]), chosen=move)
        builder.add_env(OBSERVATIONS[state], turn=turn, new_context=forget and turn > 0)
        n = len(choice.tokens)
        builder.add_model(choice.tokens, [-1.0] * n, [0] * n, turn=turn, choice=choice)
    return builder.build(status)


def episodes(forget: bool) -> list[Trajectory]:
    plain = TrajectoryBuilder(id="p", group_id="h", task="test")  # free text beside them
    plain.add_env(OBSERVATIONS[0])
    plain.add_model([5, 7, 9], [-1.0] * 3, [0] * 3)
    return [
        episode([0, 1, 2], [0, 2, 1], forget=forget),
        episode([0, 0, 1, 2], [1, 1, 1, 0], forget=forget, group="h"),
        plain.build(),
        episode([2, 1], [0, 0], forget=forget, status=Status.TRUNCATED),
    ]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> PolicyModel:
    return load_policy(
        ModelConfig(path=str(tiny_model_dir), dtype="float32"), LearnerConfig(critic="shared", critic_hidden=(16,)), needs_reference=True
    )


def enumerated(lm: Any, trajectories: list[Trajectory]) -> tuple[list[float], list[float]]:
    """Log-prob and entropy of every trainable token, candidate by candidate, each a forward pass of its own."""
    logprobs, entropies = [], []
    for t in trajectories:
        for span in (s for s in t.spans if s.kind == "model"):
            before = t.tokens[span.context_start : span.start].tolist()
            if span.choice is None:
                steps = lm(torch.tensor([before + t.tokens[span.start : span.end].tolist()])).logits[0].log_softmax(-1)
                for i in range(span.start, span.end):
                    row = steps[i - span.context_start - 1]
                    logprobs.append(row[t.tokens[i]].item())
                    entropies.append(-(row.exp() * row).sum().item())
                continue
            scores = []
            for c, n in zip(span.choice.candidates, span.choice.divisors, strict=True):
                steps = lm(torch.tensor([[*before, *c]])).logits[0].log_softmax(-1)
                scores.append(sum(steps[len(before) - 1 + j, token].item() for j, token in enumerate(c)) / n)
            p = np.exp(scores) / np.exp(scores).sum()
            chosen = span.choice.tokens
            for j in range(len(chosen)):
                below = [c for c in span.choice.candidates if c[:j] == chosen[:j] and len(c) > j]
                mass: dict[tuple[int, bool], float] = {}
                for c in below:
                    place = (c[j], j == len(c) - 1)
                    mass[place] = mass.get(place, 0.0) + p[span.choice.candidates.index(c)]
                q = {k: v / sum(mass.values()) for k, v in mass.items()}
                logprobs.append(float(np.log(q[chosen[j], j == len(chosen) - 1])))
                entropies.append(-sum(v * float(np.log(v)) for v in q.values()))
    return logprobs, entropies


@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("budget", [12, 40, 1000])
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_and_entropies_equal_an_enumeration(
    policy: PolicyModel, tiny_model_dir: Path, forget: bool, budget: int, share: bool
) -> None:
    from transformers import AutoModelForCausalLM

    trajectories = episodes(forget)
    batches = pack(trajectories, tokens_per_microbatch=budget, share_prefixes=share)
    with torch.no_grad():
        outs = [policy(batch) for batch in batches]
        reference = [policy.reference_logprobs(batch) for batch in batches]
        expected, entropies = enumerated(AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval(), trajectories)
    n = flatten(trajectories).n_tokens
    assert unpack(batches, [o.logprobs for o in outs], n).tolist() == pytest.approx(expected, abs=2e-5)
    assert unpack(batches, [o.entropy for o in outs], n).tolist() == pytest.approx(entropies, abs=2e-5)
    assert unpack(batches, reference, n).tolist() == pytest.approx(expected, abs=2e-5)
    if budget == 1000:
        assert sum(b.n_packed for b in batches) < sum(b.unshared_tokens for b in batches) or not share


def gradients(policy: PolicyModel, trajectories: list[Trajectory], budget: int, share: bool) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    for batch in pack(trajectories, tokens_per_microbatch=budget, share_prefixes=share):
        out = policy(batch)
        weight = torch.sin(batch.stream_index.float() + 1)
        (weight * (out.logprobs + 0.3 * out.entropy + out.values)).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forget", [True, False])
def test_gradients_do_not_depend_on_sharing_or_cut(policy: PolicyModel, forget: bool) -> None:
    with torch.no_grad():
        policy.value_head.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    trajectories = episodes(forget)
    whole = gradients(policy, trajectories, 1000, True)
    for budget, share in ((1000, False), (25, True), (25, False)):
        other = gradients(policy, trajectories, budget, share)
        assert other.keys() == whole.keys()
        for name, gradient in whole.items():
            assert torch.allclose(gradient, other[name], atol=1e-5 * float(gradient.abs().max()) + 1e-7), name


def test_a_list_met_many_times_is_computed_once() -> None:
    once = pack([episode([0, 1], [0, 1], forget=True)], tokens_per_microbatch=1000, bootstrap="none")[0]
    many = [episode([0, 1, 0, 1], [i % 3, (i + 1) % 3, 2, 0], forget=True, group=str(i)) for i in range(20)]
    often = pack(many, tokens_per_microbatch=1000)[0]
    assert often.n_packed == once.n_packed and len(often.targets) == len(once.targets)
    assert often.n_trained == sum(t.trainable_tokens for t in many)


def test_a_span_must_hold_its_choice() -> None:
    builder = TrajectoryBuilder(id="t", group_id="g", task="test")
    builder.add_env([1, 2])
    builder.add_model([9, 9], [-1.0] * 2, [0] * 2, choice=Choice(candidates=((5, 6), (7,)), divisors=(1.0, 1.0), chosen=0))
    with pytest.raises(ValueError, match="candidate that was chosen"):
        builder.build()
