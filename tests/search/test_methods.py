"""Every method on a world whose answer is known: finds it where it can, keeps its budget, and fails in the open."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoner_ray.errors import ConfigError, ScoringError
from reasoner_ray.search.core import SEARCHES, _best_unfinished, run_search
from reasoner_ray.search.gumbel import GumbelOptions, halving_visits, interior, sigma
from reasoner_ray.search.mcts import move_shares
from reasoner_ray.search.methods import get_method
from reasoner_ray.search.tree import Node
from reasoner_ray.steps import Partial
from tests.search.step_functions import TARGET
from tests.search.toy import EOS, PROMPT, DigitEngine, digit, job, make, solve

GUIDED: dict[str, dict[str, Any]] = {
    "best_of_n": {"paths": 600},
    "beam": {"paths": 2, "width": 24},
    "dfs": {"width": 24},
    "mcts": {"paths": 6, "width": 24},
    "mcts_alpha": {"width": 24, "simulations": 12},
    "mcts_rollout": {"width": 24, "paths": 20, "simulations": 120},
    "gumbel": {"width": 24, "simulations": 32, "c_scale": 1.0},
    "rstar": {"actions": ["step"], "width": 24, "rollouts": 60, "reward": "scorer", "checks": 0},
}
NARROW: dict[str, dict[str, Any]] = {
    "beam": {"paths": 1, "width": 1},
    "dfs": {"width": 1},
    "mcts": {"paths": 2, "width": 1},
    "cot_sc_tree": {"paths": 2, "width": 1},
    "mcts_alpha": {"width": 1, "simulations": 2},
    "mcts_rollout": {"width": 1, "paths": 2, "simulations": 20},
    "gumbel": {"width": 1, "simulations": 4},
    "rstar": {"actions": ["step"], "width": 1, "rollouts": 4},
}


def test_every_method_is_tested_here() -> None:
    assert set(SEARCHES.names()) == {*GUIDED, *NARROW, "greedy", "self_consistency"}


@pytest.mark.parametrize("method", GUIDED)
def test_a_guided_method_finds_what_the_policy_seldom_says(method: str) -> None:
    """The policy says the target in 1.2 % of its solutions; a search guided by its value says it always."""
    for seed in range(3):
        result, search = solve(method, GUIDED[method], seed=seed, answers="max" if method == "best_of_n" else "vote")
        assert result.answer == TARGET, f"seed {seed}: {result.answer}"
        assert result.ended == "done"
        assert result.chosen is not None and result.chosen.terminal
        assert result.cost.generated == sum(n for n in _generated(search))
        assert 0 < result.confidence <= 1


def _generated(search: Any) -> list[int]:
    """Tokens of every node of the tree, and what was thrown away: together what was sampled."""
    return [len(node.own_tokens) for node in search.root.walk()] + [search.policy.cost.discarded]


@pytest.mark.parametrize("method", NARROW)
def test_a_tree_of_width_1_works(method: str) -> None:
    result, _ = solve(method, NARROW[method])
    assert len(result.answer) == 3 and result.choice is not None
    assert all(len(node.children or [0]) == 1 for node in result.root.walk())


@pytest.mark.parametrize("method", [*GUIDED, "cot_sc_tree", "self_consistency", "greedy"])
def test_a_model_that_never_closes_a_step_is_cut_and_counted(method: str) -> None:
    result, search = solve(method, GUIDED.get(method, {}), engine=DigitEngine(lines=0), tokens=8)
    assert result.solutions == () and result.choice is None and result.answer == "" and result.confidence == 0
    assert search.policy.cost.cut > 0 and search.policy.cost.cut == search.policy.cost.requests
    assert all(not node.terminal for node in result.root.walk())


@pytest.mark.parametrize("method", ["beam", "dfs", "mcts", "mcts_alpha", "mcts_rollout", "gumbel", "rstar", "cot_sc_tree"])
def test_depth_is_a_limit(method: str) -> None:
    options = {**NARROW[method], "width": 2}
    result, _ = solve(method, options, depth=2)
    assert result.choice is None and result.ended == "done"
    assert max(node.depth for node in result.root.walk()) <= 2
    assert result.unfinished is not None and len(result.unfinished.partial.ends) == 2
    assert result.chosen is result.unfinished


@pytest.mark.parametrize("resource", ["generated", "prompt"])
@pytest.mark.parametrize("method", [*GUIDED, "cot_sc_tree", "self_consistency"])
def test_a_search_stops_at_its_budget(method: str, resource: str) -> None:
    limit = 60
    result, _ = solve(method, GUIDED.get(method, {"paths": 200}), budget={resource: limit})
    spent = result.cost.generated if resource == "generated" else result.cost.prompt_computed
    assert result.ended == resource
    step = 24 * 2 + 4 * 8  # what was under way: one expansion, or a wave of whole solutions
    assert limit <= spent <= limit + (4 * step if resource == "prompt" or method in ("beam", "rstar") else step)
    assert result.chosen is not None, "the best so far comes back"


@pytest.mark.parametrize("method", [*GUIDED, "cot_sc_tree", "self_consistency"])
def test_a_search_stops_when_its_time_is_up(method: str) -> None:
    """A second a request: by the clock a search has at most what was under way then."""
    engine = DigitEngine()
    result, _ = solve(
        method, GUIDED.get(method, {"paths": 200}), engine=engine, clock=lambda: float(len(engine.calls)), budget={"seconds": 30}
    )
    assert result.ended == "seconds" and result.chosen is not None
    assert 30 <= len(engine.calls) <= 30 + 24 * (2 if method in ("beam", "rstar") else 1)


@pytest.mark.parametrize("method", GUIDED)
def test_a_search_stops_when_its_scorer_has_computed_enough(method: str) -> None:
    result, _ = solve(method, GUIDED[method], scorer={"name": "likelihood"}, temperature=0.5, budget={"scorer": 40})
    assert result.ended == "scorer" and 40 <= result.cost.scorer <= 40 + 2 * 24 * 24
    assert result.chosen is not None


def test_budgets_of_scorer_tokens_and_of_seconds() -> None:
    likelihood = {"name": "likelihood"}
    cold = solve("mcts", {"paths": 50, "width": 3}, scorer=likelihood, temperature=0.5, budget={"scorer": 30})[0]
    assert cold.ended == "scorer" and cold.cost.scorer >= 30
    warm = solve("mcts", {"paths": 5, "width": 3}, scorer=likelihood)[0]
    assert warm.cost.scorer == 0, "at temperature 1 the policy knew the likelihood when it sampled"
    assert solve("mcts", {"paths": 50, "width": 3}, budget={"seconds": 1e-9})[0].ended == "seconds"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("one_score_too_few", r"step_functions:one_score_too_few gave 0 scores for a solution of 1 steps"),
        ("not_a_number", r"not finite"),
        ("raises", r"raises raised OSError: no such file"),
    ],
)
def test_scores_that_do_not_fit_the_steps_are_an_error(function: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        solve("mcts", scorer={"name": "function", "args": {"path": f"tests.search.step_functions:{function}"}})


def test_what_no_one_reads_is_not_scored() -> None:
    broken = {"name": "function", "args": {"path": "tests.search.step_functions:raises"}}
    for method in ("greedy", "self_consistency", "cot_sc_tree"):
        assert solve(method, scorer=broken)[0].choice is not None
        with pytest.raises(ScoringError, match="raised OSError"):
            solve(method, scorer=broken, answers="vote")


def test_greedy_and_self_consistency_by_hand() -> None:
    broken = {"name": "function", "args": {"path": "tests.search.step_functions:raises"}}
    assert solve("greedy", scorer=broken)[0].answer == "000"
    result, search = solve("self_consistency", {"paths": 40}, scorer=broken)
    votes = Counter(s.answer for s in search.found)
    assert result.answer == votes.most_common(1)[0][0]
    assert result.confidence == pytest.approx(votes[result.answer] / 40)
    assert len(search.policy._engine.calls) == 40  # type: ignore[attr-defined]


def test_mcts_goes_back_where_a_way_is_closed() -> None:
    """Only lines that begin with 2 can be ended; a search must leave the others behind."""

    class ClosedEngine(DigitEngine):
        def _one(self, prompt: list[int], sampling: Any) -> Any:
            own = prompt[len(PROMPT) :]
            from tests.search.toy import digit

            self.lines = 3 if not own or own[0] == digit(2) else 0
            return super()._one(prompt, sampling)

    for method in ("mcts", "mcts_rollout", "dfs", "cot_sc_tree"):
        flat = {"name": "function", "args": {"path": "tests.search.step_functions:all_alike"}}
        result, _ = solve(method, {**NARROW[method], "paths": 2, "width": 12, **_simulations(method)}, engine=ClosedEngine(), scorer=flat)
        assert result.choice is not None and {s.answer[0] for s in result.solutions} == {"2"}


def _simulations(method: str) -> dict[str, int]:
    return {"simulations": 200} if method == "mcts_rollout" else {"prune_ratio": 0} if method == "dfs" else {}  # type: ignore[dict-item]


def test_alpha_and_rollout_sample_steps_late() -> None:
    """One simulation values a child and samples nothing below it; the second visit expands it."""
    result, search = solve("mcts_rollout", {"width": 3, "paths": 9, "simulations": 1})
    assert [n.children is not None for n in result.root.walk()].count(True) == 1
    result, search = solve("mcts_rollout", {"width": 3, "paths": 9, "simulations": 2})
    assert search.root.visits == 2


def test_alpha_keeps_the_subtree_and_repeats_with_noise() -> None:
    settings = {"width": 12, "simulations": 6, "paths": 3, "sample_moves": True}
    result, search = solve("mcts_alpha", settings)
    assert len(result.solutions) == 3
    assert sum(child.prior for child in search.root.children or []) == pytest.approx(1), "noise is taken back"
    again, _ = solve("mcts_alpha", settings)
    assert [s.answer for s in again.solutions] == [s.answer for s in result.solutions], "the same seed, the same search"
    fresh, _ = solve("mcts_alpha", {**settings, "new_tree": True})
    assert len({id(s.node.path[0]) for s in fresh.solutions}) == 3
    assert fresh.chosen is not None and fresh.chosen.path[0] is fresh.root, "the tree that is kept is the chosen solution's"


def test_moves_are_drawn_by_their_visits() -> None:
    """N^(1/T), which is 0 for what was never visited: a hot draw must not take that."""
    assert move_shares([0, 1, 4], 2.0) == pytest.approx([0, 1 / 3, 2 / 3])
    assert move_shares([0, 0], 1.0) == [0.5, 0.5], "where none was visited one must be taken all the same"
    assert move_shares([3, 1000], 0.001) == pytest.approx([0, 1]), "a power that overflows"
    for seed in range(5):
        settings = {"width": 12, "simulations": 1, "sample_moves": True, "move_temperature": 8.0}
        result, _ = solve("mcts_alpha", settings, seed=seed)
        assert result.chosen is not None and all(node.visits for node in result.chosen.path[1:])


@pytest.mark.parametrize("method", ["mcts_alpha", "gumbel"])
def test_solutions_in_the_tree_are_not_thrown_away_by_a_budget(method: str) -> None:
    """A move to a step that goes on, and no tokens left to go on with: the tree holds two solutions, and the better one is the answer."""

    class TwoEnd(DigitEngine):
        def _one(self, prompt: list[int], sampling: Any) -> Any:
            generation = super()._one(prompt, sampling)
            return generation if generation.tokens[0] == digit(2) else replace(generation, tokens=[generation.tokens[0], EOS])

    def search(**more: Any) -> Any:
        scorer = {"name": "function", "args": {"path": "tests.search.step_functions:last_digit"}}
        settings = {"width": 12, "simulations": 8, **({"c_scale": 1.0} if method == "gumbel" else {})}
        return solve(method, settings, engine=TwoEnd((1, 1, 1)), budget={"generated": 3}, scorer=scorer, **more)[0]

    result = search()
    assert sum(node.terminal for node in result.root.walk()) == 2 and result.ended == "generated"
    assert [s.answer for s in result.solutions] == ["1", "0"], "the most valuable first"
    assert result.answer == "1" and result.chosen is not None and result.chosen.terminal
    settled = search(stopping={"threshold": 5.0, "least": 1})
    assert settled.ended == "generated", "what ended the search was not the belief over what it holds"


def test_solutions_in_the_tree_are_not_thrown_away_where_the_way_closes() -> None:
    """The most valuable first step leads nowhere; the solutions beside it were left behind."""

    class Trap(DigitEngine):
        def _one(self, prompt: list[int], sampling: Any) -> Any:
            self.lines = 3 if len(prompt) == len(PROMPT) else 0
            generation = super()._one(prompt, sampling)
            return generation if generation.tokens[0] == digit(2) else replace(generation, tokens=[generation.tokens[0], EOS])

    scorer = {"name": "function", "args": {"path": "tests.search.step_functions:last_digit"}}
    for method, size in (("beam", {"paths": 1, "width": 12}), ("mcts_alpha", {"width": 12, "simulations": 8})):
        result, _ = solve(method, size, engine=Trap((1, 1, 1)), scorer=scorer)
        assert result.ended == "done" and result.answer == "1", method


def test_beam_narrows_where_a_solution_ends_and_dfs_leaves_children_out() -> None:
    """First steps 0 and 1 end a solution, 2 goes on; a step is worth its digit."""

    class TwoGoesOn(DigitEngine):
        def _one(self, prompt: list[int], sampling: Any) -> Any:
            generation = super()._one(prompt, sampling)
            first = len(prompt) == len(PROMPT)
            return replace(generation, tokens=[generation.tokens[0], EOS]) if first and generation.tokens[0] != digit(2) else generation

    scorer = {"name": "function", "args": {"path": "tests.search.step_functions:last_digit"}}
    result, _ = solve("beam", {"paths": 2, "width": 12}, engine=TwoGoesOn((1, 1, 1)), scorer=scorer)
    assert [s.answer[0] for s in result.solutions] == ["1", "2"] and len(result.solutions[1].answer) == 3
    widest = max(sum(n.children is not None for n in result.root.walk() if n.depth == depth) for depth in range(3))
    assert widest == 1, "one has ended, so one is left of the two that are kept"
    found = {}
    for name, extra in {"half": {"prune_ratio": 0.5}, "all": {"prune_ratio": 0}, "value": {"prune_ratio": 0, "prune_value": 0.15}}.items():
        result, _ = solve("dfs", {"paths": 99, "width": 12, **extra}, engine=TwoGoesOn((1, 1, 1)), scorer=scorer)
        found[name] = {s.answer[0] for s in result.solutions}
    assert found == {"half": {"1", "2"}, "all": {"0", "1", "2"}, "value": {"2"}}, "of 3 children rank 0 and 1 are within half of 3"


def test_the_best_way_is_its_value_before_its_length() -> None:
    root = Node(Partial.root(PROMPT))
    good = Node(root.partial.then([5]), value=0.9, parent=root)
    longer = Node(root.partial.then([6]), value=0.1, parent=root)
    longer.children = [Node(longer.partial.then([7]), value=0.1, parent=longer)]
    root.children = [good, longer]
    assert _best_unfinished(root) is good
    good.value = 0.1
    assert _best_unfinished(root) is longer.children[0], "of equal ones the longest"


def test_rstar_keeps_what_another_go_agrees_with() -> None:
    """The engine says 0 first or 1 first; after the beginning of a solution with 1 it never says the same again."""

    class Fickle(DigitEngine):
        def _one(self, prompt: list[int], sampling: Any) -> Any:
            from tests.search.toy import digit

            own = prompt[len(PROMPT) :]
            self.weights = [1.0, 1.0, 1e-9] if not own else [1.0, 1e-9, 1e-9] if own[0] == digit(0) else [1.0, 1.0, 1.0]
            return super()._one(prompt, sampling)

    result, search = solve("rstar", {"actions": ["step"], "width": 6, "rollouts": 24, "checks": 4}, engine=Fickle())
    values = {s.answer: s.value for s in search.found}
    assert result.answer == "000"
    assert values["000"] == max(values.values()) and min(values.values()) < values["000"] / 2


def test_rstar_without_budget_for_checks_goes_by_its_rewards() -> None:
    result, search = solve("rstar", {"actions": ["step"], "width": 6, "rollouts": 500}, budget={"generated": 150})
    assert result.ended == "generated" and len({s.answer for s in search.found}) > 1
    assert all(s.value == s.node.q for s in search.found) and max(s.value for s in search.found) > 0


def test_rstar_takes_the_most_frequent_direct_answer() -> None:
    options = {"actions": ["step", "rest"], "width": 2, "rollouts": 8, "direct": 6, "checks": 0}
    result, search = solve("rstar", options, engine=DigitEngine((0.9, 0.05, 0.05)))
    direct = [c for c in search.root.children or [] if len(c.partial.ends) == 3]
    assert len(direct) == 1 and direct[0].terminal and 1 / 6 <= direct[0].prior <= 1
    assert result.answer == "000"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 200))
def test_sequential_halving_spends_its_simulations(candidates: int, simulations: int) -> None:
    rounds = halving_visits(candidates, simulations)
    assert len(rounds) == (math.ceil(math.log2(candidates)) if candidates > 1 else 0)
    left = [math.ceil(candidates / 2**i) for i in range(len(rounds))]
    spent = sum(n * v for n, v in zip(left, rounds, strict=True))
    assert spent <= max(simulations, sum(left)), "no more than asked for, or one visit each"
    assert rounds == sorted(rounds), "fewer candidates, more visits each"


def test_gumbels_completed_values_by_hand() -> None:
    root = Node(Partial.root(PROMPT))
    root.children = [
        Node(root.partial.then([5]), prior=0.5, value=0.2, parent=root),
        Node(root.partial.then([6]), prior=0.5, value=0.6, parent=root, visits=2, total=1.6),
    ]
    options = GumbelOptions(c_visit=50, c_scale=0.1)
    assert sigma(root, root.children[1], options) == pytest.approx((50 + 2) * 0.1 * 1.0)
    assert sigma(root, root.children[0], options) == 0.0
    assert interior(root, options) is root.children[1], "pi' is 0.994 and 0.005; visits have not reached that"
    root.children[1].visits, root.children[1].total = 400, 0.0
    assert interior(root, options) is root.children[0]


def test_stopping_when_the_belief_is_settled() -> None:
    sure, unsure = DigitEngine((0.98, 0.01, 0.01)), DigitEngine((1, 1, 1))
    stopping = {"threshold": 0.5, "least": 3}
    settled = solve("self_consistency", {"paths": 40, "wave": 2}, engine=sure, stopping=stopping)[0]
    assert settled.ended == "settled" and len(settled.solutions) < 15
    doubtful = solve("self_consistency", {"paths": 40, "wave": 2}, engine=unsure, stopping=stopping)[0]
    assert doubtful.ended == "done" and len(doubtful.solutions) == 40
    assert solve("mcts", {"paths": 30, "c_init": 0}, stopping=stopping)[0].ended == "settled", "ways of a tree are samples too"


def test_trees_side_by_side_share_the_engine() -> None:
    engine = DigitEngine()

    async def run() -> None:
        config = job("mcts", {"paths": 3, "width": 4})
        searches = [make(config, engine, seed=i) for i in range(32)]
        await asyncio.gather(*(run_search(s, get_method(config.search)) for s in searches))

    asyncio.run(run())
    assert engine.most_at_once >= 32 * 4


def test_settings_of_a_method_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"search\.settings\.pathz: unknown setting of mcts; did you mean 'paths'"):
        job("mcts", {"pathz": 3})
    with pytest.raises(ConfigError, match=r"search\.settings\.paths: .*greater than or equal to 1 \(got 0\)"):
        job("beam", {"paths": 0})
    with pytest.raises(ConfigError, match=r"search\.method: unknown search method 'mctz'; did you mean 'mcts'"):
        job("mctz")
