"""What every step scorer must keep to, and how a user's own function is called."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Sequence
from typing import Any

import pytest

from reasoner_ray.errors import ConfigError, ScorerGaveUp, ScoringError
from reasoner_ray.scoring.step_scorers import STEP_SCORERS, FunctionStepScorer, StepScorerContext, score_steps
from reasoner_ray.steps import Partial
from tests.conftest import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
CONTEXT = StepScorerContext(config=None, engine=None, tokenizer=TOKENIZER)  # type: ignore[arg-type]


class Fixed:
    """Gives these scores whatever it is asked."""

    tokens = 0

    def __init__(self, *scores: list[float]) -> None:
        self.scores = list(scores)

    async def score(self, partials: Sequence[Partial]) -> list[list[float]]:
        return self.scores


def asked(scorer: Any, *partials: Partial) -> list[list[float]]:
    return asyncio.run(score_steps(scorer, partials))


TWO = Partial((1, 2, 3, 4), (2, 4), 1)
NONE = Partial((1,), (), 1)


def test_one_score_a_step() -> None:
    assert asked(Fixed([0.5, -1.0], []), TWO, NONE) == [[0.5, -1.0], []]
    assert asked(Fixed([1.0])) == [], "nobody is asked about nothing"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.5, 0.5]], "Fixed answered 2 solutions with 1 lists of scores"),
        ([[0.5], []], "Fixed gave 1 scores for a solution of 2 steps"),
        ([[0.5, 0.5], [0.0]], "Fixed gave 1 scores for a solution of 0 steps"),
        ([[0.5, float("inf")], []], "not finite"),
    ],
)
def test_scores_that_do_not_fit_are_an_error_and_no_zero(scores: list[list[float]], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        asked(Fixed(*scores), TWO, NONE)


def test_a_users_function_gets_texts_without_special_tokens() -> None:
    prompt, first, second = ([int(t) for t in TOKENIZER.encode(text)] for text in ("what?\n", "one\n", "four4"))
    partial = Partial.root(prompt).then(first).then([*second, TOKENIZER.eos_token_id])
    scorer = FunctionStepScorer(CONTEXT, path="tests.search.step_functions:lengths", args={"factor": 2})
    assert asked(scorer, partial) == [[12.0, 10.0]]
    assert scorer.tokens == 0


def test_a_function_that_cannot_be_found_is_named() -> None:
    with pytest.raises(ConfigError, match=r"search\.scorer\.args\.path: cannot import 'no_such_module'"):
        asyncio.run(FunctionStepScorer(CONTEXT, path="no_such_module:f").start())
    with pytest.raises(ConfigError, match=r"search\.scorer\.args: timeout_s must be above 0"):
        FunctionStepScorer(CONTEXT, path="no_such_module:f", timeout_s=0)
    with pytest.raises(ConfigError, match="unknown step scorer 'likelyhood'; did you mean 'likelihood'"):
        STEP_SCORERS.get("likelyhood")


def solution(*words: str) -> Partial:
    partial = Partial.root([int(t) for t in TOKENIZER.encode("what?\n")])
    for word in words:
        partial = partial.then([int(t) for t in TOKENIZER.encode(f"{word}\n")])
    return partial


def test_a_function_that_hangs_or_dies_is_a_status_and_the_next_is_scored() -> None:
    """Never a hang, never a 0; solutions that are scored at the same time have their scores."""
    scorer = FunctionStepScorer(CONTEXT, path="tests.search.step_functions:hangs_on", args={"word": "stuck"}, timeout_s=0.5)

    async def story() -> list[Any]:
        await scorer.start()
        return await asyncio.gather(
            score_steps(scorer, [solution("good")]),
            score_steps(scorer, [solution("good"), solution("so", "stuck")]),
            score_steps(scorer, [solution("die")]),
            score_steps(scorer, [solution("fine", "too")]),
            return_exceptions=True,
        )

    began = time.monotonic()
    good, hung, died, fine = asyncio.run(story())
    assert time.monotonic() - began < 60
    assert good == [[1.0]] and fine == [[1.0, 1.0]]
    assert isinstance(hung, ScorerGaveUp) and hung.error_type == "Timeout" and "no answer within 0.5 s" in str(hung)
    assert isinstance(died, ScorerGaveUp) and died.error_type == "Died" and "exited with status 7" in str(died)
    assert pickle.loads(pickle.dumps(hung)).error_type == "Timeout", "it comes through Ray as it is"
    assert scorer._pool.restarts == 2
