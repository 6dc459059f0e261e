"""Steps as the policy samples them: kept once, cut ones counted, priors by hand, costs to the token."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from reasoner_ray.rollout.engine import Generation, Sampling
from reasoner_ray.scoring.step_scorers import Likelihood, StepScorerContext, score_steps
from reasoner_ray.search.policy import StepPolicy
from reasoner_ray.steps import Partial, segment
from tests.rollout.fakes import ScriptedEngine
from tests.search.toy import EOS, PROMPT, TOKENIZER


def ids(text: str) -> list[int]:
    return [int(t) for t in TOKENIZER.encode(text)]


class Sayings(ScriptedEngine):
    """Says these texts one after the other, each with its log-prob a token; a text without an end is cut."""

    def __init__(self, *sayings: tuple[str, float], eos: bool = False) -> None:
        super().__init__(lambda _: ([], "stop"))
        self.sayings = list(sayings)

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        self.calls.append((list(prompt), sampling, n, order))
        text, logprob = self.sayings.pop(0)
        tokens = ids(text.removesuffix("$")) + [EOS] * text.endswith("$")
        stopped = text.endswith("$") or any(stop in text for stop in sampling.stop)
        tokens = tokens[: sampling.max_new_tokens]
        reason: Any = "stop" if stopped else "length"
        return [Generation(tokens=tokens, logprobs=[logprob] * len(tokens), versions=[7] * len(tokens), finish_reason=reason, cached=2)]


def policy(engine: Any, **changes: Any) -> StepPolicy:
    values: dict[str, Any] = {"separator": "\n", "step_tokens": 6, "max_context": 100, "sampling": Sampling(max_new_tokens=20), **changes}
    return StepPolicy(engine, TOKENIZER, **values)


def test_equal_steps_are_kept_once_and_priors_are_shares_of_mean_likelihoods() -> None:
    engine = Sayings(("1\n", -0.2), ("2 3\n", -1.0), ("1\n", -0.2), ("9$", -2.0), ("1 2 3 4 5 6 7 8", -0.1))
    made = policy(engine)
    steps = asyncio.run(made.steps(Partial.root(PROMPT), 5))
    assert [TOKENIZER.decode(s.tokens) for s in steps] == ["1\n", "2 3\n", "9" + TOKENIZER.eos_token]
    assert [s.end for s in steps] == ["step", "step", "solution"]
    total = math.exp(-0.2) + math.exp(-1.0) + math.exp(-2.0)
    assert [s.prior for s in steps] == pytest.approx([math.exp(-0.2) / total, math.exp(-1.0) / total, math.exp(-2.0) / total])
    assert steps[0].partial == Partial.root(PROMPT).then(ids("1\n"))
    cost = made.cost
    sampled = [len(ids(t)) for t in ("1\n", "2 3\n", "1\n", "9")] + [1, 6]
    assert (cost.generated, cost.discarded, cost.cut, cost.requests) == (sum(sampled), len(ids("1\n")) + 6, 1, 5)
    assert (cost.prompt, cost.prompt_cached, cost.prompt_computed) == (5 * len(PROMPT), 10, 5 * (len(PROMPT) - 2))
    assert all(call[1].stop == ("\n",) and call[1].max_new_tokens == 6 and call[2] == 1 for call in engine.calls)


def test_an_answers_stop_string_ends_the_solution_wherever_it_is_completed() -> None:
    engine = Sayings(("a\n", -1), ("\n", -1), ("b\n", -1))
    made = policy(engine, sampling=Sampling(max_new_tokens=20, stop=("\n\n",)))
    root = Partial.root(PROMPT)
    (first,) = asyncio.run(made.steps(root, 1))
    assert first.end == "step"
    (second,) = asyncio.run(made.steps(first.partial, 1))
    assert second.end == "solution", "the second of two line breaks"
    same = policy(Sayings(("a\n", -1)), sampling=Sampling(max_new_tokens=20, stop=("\n",)))
    assert asyncio.run(same.steps(root, 1))[0].end == "solution", "where both are the same, the solution ends"


def test_an_end_of_text_alone_makes_the_last_step_longer() -> None:
    made = policy(Sayings(("a\n", -1.0), ("$", -3.0), ("$", -3.0)))
    (first,) = asyncio.run(made.steps(Partial.root(PROMPT), 1))
    (last,) = asyncio.run(made.steps(first.partial, 1))
    assert last.end == "solution" and len(last.partial.ends) == 1
    step = len(ids("a\n"))
    assert made.known_logprobs[last.partial.tokens] == pytest.approx((-1.0 * step - 3.0) / (step + 1))
    assert last.partial.ends == tuple(segment(last.partial.tokens, TOKENIZER, "\n", len(PROMPT)))
    (empty,) = asyncio.run(made.steps(Partial.root(PROMPT), 1))
    assert empty.partial.ends == (len(PROMPT) + 1,)


def test_steps_of_a_number_of_tokens() -> None:
    made = policy(Sayings(("1 2 3 4", -1), ("1$", -1), ("7 8 9", -1)), separator=2)
    steps = asyncio.run(made.steps(Partial.root(PROMPT), 2))
    assert sorted((len(s.tokens), s.end) for s in steps) == [(2, "solution"), (2, "step")]
    tight = policy(Sayings(("7 8 9", -1)), separator=2, sampling=Sampling(max_new_tokens=1))
    assert asyncio.run(tight.steps(Partial.root(PROMPT), 1)) == [] and tight.cost.cut == 1, "no room for a whole step"


def test_no_room_is_a_cut_without_a_request() -> None:
    engine = Sayings()
    made = policy(engine, max_context=len(PROMPT))
    assert asyncio.run(made.steps(Partial.root(PROMPT), 3)) == []
    assert asyncio.run(made.complete(Partial.root(PROMPT), 2)) == []
    assert (made.cost.cut, made.cost.requests, engine.calls) == (5, 0, [])


def test_whole_continuations_are_cut_into_steps() -> None:
    made = policy(Sayings(("b\nc$", -1.0), ("d\ne f g", -2.0)))
    begun = Partial.root(PROMPT).then(ids("a\n"))
    whole, cut = asyncio.run(made.complete(begun, 2, temperature=0.0))
    assert [TOKENIZER.decode(s) for s in whole.partial.steps] == ["a\n", "b\n", "c" + TOKENIZER.eos_token]
    assert (whole.end, cut.end, made.cost.cut) == ("solution", "cut", 1)
    assert made._engine.calls[0][1].temperature == 0.0  # type: ignore[attr-defined]
    assert made._engine.calls[0][1].stop == ()  # type: ignore[attr-defined]
    assert made.text(whole.partial) == "a\nb\nc"


def two_words(text: str) -> list[int]:
    """A step is two words, wherever a line ends."""
    places = [m.end() for m in re.finditer(r"\S+", text)]
    return places[1::2]


def test_steps_by_structure_are_cut_out_of_what_was_sampled() -> None:
    """No stop string closes them: what stands behind the step's end is thrown away and counted."""
    engine = Sayings(("one two three four", -0.5), ("five$", -1.0), ("one two three", -0.5))
    made = policy(engine, separator=two_words, step_tokens=20)
    (first,) = asyncio.run(made.steps(Partial.root(PROMPT), 1))
    assert TOKENIZER.decode(first.tokens) == "one two" and first.end == "step"
    assert first.partial == Partial.root(PROMPT).then(ids("one two")) and len(first.logprobs) == len(first.versions) == len(ids("one two"))
    assert made.cost.discarded == len(ids("one two three four")) - len(ids("one two")) and engine.calls[0][1].stop == ()
    (last,) = asyncio.run(made.steps(first.partial, 1))
    assert last.end == "solution" and len(last.partial.ends) == 2
    tight = policy(Sayings(("one two three", -0.5)), separator=two_words, step_tokens=1)
    assert asyncio.run(tight.steps(Partial.root(PROMPT), 1)) == [] and tight.cost.cut == 1, "no step came to its end"


