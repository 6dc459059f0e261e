"""rStar's five actions: what may follow what, whose words are whose, and models that pay no heed to a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from reasoner_ray.errors import ConfigError
from reasoner_ray.rollout.engine import Generation, Sampling
from reasoner_ray.search.core import Search, run_search
from reasoner_ray.search.methods import get_method
from reasoner_ray.search.tree import Node, from_json, to_json
from reasoner_ray.steps import segment
from tests.rollout.fakes import ScriptedEngine
from tests.search.test_episode import run
from tests.search.toy import EOS, PROMPT, TOKENIZER, DigitEngine, job, make, solve

LEADS = {
    "subquestion": "Sub-question:",
    "answer": "Answer to the sub-question:",
    "again": "The sub-question answered anew, step by step:",
    "rephrase": "The question in other words:",
}


class Talker(ScriptedEngine):
    """Says what the line it is to go on with asks for; plain lines are thoughts, and the third ends a solution."""

    def __init__(self, ends_what: tuple[str, ...] = ()) -> None:
        super().__init__(lambda _: ([EOS], "stop"))
        self.ends_what, self.said = ends_what, 0

    async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
        self.calls.append((list(prompt), sampling, n, order))
        line = TOKENIZER.decode(list(prompt)).rpartition("\n")[2]
        self.said += 1
        kind = next((name for name, lead in LEADS.items() if line == lead), "thought")
        whole = "\n" not in sampling.stop
        text = {
            "subquestion": " what is 1 + 1?",
            "rephrase": " 2 + 2?",
            "answer": f" 2 or {self.said}",
            "again": f" it is {self.said}",
        }.get(kind, f"so {self.said} is 4")
        ends = whole or kind in self.ends_what or (kind == "thought" and len(prompt) > 60)
        tokens = [int(t) for t in TOKENIZER.encode(text if ends else text + "\n")] + [EOS] * ends
        return [Generation(tokens=tokens, logprobs=[-0.5] * len(tokens), versions=[4] * len(tokens), finish_reason="stop", cached=0)]


def four(text: str) -> str:
    return "4" if text.rstrip().endswith("4") else ""


def search(engine: Any, **options: Any) -> Search[Any]:
    config = job("rstar", {"rollouts": 24, "direct": 2, "checks": 0, **options}, step_tokens=40)
    made = make(config, engine, tokens=150)
    made.policy._max_context = 300
    made.read_answer = four
    asyncio.run(run_search(made, get_method(config.search)))
    return made


def text_of(node: Node) -> str:
    return TOKENIZER.decode(list(node.own_tokens))


def test_each_action_is_taken_where_the_paper_allows_it() -> None:
    made = search(Talker(), rephrased=2)
    below: dict[str, set[str]] = {}
    for node in made.root.walk():
        below.setdefault(node.action, set()).update(child.action for child in node.children or [])
    think = {"step", "rest"}
    assert below[""] == {*think, "subquestion", "rephrase"}
    assert below["rephrase"] == {*think, "subquestion"}
    assert below["step"] == think
    assert below["subquestion"] == {"answer", "again"}
    assert below["answer"] == below["again"] == {*think, "subquestion"}
    assert below["rest"] == set(), "it ends the solution"
    assert all(node.action not in ("subquestion", "rephrase") for node in made.root.walk() if node.terminal)
    assert {s.answer for s in made.found} == {"4"}


def test_prompts_stand_on_lines_of_their_own_and_belong_to_no_policy() -> None:
    made = search(Talker())
    seen = set()
    for node in made.root.walk():
        if node.action in LEADS:
            seen.add(node.action)
            before, own = len(node.partial.tokens) - len(node.own_tokens), list(node.own_tokens)
            assert TOKENIZER.decode(own[: node.given]) == LEADS[node.action], "the lines before it are closed"
            assert TOKENIZER.decode(list(node.partial.tokens[:before])).endswith("\n")
        elif node.parent is not None:
            assert node.given == 0
        assert len(node.logprobs) == len(node.versions) == len(node.own_tokens) - node.given
        assert node.partial.ends == tuple(segment(node.partial.tokens, TOKENIZER, "\n", len(PROMPT))), (
            "a prompt and its answer are one step"
        )
    assert seen == {*LEADS}
    again = next(node for node in made.root.walk() if node.action == "again" and node.depth == 2)
    assert "it is" in text_of(again) and LEADS["answer"] not in TOKENIZER.decode(list(again.partial.tokens)), "it does not see the first"


def test_a_prompt_begins_a_new_line_where_the_context_does_not() -> None:
    made = make(job("rstar", {"prompts": {"step": "Thought:"}, "actions": ["step"], "rollouts": 1, "checks": 0}), Talker(), tokens=150)
    made.root.partial = type(made.root.partial).root([int(t) for t in TOKENIZER.encode("2 + 2 =")])
    made.policy._max_context = 300
    asyncio.run(run_search(made, get_method(made.config)))
    assert text_of((made.root.children or [])[0]).startswith("\nThought:so ")


def test_a_sub_question_that_ends_the_text_does_not_end_the_solution() -> None:
    """An instruct model likes to stop after each line; the end-of-text is taken back, and counted."""
    made = search(Talker(ends_what=("subquestion", "rephrase")))
    asked = [node for node in made.root.walk() if node.action in ("subquestion", "rephrase")]
    assert asked and all(EOS not in node.partial.tokens and not node.terminal for node in asked)
    assert any(node.children for node in asked if node.action == "subquestion")
    assert made.policy.cost.discarded >= len(asked)
    ended = search(Talker(ends_what=("answer",)))
    answers = [node for node in ended.root.walk() if node.action == "answer"]
    assert answers and all(node.terminal for node in answers), "an answer may be the last word"


@pytest.mark.parametrize("lines", [3, 1, 0])
def test_a_model_that_pays_no_heed_to_prompts_gives_valid_trees(lines: int) -> None:
    """It goes on with its digits whatever it is asked, or never closes a line."""
    for seed in range(3):
        result, made = solve("rstar", {"rollouts": 12, "direct": 4}, engine=DigitEngine(lines=lines, seed=seed), seed=seed, tokens=60)
        for node in result.root.walk():
            assert node.partial.ends[-1:] in ((), (len(node.partial.tokens),))
            assert len(node.logprobs) == len(node.own_tokens) - node.given
            assert node.terminal or node.partial.tokens[-1] != EOS, "nothing follows an end-of-text"
            for child in node.children or []:
                assert child.partial.tokens[: len(node.partial.tokens)] == node.partial.tokens
        assert (result.choice is None) == (lines == 0)
        tokens = sum(len(node.own_tokens) - node.given for node in result.root.walk())
        assert tokens <= made.policy.cost.generated, "prompts are not generated tokens"


def test_a_stop_string_in_a_sub_question_leaves_it_out() -> None:
    """A task whose solution is one line: a closed sub-question would have ended it."""
    config = job("rstar", {"rollouts": 3, "direct": 2, "checks": 0}, step_tokens=40)
    made = make(config, Talker(), tokens=150)
    made.policy._max_context = 300
    made.policy.sampling = Sampling(max_new_tokens=150, stop=("\n",))
    asyncio.run(run_search(made, get_method(config.search)))
    actions = {node.action for node in made.root.walk()}
    assert actions <= {"", "step", "rest"} and made.found


def test_answers_that_mean_the_same_are_one_direct_answer() -> None:
    class Halves(ScriptedEngine):
        async def generate(self, prompt: Sequence[int], sampling: Sampling, n: int = 1, order: str = "") -> list[Generation]:
            self.calls.append((list(prompt), sampling, n, order))
            text = ("7", "1/2", "7", "0.5", "2/4")[(len(self.calls) - 1) % 5]
            tokens = [*TOKENIZER.encode(text), EOS]
            return [Generation(tokens=tokens, logprobs=[-1.0] * len(tokens), versions=[0] * len(tokens), finish_reason="stop")]

    made = make(job("rstar", {"actions": ["rest"], "direct": 5, "rollouts": 1, "checks": 0}), Halves(lambda _: ([], "stop")))
    made.read_answer = str.strip
    made.group_answers = lambda answers: [0 if a == "7" else 1 for a in answers]
    asyncio.run(run_search(made, get_method(made.config)))
    (direct,) = made.root.children or []
    assert direct.value == direct.prior == pytest.approx(3 / 5) and made.found[0].answer != "7"


def test_solutions_without_an_answer_agree_with_nothing() -> None:
    """Most of what is written has no answer: that is not what most agree on."""
    settings = {"actions": ["step"], "width": 6, "rollouts": 24, "checks": 4}
    made = make(job("rstar", settings), DigitEngine((1, 1, 1)))
    made.read_answer = lambda text: "2" if text.startswith("2") else ""
    result = asyncio.run(run_search(made, get_method(made.config)))
    mute = [s for s in made.found if not s.answer]
    heard = [s for s in made.found if s.answer]
    assert mute and heard
    assert all(s.node.q == 0 and s.value == 0 for s in mute)
    assert all(s.node.q == 1 for s in heard), "among those that say something all agree"
    assert max(s.value for s in heard) > 0 and result.answer == "2"


def test_no_scorer_is_started_where_agreement_rewards() -> None:
    config = job("rstar").search
    assert config.answers is None and not get_method(config).uses_scorer(config)
    voting = config.model_copy(update={"answers": "max"})
    assert not get_method(voting).uses_scorer(voting), "its solutions have values of its own"
    scored = job("rstar", {"reward": "scorer"}).search
    assert get_method(scored).uses_scorer(scored)
    broken = {"name": "function", "args": {"path": "tests.search.step_functions:raises"}}
    assert solve("rstar", {"actions": ["step"], "rollouts": 4}, scorer=broken)[0].choice is not None


def test_a_chosen_path_with_prompts_is_a_trajectory_whose_prompts_are_not_trained_on() -> None:
    (trajectory,) = run(
        "search", Talker(), method="rstar", settings={"rollouts": 12, "direct": 1, "actions": ["subquestion", "rest"]}, tokens=50
    )
    prompts = [s for s in trajectory.spans if s.kind == "env"][1:]
    for span in prompts:
        assert TOKENIZER.decode(trajectory.tokens[span.start : span.end]) in LEADS.values()
        assert not trajectory.loss_mask[span.start : span.end].any()
    np.testing.assert_allclose(trajectory.behaviour_logprobs[trajectory.loss_mask], -0.5)
    assert [s.step for s in trajectory.spans if s.kind == "model"] == list(range(sum(s.kind == "model" for s in trajectory.spans)))


def test_trees_keep_whose_words_are_whose() -> None:
    made = search(Talker())
    plain = to_json(made.root, made.found[0].node, lambda partial, start: "")
    root, _ = from_json(plain)
    assert [(n.action, n.given) for n in root.walk()] == [(n.action, n.given) for n in made.root.walk()]
    for node in (plain["root"], *plain["root"]["children"]):
        del node["given"], node["action"]  # as trees were written before
    assert next(from_json(plain)[0].walk()).given == 0


def test_settings_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.settings\.actions: .*no action ends a solution"):
        job("rstar", {"actions": ["subquestion"]})
    with pytest.raises(ConfigError, match=r"again answers a sub-question anew: take subquestion as well"):
        job("rstar", {"actions": ["rest", "again"]})
    with pytest.raises(ConfigError, match=r"search\.settings\.prompts\.rephrasing: unknown setting"):
        job("rstar", {"prompts": {"rephrasing": "x"}})
