"""A tree search as a tree on a terminal: what was visited before each token was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from tempo_mlx.report.run import Run
from tempo_mlx.report.styles import SHADES, printable, shade
from tempo_mlx.report.text import visible_whitespace

DEEPEST = 6  # levels shown below the root


def search_trees(run: Run) -> list[Tree]:
    """One tree a step, of the run file's `tree`; none where the run searched nothing."""
    if run.tree is None:
        return []
    trees, text = [], run.prompt.text
    for step, searched in zip(run.steps, run.tree["steps"], strict=False):
        tree = Tree(Text(f"step {step.step}: ...{visible_whitespace(printable(text[-40:]))}", "bold"))
        _add(tree, searched["nodes"], step.tokens[0].id)
        trees.append(tree)
        text += step.tokens[0].text
    return trees


def _add(tree: Tree, nodes: Sequence[Mapping[str, Any]], chosen: int) -> None:
    """Nodes come parents first; only those whose branch is shown have a place to hang on."""
    places: dict[int | None, tuple[Tree, int]] = {None: (tree, 0)}
    for index, node in enumerate(nodes):
        if node["parent"] not in places:
            continue
        place, depth = places[node["parent"]]
        label = Text(repr(printable(node["text"])), shade(node["prior"], SHADES))
        label.append(f"  prior {node['prior']:.3f}  visits {node['visits']}", "dim")
        if node["visits"]:
            label.append(f"  value {node['value']:.3f}", "dim")
        if depth == 0 and node["id"] == chosen:
            label.append("  chosen", "bold")
        branch = place.add(label)
        if depth < DEEPEST:
            places[index] = branch, depth + 1