def test_whole_continuations_are_cut_by_the_structure_of_the_whole_text() -> None:
    made = policy(Sayings((" two three four five$", -1.0)), separator=two_words, sampling=Sampling(max_new_tokens=60))
    begun = Partial.root(PROMPT).then(ids("one"))
    (whole,) = asyncio.run(made.complete(begun, 1))
    assert [TOKENIZER.decode(s).strip() for s in whole.partial.steps] == ["one", "two", "three four", "five" + TOKENIZER.eos_token]
    assert whole.partial.ends[-1] == len(whole.partial.tokens)


def test_a_step_may_begin_with_words_that_were_written_for_the_policy() -> None:
    engine = Sayings((" b\n", -0.5), (" c$", -0.5), (" d\ne$", -0.5))
    made = policy(engine, sampling=Sampling(max_new_tokens=20, stop=("X",)))
    begun, lead = Partial.root(PROMPT).then(ids("a\n")), ids("X:")
    (step,) = asyncio.run(made.steps(begun, 1, lead=lead))
    assert engine.calls[0][0] == [*begun.tokens, *lead] and step.end == "step", "a stop string in the lead stops nothing"
    assert step.partial == begun.then([*lead, *ids(" b\n")]) and list(step.lead) == lead and list(step.tokens) == ids(" b\n")
    assert made.known_logprobs == {}, "nobody knows how likely the lead was"
    (last,) = asyncio.run(made.steps(step.partial, 1))
    assert last.end == "solution", "nor does it stop later"
    (whole,) = asyncio.run(made.complete(begun, 1, lead=lead))
    assert [TOKENIZER.decode(s) for s in whole.partial.steps] == ["a\n", "X: d\n", "e" + TOKENIZER.eos_token]
    assert made.cost.generated == sum(len(ids(t)) for t in (" b\n", " c", " d\ne")) + 2
    assert made.reopened(step) is step
    again = made.reopened(last)
    assert again is not None and again.end == "step" and again.partial == step.partial.then(ids(" c"))
    assert len(again.logprobs) == len(again.tokens) == len(ids(" c")) and made.cost.discarded == 1


