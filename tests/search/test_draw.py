"""A drawn tree shows the tree: every node has its place, and the command line writes the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from reasoner_ray.cli import app
from reasoner_ray.errors import DataError
from reasoner_ray.search.draw import load_tree, places
from reasoner_ray.search.tree import to_json
from tests.search.step_functions import TARGET
from tests.search.toy import solve


@pytest.fixture(scope="module")
def tree_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result, search = solve("mcts", {"paths": 4, "width": 3}, seed=1)
    text = lambda partial, start: "$" + search.policy.tokenizer.decode(partial.tokens[start:])  # noqa: E731
    path = tmp_path_factory.mktemp("trees") / "00000.json"
    path.write_text(json.dumps(to_json(result.root, result.chosen, text, item="q", method="mcts", answer=TARGET)))
    return path


def test_nodes_do_not_cover_each_other(tree_file: Path) -> None:
    _, root, chosen = load_tree(tree_file)
    at, nodes = places(root), list(root.walk())
    assert len(set(at.values())) == len(nodes)
    assert chosen.terminal and all(at[id(child)][1] == at[id(n)][1] - 1 for n in nodes for child in n.children or ())
    for node in nodes:
        xs = [at[id(child)][0] for child in node.children or ()]
        assert not xs or min(xs) <= at[id(node)][0] <= max(xs)
        assert xs == sorted(xs), "from left to right as in the tree"


def test_the_command_line_draws_a_tree(tree_file: Path) -> None:
    drawn = CliRunner().invoke(app, ["plot", str(tree_file)])
    assert drawn.exit_code == 0, drawn.output
    assert "nodes, 4 visits, chosen path of 3 nodes" in drawn.stdout
    picture = imread(tree_file.with_suffix(".png"))
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05
    assert CliRunner().invoke(app, ["plot", str(tree_file), str(tree_file)]).exit_code == 2


def test_a_file_that_is_no_tree_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    with pytest.raises(DataError, match=r"tree\.json cannot be read"):
        load_tree(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="holds a list"):
        load_tree(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tree\.json is not a search tree"):
        load_tree(path)
