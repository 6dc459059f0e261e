"""Packing loses nothing, shares every shared prefix, and keeps to its budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.packing import Batch, pack, unpack, unpack_bootstrap
from reasoner_ray.trajectory import Status, Trajectory, flatten
from tests.forest import CASES, answers, forests, trajectory


def context(batch: Batch, i: int) -> list[int]:
    """The tokens that packed token i may attend to, itself included."""
    visible = [j for j in range(i + 1) if i < batch.subtree_end[j]]
    assert batch.position_ids[visible].tolist() == list(range(len(visible)))
    return batch.tokens[visible].tolist()


def seen_before(t: Trajectory, i: int) -> list[int]:
    """The tokens that token i of a trajectory sees."""
    start = max(s for s in t.context_starts if s <= i)
    return [int(x) for x in t.tokens[start:i]]


def assert_lossless(trajectories: list[Trajectory], batches: list[Batch]) -> None:
    """Every trainable token, and every wanted last state, appears once and in its own context."""
    expected = [(seen_before(t, i), int(t.tokens[i])) for t in trajectories for i in np.flatnonzero(t.loss_mask)]
    seen: list[int] = []
    ends: list[int] = []
    for batch in batches:
        assert len(set(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True))) == len(batch.targets)
        for source, state, k in zip(batch.source.tolist(), batch.states.tolist(), batch.stream_index.tolist(), strict=True):
            assert batch.predictors[source] == state
            assert (context(batch, state), int(batch.targets[source])) == expected[k]
            seen.append(k)
        for i, number in zip(batch.bootstrap, batch.bootstrap_trajectory.tolist(), strict=True):
            assert context(batch, int(i)) == seen_before(trajectories[number], len(trajectories[number].tokens))
            ends.append(number)
    assert sorted(seen) == list(range(len(expected)))
    assert sorted(ends) == [i for i, t in enumerate(trajectories) if t.status is Status.TRUNCATED and t.trainable_tokens]


@settings(deadline=None, max_examples=200)
@given(trajectories=forests(), budget=st.integers(1, 60), share=st.booleans())
def test_packing_is_lossless_within_its_budget(trajectories: list[Trajectory], budget: int, share: bool) -> None:
    batches = pack(trajectories, tokens_per_microbatch=budget, share_prefixes=share)
    assert_lossless(trajectories, batches)
    for batch in batches:
        one_trajectory = batch.unshared_tokens == batch.n_packed and len(context(batch, batch.n_packed - 1)) == batch.n_packed
        assert batch.n_packed <= budget or one_trajectory


@settings(deadline=None, max_examples=100)
@given(trajectories=forests())
def test_one_row_computes_each_distinct_prefix_once(trajectories: list[Trajectory]) -> None:
    batches = pack(trajectories, tokens_per_microbatch=10**6, bootstrap="none")
    prefixes = set()
    for t in trajectories:
        if t.trainable_tokens:
            prefixes |= {tuple(seen_before(t, i)[: n + 1]) for i in np.flatnonzero(t.loss_mask) for n in range(len(seen_before(t, i)))}
    assert sum(b.n_packed for b in batches) == len(prefixes)


@settings(deadline=None, max_examples=50)
@given(trajectories=forests(), budget=st.integers(1, 60))
def test_unpack_inverts_pack(trajectories: list[Trajectory], budget: int) -> None:
    batches = pack(trajectories, tokens_per_microbatch=budget)
    streams = flatten(trajectories)
    tokens = torch.tensor([int(t.tokens[i]) for t in trajectories for i in np.flatnonzero(t.loss_mask)], dtype=torch.int64)
    assert torch.equal(unpack(batches, [b.targets[b.source] for b in batches], streams.n_tokens), tokens if batches else torch.zeros(0))
    last = unpack_bootstrap(batches, [b.tokens[b.bootstrap] for b in batches], len(trajectories))
    wanted = [t.status is Status.TRUNCATED and t.trainable_tokens > 0 for t in trajectories]
    assert last.tolist() == [float(t.tokens[-1]) if w else 0.0 for t, w in zip(trajectories, wanted, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_cases_are_lossless(case: str) -> None:
    trajectories = CASES[case]()
    for budget in (10, 40, 1000):
        assert_lossless(trajectories, pack(trajectories, tokens_per_microbatch=budget))


def test_a_group_that_fits_a_row_is_not_split() -> None:
    prompts = answers(0, 3, 20)
    groups = [[trajectory([(p, a)], group=str(i)) for a in answers(i, 4, 6)] for i, p in enumerate(prompts)]
    batches = pack([t for g in groups for t in g], tokens_per_microbatch=60)  # a group takes 20 + 4 * 5 tokens
    assert [b.n_packed for b in batches] == [40, 40, 40]
    assert [b.unshared_tokens for b in batches] == [100, 100, 100]


def test_padding_adds_tokens_that_nothing_sees() -> None:
    batch = pack(CASES["multi_turn"](), tokens_per_microbatch=1000)[0]
    padded = batch.padded(64)
    assert padded.n_packed == 64 and padded.n_trained == batch.n_trained
    assert context(padded, batch.n_packed - 1) == context(batch, batch.n_packed - 1)
    assert context(padded, 63) == [0]


def test_large_sets_pack_fast_enough_to_be_ignored() -> None:
    prompt = answers(0, 1, 1000)[0]
    trajectories = [trajectory([(prompt, a)], group=str(i % 40)) for i, a in enumerate(answers(1, 320, 100))]
    batches = pack(trajectories, tokens_per_microbatch=8192)
    assert sum(b.n_trained for b in batches) == 32_000


def test_budget_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_microbatch"):
        pack([], tokens_per_microbatch=0)
