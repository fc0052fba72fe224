"""The best path of a lattice that grows: what of it can no longer change, and the rest as it is now.

The cost of a step does not grow with the run: layers that no removal can reach any more are kept with their scores,
and what has settled is given out and forgotten.
"""

from __future__ import annotations

from typing import Generic

import numpy as np

from tempo_mlx.arrays import Floats, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.paths import Chosen, Layer, T, TokenSet, chosen_of, layer_after, usable


def removal_window(config: GenerateConfig) -> int:
    """How many sets back a run's own pruning reaches; 0 without it."""
    return config.pruning_window if config.pruning_signal else 0


class SettledReading(Generic[T]):
    """Follows a superposed or plain run, and gives out the best path's tokens once no later step can change them.

    A set is settled when every path that is still open goes through one member of it, and when it lies out of reach
    of retroactive pruning. `window`: how far back that looks, 0 without it; None where any set may change until the
    end (a user's own rule), so that nothing settles, and a step costs the more the longer the run is.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._open: list[TokenSet[T]] = []
        self._layers: list[Layer[T]] = []  # of the open sets, after the last settled one
        self._scores: list[Floats] = []  # (m,) each: of the best path that ends in each member
        self._pointers: list[Ints] = []  # (m,) each: the member before, on that path
        self._anchor: Layer[T] | None = None  # the last settled set, as its one member

    def add(self, step: TokenSet[T]) -> list[Chosen[T]]:
        """The tokens that `step` settles, those that are not read included."""
        self._open.append(step)
        newest = len(self._open) - 1
        reach = newest + 1 if self._window is None else self._window + 1 if self._window else 0
        self._score(
            max(newest - max(reach, 1), 0)
        )  # the set before the newest was the last, and no longer is
        alive = np.arange(
            len(self._layers[-1].members)
        )  # of each set, back from the newest: on any best path
        for index in range(newest, -1, -1):
            if index == newest - reach < newest:
                alive = self._before_any(index + 1)
            if len(alive) == 1 and index <= newest - reach:
                return self._settle(index, int(alive[0]))
            alive = np.unique(self._pointers[index][alive])
        return []

    @property
    def tail(self) -> list[Chosen[T]]:
        """The rest of the best path, as it is now."""
        return self._path(len(self._open) - 1, int(self._scores[-1].argmax())) if self._open else []

    def _score(self, first: int) -> None:
        """Layers, scores and pointers from the open set `first` on. Ties go to the more probable member."""
        del self._layers[first:], self._scores[first:], self._pointers[first:]
        for index in range(first, len(self._open)):
            members = usable(self._open[index], index + 1 == len(self._open))
            layer = layer_after(self._layers[-1] if index else self._anchor, members)
            reached = self._scores[-1][:, None] + layer.edges if index else layer.edges
            self._layers.append(layer)
            self._pointers.append(reached.argmax(axis=0))
            self._scores.append(reached.max(axis=0))

    def _before_any(self, index: int) -> Ints:
        """The members before an open set on the best paths to any of its members: any may be left of it."""
        members = [token for token in self._open[index].tokens if token.slot is not None]
        edges = layer_after(self._layers[index - 1], members).edges
        return np.unique((self._scores[index - 1][:, None] + edges).argmax(axis=0))

    def _settle(self, index: int, member: int) -> list[Chosen[T]]:
        """Give out the path to a member of an open set, and go on from there."""
        path = self._path(index, member)
        for kept in (self._open, self._layers, self._scores, self._pointers):
            del kept[: index + 1]
        self._anchor = layer_after(None, [path[-1].member])
        if self._layers:
            self._layers[0] = layer_after(self._anchor, self._layers[0].members)
        return path

    def _path(self, index: int, member: int) -> list[Chosen[T]]:
        """The best path to a member of an open set, from the last settled one on."""
        choice = [member]
        for pointer in reversed(self._pointers[1 : index + 1]):
            choice.append(int(pointer[choice[-1]]))
        layers = self._layers[: index + 1]
        if self._anchor is None:
            return chosen_of(layers, choice[::-1])
        return chosen_of([self._anchor, *layers], [0, *choice[::-1]])[1:]
