"""The tree: PUCT and backup against numbers worked out by hand, its JSON, ways that are closed."""

from __future__ import annotations

import json
import math

import pytest

from reasoner_ray.errors import DataError
from reasoner_ray.search.tree import Node, backup, clear_statistics, from_json, puct, puct_score, to_json, uct_score
from reasoner_ray.steps import Partial

ROOT = Partial.root([1, 2])


def child(parent: Node, token: int, **values: float) -> Node:
    node = Node(parent.partial.then([token]), parent=parent, **values)  # type: ignore[arg-type]
    parent.children = [*(parent.children or []), node]
    return node


def small_tree() -> tuple[Node, Node, Node, Node]:
    """Root with a (P .6, v0 .2) and b (P .4, v0 .5); a with c (P 1, v0 .9)."""
    root = Node(ROOT)
    a, b = child(root, 10, prior=0.6, value=0.2), child(root, 11, prior=0.4, value=0.5)
    return root, a, b, child(a, 12, prior=1.0, value=0.9)


def test_puct_by_hand() -> None:
    root, a, b, c = small_tree()
    assert puct_score(root, a, 1.25) == 0.2, "without a visit of the parent only v0 counts"
    assert puct(root, 1.25) is b
    backup(b, 0.5)
    # N = 1: ln((1 + 19653) / 19652) + 1.25 = 1.250102, times sqrt(1).
    weight = math.log(19654 / 19652) + 1.25
    assert weight == pytest.approx(1.250102, abs=1e-6)
    assert puct_score(root, a, 1.25) == pytest.approx(0.2 + 0.6 * weight)
    assert puct_score(root, b, 1.25) == pytest.approx(0.5 + 0.4 * weight / 2)
    assert puct(root, 1.25) is a
    backup(c, 0.9)
    assert (root.visits, a.visits, c.visits, root.total, root.q) == (2, 1, 1, pytest.approx(1.4), pytest.approx(0.7))
    weight = math.log(19655 / 19652) + 1.25
    # a: .9 + .6 * 1.250153 * 1.41421 / 2 = 1.4304; b: .5 + .4 * 1.250153 * 1.41421 / 2 = .8536
    assert puct_score(root, a, 1.25) == pytest.approx(0.9 + 0.6 * weight * math.sqrt(2) / 2) == pytest.approx(1.4304, abs=1e-4)
    assert puct_score(root, b, 1.25) == pytest.approx(0.8536, abs=1e-4)


def test_a_larger_exploration_weight_prefers_priors() -> None:
    root, a, b, _ = small_tree()
    backup(b, 0.9)
    backup(a, 0.2)
    assert puct(root, 0.0) is b
    assert puct(root, 30.0) is a


def test_equal_scores_go_to_the_likelier_child_and_width_1_has_one_choice() -> None:
    root = Node(ROOT)
    child(root, 10, prior=0.2, value=0.5)
    likelier = child(root, 11, prior=0.8, value=0.5)
    assert puct(root, 1.25) is likelier
    alone = Node(ROOT)
    only = child(alone, 10)
    backup(only, -1.0)
    assert puct(alone, 1.25) is only


def test_uct_by_hand() -> None:
    root, a, b, _ = small_tree()
    assert uct_score(root, a, 2.0) == math.inf
    backup(a, 1.0)
    backup(b, 0.0)
    backup(a, 0.5)
    assert uct_score(root, a, 2.0) == pytest.approx(0.75 + 2 * math.sqrt(math.log(3) / 2))
    assert uct_score(root, b, 2.0) == pytest.approx(0.0 + 2 * math.sqrt(math.log(3) / 1))


def test_closed_ways_are_passed_over_up_to_the_root() -> None:
    root, a, b, c = small_tree()
    c.children = []
    c.close()
    assert c.dead and a.dead and not root.dead
    assert puct(root, 1.25) is b
    b.terminal = True
    assert not b.dead, "a solution is an end, not a dead one"
    other = Node(ROOT)
    lone = child(other, 10)
    lone.children = []
    lone.close()
    assert other.dead


def test_statistics_can_be_forgotten() -> None:
    root, a, _, c = small_tree()
    backup(c, 0.9)
    clear_statistics(root)
    assert [n.visits for n in root.walk()] == [0] * 4 and a.q == 0.2 and root.children and a.children


def test_json_there_and_back() -> None:
    root, _, b, c = small_tree()
    c.terminal, c.scores, c.logprobs, c.versions = True, (0.2, 0.9), (-0.5,), (3,)
    b.children = []
    b.close()
    backup(c, 0.9)
    plain = json.loads(json.dumps(to_json(root, c, lambda p, start: f"{p.tokens[start:]}", item="q1")))
    assert plain["chosen"] == [0, 0] and plain["item"] == "q1" and plain["root"]["children"][0]["text"] == "(10,)"
    again, chosen = from_json(plain)
    assert to_json(again, chosen, lambda p, start: f"{p.tokens[start:]}", item="q1") == plain
    assert [n.partial for n in again.walk()] == [n.partial for n in root.walk()]
    assert [n.dead for n in again.walk()] == [n.dead for n in root.walk()]
    assert (chosen.terminal, chosen.scores, chosen.q) == (True, (0.2, 0.9), 0.9)
    assert to_json(root, None, lambda p, start: "")["chosen"] == []


@pytest.mark.parametrize("broken", [{}, {"prompt_tokens": [1], "ends": [], "start": 1, "chosen": [], "root": {"children": None}}])
def test_a_file_that_is_no_tree_is_named(broken: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"tree\.json is not a search tree"):
        from_json(broken, "tree.json")
