"""The distribution over a list of candidates: by hand, by enumeration, and consistent token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.choices import Choice, candidate_logprobs, divisor, edge_logprobs, expectation, make_forest, make_trie, segment_logsumexp

LISTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6, unique=True).map(tuple)


def test_two_candidates_by_hand() -> None:
    """'walk left' (1, 2) and 'walk right' (1, 3, 4): the first token is certain, the second decides, the third is certain."""
    forest, (first,) = make_forest([(((1, 2), (1, 3, 4)), (1.0, 1.0))])
    lm = torch.tensor([-0.5, -1.0, -0.5, -2.0, -0.25])
    left, right = math.exp(-1.5), math.exp(-2.75)
    expected = [math.log(left / (left + right)), math.log(right / (left + right))]
    assert candidate_logprobs(lm, forest).tolist() == pytest.approx(expected, abs=1e-6)
    edges = edge_logprobs(lm, forest)
    paths = make_trie(((1, 2), (1, 3, 4))).paths
    assert [edges[first + e].item() for e in paths[0]] == pytest.approx([0.0, expected[0]], abs=1e-6)
    assert [edges[first + e].item() for e in paths[1]] == pytest.approx([0.0, expected[1], 0.0], abs=1e-6)
    entropy = -expectation(edges, edges, forest)
    p = math.exp(expected[0])
    by_hand = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert [entropy[e].item() for e in paths[1]] == pytest.approx([0.0, by_hand, 0.0], abs=1e-6)


def test_word_normalisation_by_hand() -> None:
    """TWOSOME's example of why N(a) matters: a long action is not punished for its length."""
    forest, _ = make_forest([(((1,), (2, 3, 4)), (1.0, 3.0))])
    lm = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    assert candidate_logprobs(lm, forest).exp().tolist() == pytest.approx([0.5, 0.5])
    assert divisor("walk to the pancake", [5, 6, 7, 8, 9], "word") == 4
    assert divisor("walk to the pancake", [5, 6, 7, 8, 9], "token") == 5
    assert divisor("walk to the pancake", [5, 6, 7, 8, 9], "sum") == 1


@settings(deadline=None, max_examples=150)
@given(lists=st.lists(LISTS, min_size=1, max_size=3), seed=st.integers(0, 1000), how=st.sampled_from(["word", "token", "sum"]))
def test_tokens_add_up_to_the_action_and_every_node_is_a_distribution(lists: list, seed: int, how: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    divisors = [[divisor("a b", c, how) for c in candidates] for candidates in lists]  # type: ignore[arg-type]
    forest, firsts = make_forest(list(zip(lists, divisors, strict=True)))
    lm = -torch.rand(sum(len(c) for candidates in lists for c in candidates), generator=generator, dtype=torch.float64) * 3
    actions, edges = candidate_logprobs(lm, forest), edge_logprobs(lm, forest)
    number = 0
    for candidates, first in zip(lists, firsts, strict=True):
        for path in make_trie(candidates).paths:
            assert edges[[first + e for e in path]].sum().item() == pytest.approx(actions[number].item(), abs=1e-6)
            number += 1
    totals = torch.zeros(forest.n_nodes, dtype=torch.float64).index_add(0, forest.node, edges.exp())
    assert torch.allclose(totals, torch.ones_like(totals), atol=1e-6)
    sums = torch.zeros(forest.n_lists, dtype=torch.float64).index_add(0, forest.candidate_list, actions.exp())
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)


def test_sampling_token_by_token_is_sampling_the_action() -> None:
    """One candidate begins another, so its last token also decides to stop."""
    candidates = ((1,), (1, 2), (1, 2, 3), (4,))
    forest, _ = make_forest([(candidates, (1.0, 2.0, 3.0, 1.0))])
    lm = torch.log(torch.tensor([0.3, 0.3, 0.6, 0.3, 0.6, 0.2, 0.1], dtype=torch.float64))
    edges, actions = edge_logprobs(lm, forest).exp(), candidate_logprobs(lm, forest).exp()
    trie = make_trie(candidates)
    reached = [math.prod(edges[e].item() for e in path) for path in trie.paths]
    assert reached == pytest.approx(actions.tolist(), abs=1e-9)
    assert trie.n_nodes == 3, "root, after 1, after 1 2"


def test_gradients_are_those_of_the_plain_softmax() -> None:
    candidates = ((1, 2), (1, 3), (4,))
    forest, (first,) = make_forest([(candidates, (2.0, 2.0, 1.0))])
    lm = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    path = [first + e for e in make_trie(candidates).paths[1]]
    (ours,) = torch.autograd.grad(edge_logprobs(lm, forest)[path].sum(), lm)
    scores = torch.stack([(lm[0] + lm[1]) / 2, (lm[2] + lm[3]) / 2, lm[4]])
    (plain,) = torch.autograd.grad(scores.log_softmax(0)[1], lm)
    assert torch.allclose(ours, plain, atol=1e-12)


def test_segments_far_apart_in_size_keep_their_precision() -> None:
    x = torch.tensor([-1000.0, -1000.0, 0.0, 500.0])
    got = segment_logsumexp(x, torch.tensor([0, 0, 1, 1]), 2)
    assert got.tolist() == pytest.approx([-1000 + math.log(2), 500.0])


@pytest.mark.parametrize("candidates", [(), ((),), ((1,), (1,))])
def test_lists_that_cannot_be_chosen_from_are_refused(candidates: tuple) -> None:
    with pytest.raises(ValueError, match="candidates"):
        make_trie(candidates)


def test_a_choice_must_be_one_of_its_list() -> None:
    with pytest.raises(ValueError, match="choice 2 of 2"):
        Choice(candidates=((1,), (2,)), divisors=(1.0, 1.0), chosen=2)
