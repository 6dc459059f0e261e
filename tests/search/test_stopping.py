"""Stopping by a belief: numbers by hand, agreement never delays, calibration keeps its promise."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.errors import DataError
from reasoner_ray.search.settings import StoppingConfig
from reasoner_ray.search.stopping import Replay, Sampled, belief, calibrate, entropy, is_settled, samples_needed

groups_of = st.lists(st.integers(0, 3), min_size=1, max_size=16)


def test_belief_and_entropy_by_hand() -> None:
    assert belief([3, 1], unseen=1.0) == pytest.approx([0.6, 0.2, 0.2])
    assert entropy([0.6, 0.2, 0.2]) == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)))
    assert entropy([1.0, 0.0]) == 0.0
    assert belief([], unseen=0.5) == [1.0]
    # Eight of one answer and nothing else: ln 9 - 8/9 ln 8 = .349 nats; three: .562.
    assert is_settled([0] * 8, StoppingConfig(threshold=0.35))
    assert not is_settled([0] * 3, StoppingConfig(threshold=0.5))
    assert not is_settled([0], StoppingConfig(threshold=10, least=2))


@given(groups_of, st.floats(0.05, 1.5))
def test_one_more_for_the_leading_answer_never_unsettles(groups: list[int], threshold: float) -> None:
    settings = StoppingConfig(threshold=threshold)
    leader = Counter(groups).most_common(1)[0][0]
    if is_settled(groups, settings):
        assert is_settled([*groups, leader], settings)


@given(groups_of, st.floats(0.05, 1.5), st.integers(0, 15))
def test_more_agreement_never_needs_more_samples(groups: list[int], threshold: float, place: int) -> None:
    """Turn a sample against the answer that leads all along into one for it."""
    settings = StoppingConfig(threshold=threshold)
    sequence = [0, 0, *groups]
    leads = all(Counter(sequence[: n + 1]).most_common(1)[0][0] == 0 for n in range(len(sequence)))
    if not leads:
        return
    agreeing = list(sequence)
    agreeing[min(place, len(sequence) - 1)] = 0
    assert samples_needed(agreeing, settings) <= samples_needed(sequence, settings)


@given(groups_of, st.floats(0.05, 1.0), st.floats(0.0, 0.5), st.integers(1, 5))
def test_a_higher_threshold_never_needs_more_samples(groups: list[int], threshold: float, more: float, wave: int) -> None:
    low = samples_needed(groups, StoppingConfig(threshold=threshold), wave)
    assert samples_needed(groups, StoppingConfig(threshold=threshold + more), wave) <= low <= len(groups)


def questions(n: int, seed: int = 0) -> list[Sampled]:
    """Easy and hard ones: the right answer, 0, has a probability of its own in each."""
    source = random.Random(seed)
    found = []
    for _ in range(n):
        p = source.choice([0.95, 0.9, 0.6, 0.2])
        groups = tuple(0 if source.random() < p else source.randrange(1, 5) for _ in range(16))
        first = {g: i for i, g in enumerate(dict.fromkeys(groups))}
        found.append(Sampled(tuple(first[g] for g in groups), tuple(g == 0 for g in groups), (10,) * 16))
    return found


def test_calibration_saves_tokens_and_keeps_the_accuracy_it_was_asked_for() -> None:
    recorded = questions(200)
    found = calibrate(recorded, StoppingConfig(), tolerance=0.01, wave=2)
    assert found.accuracy >= found.fixed_accuracy - 0.01
    assert found.tokens_saved > 0.3
    assert found == Replay(recorded, StoppingConfig(), wave=2).run(found.threshold)
    careful = calibrate(recorded, StoppingConfig(), tolerance=0.0, wave=2)
    assert careful.accuracy >= careful.fixed_accuracy and careful.tokens_saved <= found.tokens_saved
    later = Replay(questions(200, seed=1), StoppingConfig(), wave=2).run(found.threshold)
    assert later.accuracy >= later.fixed_accuracy - 0.03, "it holds on questions it was not calibrated on"


def test_a_threshold_of_zero_stops_nowhere_and_nothing_recorded_is_said() -> None:
    never = Replay(questions(20), StoppingConfig()).run(0.0)
    assert (never.tokens_saved, never.accuracy) == (0.0, never.fixed_accuracy)
    with pytest.raises(DataError, match="no recorded samples"):
        Replay([], StoppingConfig())


@given(groups_of, st.floats(0.05, 1.5), st.integers(1, 4), st.integers(1, 5))
def test_a_replay_stops_where_a_search_would(groups: list[int], threshold: float, wave: int, least: int) -> None:
    settings = StoppingConfig(threshold=threshold, least=least)
    sampled = Sampled(tuple(groups), (True,) * len(groups), (1,) * len(groups))
    assert Replay([sampled], settings, wave).taken(threshold) == [samples_needed(groups, settings, wave)]
