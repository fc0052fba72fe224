"""A tree search as a tree on a terminal: what was visited before each token was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.text import Text as Styled
from rich.tree import Tree

from tempo_mlx.errors import RunFileError
from tempo_mlx.report.run import Run
from tempo_mlx.report.safe import printable
from tempo_mlx.report.styles import SHADES, shade
from tempo_mlx.report.text import visible_whitespace
from tempo_mlx.strict import Number, Record, Text, Whole, read

DEEPEST = 6  # levels shown below the root


@dataclass(frozen=True)
class Searched(Record):
    """A token that a search visited."""

    parent: Annotated[
        Whole | None, "its parent's place in the list, which is before its own; null: below the root"
    ]
    id: Annotated[Whole, "in the model's vocabulary"]
    prior: Annotated[Number, "probability among its siblings"]
    visits: Annotated[Whole, "simulations through it"]
    value: Annotated[Number, "what they were worth, on average"]
    text: Annotated[Text, "of the token"]


@dataclass(frozen=True)
class Search(Record):
    """What was visited before one token was chosen."""

    nodes: Annotated[tuple[Searched, ...], "parents first"]


def totals(run: Run) -> dict[str, object]:
    """What a run's file says of its search as a whole."""
    return {name: value for name, value in (run.tree or {}).items() if name != "steps"}


def search_trees(run: Run) -> list[Tree]:
    """One tree a step, of the run file's `tree`; none where the run searched nothing.

    Raises RunFileError where that is no search of ours: a decoder of one's own may say there what it likes.
    """
    if run.tree is None:
        return []
    searches = read(tuple[Search, ...], run.tree.get("steps"), RunFileError, where="tree.steps")
    trees, text = [], run.prompt.text
    for step, searched in zip(run.steps, searches, strict=False):
        tree = Tree(Styled(f"step {step.step}: ...{visible_whitespace(printable(text[-40:]))}", "bold"))
        _add(tree, searched.nodes, step.tokens[0].id)
        trees.append(tree)
        text += step.tokens[0].text
    return trees


def _add(tree: Tree, nodes: Sequence[Searched], chosen: int) -> None:
    """Nodes come parents first; only those whose branch is shown have a place to hang on."""
    places: dict[int | None, tuple[Tree, int]] = {None: (tree, 0)}
    for index, node in enumerate(nodes):
        if node.parent not in places:
            continue
        place, depth = places[node.parent]
        label = Styled(repr(printable(node.text)), shade(node.prior, SHADES))
        label.append(f"  prior {node.prior:.3f}  visits {node.visits}", "dim")
        if node.visits:
            label.append(f"  value {node.value:.3f}", "dim")
        if depth == 0 and node.id == chosen:
            label.append("  chosen", "bold")
        branch = place.add(label)
        if depth < DEEPEST:
            places[index] = branch, depth + 1
