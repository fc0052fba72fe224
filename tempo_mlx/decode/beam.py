"""The decoders that branches are compared with, as rules of the same tree: beams, diverse beams, samples."""

from __future__ import annotations

import numpy as np

from tempo_mlx.decode.decoder import DecoderSpec, Setup
from tempo_mlx.decode.selection import draw, make_selector
from tempo_mlx.decode.step import Removal
from tempo_mlx.decode.tree import Child, Choice, Frontier, Node, Tree, best_children


class Beam:
    """Beam search as transformers does it by default: length_penalty 1, early_stopping False.

    Of the 2 x width best children (more with several EOS ids), those that end their text count if they are
    among the first `width`; the best `width` others go on. Done when `width` texts have ended and no text
    under way has a better mean log-probability than the worst of them.
    """

    threshold: float | None = None

    def __init__(self, width: int, num_eos_ids: int) -> None:
        self.width = width
        self.looked_at = width * max(2, 1 + num_eos_ids)

    def __call__(self, frontier: Frontier) -> Choice:
        sums = np.array([node.log_prob for node in frontier.nodes])
        rows, tokens = best_children(frontier.log_probs, self.looked_at)
        scores = sums[rows] + frontier.log_probs[rows, tokens]
        order = np.argsort(-scores, kind="stable")[: self.looked_at]
        best = [frontier.child(int(rows[i]), int(tokens[i])) for i in order if np.isfinite(scores[i])]
        going = [child for child in best if not child.ends][: self.width]
        ended = [child for child in best[: self.width] if child.ends]
        worst = going[-1].log_prob if going else 0.0
        tops = sums + frontier.log_probs.max(axis=1)
        lost = {row: Removal("beam", float(top), worst) for row, top in enumerate(tops)}
        return Choice([*going, *ended], lost=lost, done=self.is_done(frontier, going, ended))

    def is_done(self, frontier: Frontier, going: list[Child], ended: list[Child]) -> bool:
        length = frontier.nodes[0].length + 1
        means = [node.log_prob / node.length for node in frontier.ended]
        means += [child.log_prob / length for child in ended]
        if not going or len(means) < self.width:
            return not going
        return going[0].log_prob / length <= sorted(means)[-self.width]


class DiverseBeam:
    """Diverse beam search with groups of one beam and the Hamming penalty (arXiv 1610.02424).

    One group after another takes its best token, where a token costs `strength` for each group that took it
    at this step. A group ends with its text.
    """

    threshold: float | None = None

    def __init__(self, width: int, strength: float) -> None:
        self.width = width
        self.strength = np.float32(strength)

    def __call__(self, frontier: Frontier) -> Choice:
        penalty = np.zeros(frontier.log_probs.shape[1], np.float32)
        children = []
        for _, row in by_branch(frontier.nodes, self.width):
            token = int((frontier.log_probs[row] - penalty).argmax())
            penalty[token] += self.strength
            children.append(frontier.child(row, token))
        return Choice(children)


class Samples:
    """Independent samples. Number i draws by its own seed, so it is the same whatever the number of samples."""

    def __init__(self, setup: Setup) -> None:
        config, functions = setup.config, setup.functions
        self.width = config.beam_width
        by_threshold = config.selection == "threshold" and functions.select is None
        self.threshold: float | None = config.threshold if by_threshold else None
        most = 1 if config.temperature == 0 else setup.model.architecture.vocab_size
        self.select = make_selector(config, most, functions=functions)
        self.random = [np.random.default_rng([config.seed, number]) for number in range(self.width)]

    def __call__(self, frontier: Frontier) -> Choice:
        return Choice(
            [
                frontier.child(row, self.draw(frontier, row, self.random[number]))
                for number, row in by_branch(frontier.nodes, self.width)
            ]
        )

    def draw(self, frontier: Frontier, row: int, random: np.random.Generator) -> int:
        """One of the selected tokens of a row's distribution, by their probabilities."""
        place = random.random()
        probabilities = np.exp(frontier.tempered[row])
        if not probabilities.any():  # what may come next has underflowed: no rule can tell it apart
            return int(frontier.tempered[row].argmax())
        tokens = self.select(probabilities, frontier.nodes[row].length, ())
        return int(tokens[draw(probabilities[tokens], place)])


def by_branch(nodes: list[Node], width: int) -> list[tuple[int, int]]:
    """(branch, row) by ascending branch; at the prompt, which all start from, (each branch, 0)."""
    if not nodes[0].length:
        return [(branch, 0) for branch in range(width)]
    return sorted((node.branch, row) for row, node in enumerate(nodes))


def beam(setup: Setup) -> Tree:
    return Tree(setup, Beam(setup.config.beam_width, len(frozenset(setup.eos_ids))))


def diverse_beam(setup: Setup) -> Tree:
    return Tree(setup, DiverseBeam(setup.config.beam_width, setup.config.diversity_strength))


BEAM = DecoderSpec("beam", beam, texts="beam_width", functions=("logits_processors",))
DIVERSE_BEAM = DecoderSpec("diverse-beam", diverse_beam, texts="beam_width", functions=("logits_processors",))
