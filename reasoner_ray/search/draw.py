"""A search tree as a picture: ``reasoner plot RUN/search/trees/00000.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from reasoner_ray.errors import DataError
from reasoner_ray.search.tree import Node, from_json

CHOSEN = "#D55E00"
_LABEL = 28  # characters of a step that are shown


def load_tree(path: Path) -> tuple[dict[str, Any], Node, Node]:
    """A tree's file, its root and its chosen node. Raises ``DataError`` where it is none."""
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a tree: {error}; `reasoner search JOB search.save_trees=true` writes trees") from error
    if not isinstance(plain, dict):
        raise DataError(f"{path} is not a search tree that `reasoner search` wrote: it holds a {type(plain).__name__}")
    return plain, *from_json(plain, str(path))


def places(root: Node) -> dict[int, tuple[float, float]]:
    """x and y of each node, by its ``id``: leaves side by side, parents above the middle of their children, y minus the depth."""
    found: dict[int, tuple[float, float]] = {}
    leaves = 0
    for node in reversed(list(root.walk())):  # children come before their parents
        if node.children:
            x = sum(found[id(child)][0] for child in node.children) / len(node.children)
        else:
            x, leaves = -float(leaves), leaves + 1
        found[id(node)] = (x, -float(node.depth))
    return found


def plot_tree(path: Path, out: Path) -> str:
    """Draw a tree into the PNG ``out`` and say what it shows. Size of a node: visits; colour: value; the chosen path is marked.

    Solutions are squares, ways that are closed are crosses. Raises ``DataError`` where ``path`` holds no tree.
    """
    plain, root, chosen = load_tree(path)
    nodes, at = list(root.walk()), places(root)
    leaves = sum(not node.children for node in nodes)
    depth = max(node.depth for node in nodes)
    figure = Figure(figsize=(min(30.0, max(7.0, 0.45 * leaves)), min(20.0, 2.5 + 1.3 * depth)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    way = chosen.path
    on_way = {id(node) for node in way}
    for node in nodes:
        for child in node.children or ():
            (x, y), (u, v) = at[id(node)], at[id(child)]
            marked = id(child) in on_way and id(node) in on_way
            axes.plot([x, u], [y, v], color=CHOSEN if marked else "#BBBBBB", linewidth=2.5 if marked else 0.8, zorder=1)
    colours = Normalize(min(node.q for node in nodes), max(node.q for node in nodes))
    for marker, kind in (
        ("s", [n for n in nodes if n.terminal]),
        ("X", [n for n in nodes if n.dead]),
        ("o", [n for n in nodes if not (n.terminal or n.dead)]),
    ):
        if kind:
            sizes = [60 + 500 * math.sqrt(n.visits / max(1, root.visits)) for n in kind]
            xs, ys = zip(*(at[id(n)] for n in kind), strict=True)
            axes.scatter(xs, ys, s=sizes, c=[n.q for n in kind], norm=colours, marker=marker, edgecolors="black", linewidths=0.6, zorder=2)
    for node in nodes:
        if node.visits:
            ink = "black" if colours(node.q) > 0.6 else "white"  # viridis runs from dark to light
            axes.annotate(str(node.visits), at[id(node)], ha="center", va="center", fontsize=7, color=ink, zorder=3)
    for text, node in zip(_texts(plain), way[1:], strict=True):
        x, y = at[id(node)]
        axes.annotate(text, (x, y - 0.28), ha="center", va="top", fontsize=8, zorder=3)
    figure.colorbar(ScalarMappable(colours, "viridis"), ax=axes, label="value", shrink=0.6)
    axes.set_title(f"{plain.get('method', 'search')}, item {plain.get('item', '?')}: answer {plain.get('answer', '?')}", fontsize=10)
    axes.set_yticks(range(-depth, 1), [str(d) for d in range(depth, -1, -1)])
    axes.set_ylabel("steps")
    axes.set_xticks([])
    axes.set_ylim(-depth - 0.8, 0.5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return f"{len(nodes)} nodes, {root.visits} visits, chosen path of {len(way) - 1} nodes"


def _texts(plain: dict[str, Any]) -> list[str]:
    """What the steps of the chosen path say, in one short line each; ``$`` would begin a formula in a label."""
    node, texts = plain["root"], []
    for index in plain["chosen"]:
        node = node["children"][index]
        text = " ".join(str(node["text"]).split()).replace("$", r"\$")
        texts.append(text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…")
    return texts