def test_the_likelihood_is_what_the_policy_sampled_with_or_what_the_engine_says() -> None:
    """Steps sampled here cost nothing to score; others cost a forward pass, and a mean over each step's own tokens."""

    class Counting(Sayings):
        async def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
            return [-float(i + 1) for i in range(len(tokens) - 1)]  # of token i + 1

    engine = Counting(("1\n", -0.2))
    made = policy(engine)
    (step,) = asyncio.run(made.steps(Partial.root(PROMPT), 1))
    context = StepScorerContext(config=None, engine=engine, tokenizer=TOKENIZER, known_logprobs=made.known_logprobs)  # type: ignore[arg-type]
    scorer = Likelihood(context)
    assert asyncio.run(score_steps(scorer, [step.partial])) == [[pytest.approx(math.exp(-0.2))]]
    assert scorer.tokens == 0
    strange = Partial((4, 5, 6, 7, 8), (3, 5), 2)
    assert asyncio.run(score_steps(scorer, [strange])) == [pytest.approx([math.exp(-2), math.exp(-3.5)])]
    assert scorer.tokens == 5
    asyncio.run(score_steps(scorer, [strange]))
    assert scorer.tokens == 5, "asked again it costs nothing"


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_log_probs_of_another_distribution_are_not_the_models_likelihood(changes: dict[str, Any]) -> None:
    made = policy(Sayings(("1\n", -0.2)), sampling=Sampling(max_new_tokens=20, **changes))
    asyncio.run(made.steps(Partial.root(PROMPT), 1))
    assert made.known_logprobs == {}
