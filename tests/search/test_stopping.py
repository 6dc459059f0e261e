"""Stopping by a belief: numbers by hand, agreement never delays, calibration keeps its promise."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasoner_ray.data.tasks import Item
from reasoner_ray.errors import DataError
from reasoner_ray.rollout.engine import Generation
from reasoner_ray.search.core import run_search
from reasoner_ray.search.methods import get_method
from reasoner_ray.search.results import make_record, recorded_samples
from reasoner_ray.search.settings import StoppingConfig
from reasoner_ray.search.stopping import Replay, Sampled, belief, calibrate, entropy, is_settled, samples_needed
from tests.search.step_functions import first_digit
from tests.search.test_episode import run as search_episode
from tests.search.toy import EOS, TOKENIZER, DigitEngine, digit, job, make

ALIKE = {"name": "function", "args": {"path": "tests.search.step_functions:all_alike"}}

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


def test_a_threshold_is_not_chosen_for_lucky_guesses_beyond_one_that_costs_too_much() -> None:
    luckier = 0
    for seed in range(30):
        recorded = questions(24, seed)
        replay = Replay(recorded, StoppingConfig())
        found = calibrate(recorded, StoppingConfig(), tolerance=0.0)
        tried = [replay.run(level) for level in replay.levels]
        assert all(c.accuracy >= c.fixed_accuracy for c in tried if c.threshold <= found.threshold)
        assert found.tokens_saved == max(c.tokens_saved for c in tried if c.threshold <= found.threshold)
        luckier += any(c.accuracy >= c.fixed_accuracy and c.tokens_saved > found.tokens_saved for c in tried)
    assert luckier, "in none of the sets a later threshold does as well: nothing was tested"


def test_a_threshold_of_zero_stops_nowhere_and_nothing_recorded_is_said() -> None:
    never = Replay(questions(20), StoppingConfig()).run(0.0)
    assert (never.tokens_saved, never.accuracy) == (0.0, never.fixed_accuracy)
    with pytest.raises(DataError, match="no recorded samples"):
        Replay([], StoppingConfig())


class Tape(DigitEngine):
    """Solutions in an order that is the same however many are asked for at once: a line each, some cut, some without an answer."""

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        super().__init__(source.choice([(6, 2, 1, 2, 0.5), (1, 1, 1, 1, 1)]), seed=seed)

    def _one(self, prompt: list[int], sampling: Any) -> Generation:
        kind = self.random.choices(range(5), self.weights)[0]
        cut = self.random.random() < 0.25
        tokens = [digit(kind)] * self.random.randint(1, 5) + ([] if cut else [EOS])
        logprobs = [-self.random.random() for _ in tokens]
        reason = "length" if cut else "stop"
        return Generation(tokens=tokens, logprobs=logprobs, versions=[0] * len(tokens), finish_reason=reason)  # type: ignore[arg-type]


def reward(text: str) -> float:
    """Right (0, and of 1 what is short) with a good form, right without it, wrong with a good form; no answer: nothing."""
    return 1.1 if text[:1] == "0" else 1.0 if text.startswith("1") and len(text) < 3 else 0.1


def recorded(seed: int, answers: Any) -> dict[str, Any]:
    """The line of a run that took all samples."""
    settings = {"paths": 12}
    read = "tests.search.step_functions:first_digit"
    found = search_episode(
        "search_solutions", Tape(seed), method="self_consistency", settings=settings, read_answer=read, answers=answers, scorer=ALIKE
    )
    rewards = [reward(TOKENIZER.decode(t.tokens[t.loss_mask].tolist(), skip_special_tokens=True)) for t in found]
    return make_record(seed, Item(id=str(seed), prompt="", answer=None), found, rewards)


@pytest.mark.parametrize(("answers", "wave", "threshold"), [(None, 1, 0.9), (None, 4, 1.1), ("vote", 3, 1.2), ("max", 2, 1.0)])
def test_a_replay_is_what_a_search_with_that_threshold_does(answers: Any, wave: int, threshold: float) -> None:
    """Same samples, same number of them taken, same tokens, same answer: with cut samples and unreadable answers among them."""
    stopping = {"threshold": threshold, "least": 3}
    lines = [recorded(seed, answers) for seed in range(40)]
    replay = Replay(recorded_samples(lines), StoppingConfig(**stopping), wave, answers or "majority")
    told = zip(replay.taken(threshold), replay.questions(threshold), strict=True)
    early = 0
    for line, (n, (right, fixed, used, total)) in zip(lines, told, strict=True):
        config = job("self_consistency", {"paths": 12, "wave": wave}, stopping=stopping, answers=answers, scorer=ALIKE)
        made = make(config, Tape(line["index"]))
        made.read_answer = first_digit
        result = asyncio.run(run_search(made, get_method(config.search)))
        assert (result.cost.requests, result.cost.generated) == (n, used)
        assert total == line["cost"]["generated"] and fixed == (line["correct"] >= 1)
        assert result.choice is None or right == (reward(result.solutions[result.choice.index].text) >= 1)
        early += result.ended == "settled"
    assert 5 < early < 40
    assert any(line["cost"]["cut"] for line in lines) and any(not s["answer"] for line in lines for s in line["solutions"])


def test_a_question_whose_samples_were_all_cut_costs_tokens_and_is_as_right_as_it_was() -> None:
    sampled = Sampled((None, None), (False, False), (7, 9), (False, False), (0.0, 0.0))
    assert Replay([sampled], StoppingConfig(threshold=9), 1).questions(9) == [(False, False, 16, 16)]


@given(groups_of, st.floats(0.05, 1.5), st.integers(1, 4), st.integers(1, 5))
def test_a_replay_stops_where_a_search_would(groups: list[int], threshold: float, wave: int, least: int) -> None:
    settings = StoppingConfig(threshold=threshold, least=least)
    sampled = Sampled(tuple(groups), (True,) * len(groups), (1,) * len(groups))
    assert Replay([sampled], settings, wave).taken(threshold) == [samples_needed(groups, settings, wave)]
