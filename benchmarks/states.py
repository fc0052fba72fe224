"""How near a lattice comes to the exact average over its readings, on models with states and on one without.

`python -m benchmarks.states > benchmarks/results/states.md`; `make docs` puts it into docs/models.md. Tiny random
models (tests/twins.py), so what is shown is the method's own error, not a language model's: lattices of 2 tokens at 4
positions with random edges; the distribution after them, mixed over the last set, against the average of the 16
readings run alone, each with its probability. Takes half a minute on two cores.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.lattice import Lattice
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import open_checkpoint
from tests.twins import twin

MODELS = {
    "qwen3": "attention alone",
    "qwen3_5": "Gated DeltaNet",
    "lfm2": "short convolution",
    "granite4-h": "Mamba 2",
}
PROMPT, WIDTH, DEPTH = 10, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lattices", type=int, default=20)
    count = parser.parse_args().lattices
    print("| layers | `--carry best` | `--carry lineage` | the best reading alone |\n|---|---|---|---|")
    for name, words in MODELS.items():
        model = build(open_checkpoint(str(twin(name))), "cpu", "float32")
        found = np.array([distances(model, seed) for seed in range(count)])
        print(f"| {words} | {' | '.join(f'{mean:.2f}' for mean in found.mean(axis=0))} |")


def distances(model: Any, seed: int) -> list[float]:
    """Total variation from the exact average: with `carry` best and lineage, and of the most probable reading."""
    random = np.random.default_rng(seed)
    prompt = random.integers(10, 250, PROMPT)
    tokens = random.integers(10, 250, (DEPTH, WIDTH))
    edges = [
        random.dirichlet(np.ones(WIDTH), WIDTH).T for _ in range(DEPTH - 1)
    ]  # P(i|j), columns summing to 1
    last = random.dirichlet(np.ones(WIDTH))
    exact, best = readings(model, prompt, tokens, edges, last)
    found = []
    for carry in ("best", "lineage"):
        rows = lattice_rows(model, prompt, tokens, edges, carry)
        found.append(float(np.abs(last @ rows - exact).sum() / 2))
    return [*found, float(np.abs(best - exact).sum() / 2)]


def readings(
    model: Any, prompt: Any, tokens: Any, edges: list[Floats], last: Floats
) -> tuple[Floats, Floats]:
    """(V,): the average of all readings run alone, and the most probable one's."""
    exact, best = np.zeros(model.architecture.vocab_size), (0.0, np.zeros(0))
    for path in itertools.product(range(WIDTH), repeat=DEPTH):
        share = last[path[-1]] * np.prod([edges[t][path[t], path[t + 1]] for t in range(DEPTH - 1)])
        text = np.concatenate([prompt, tokens[np.arange(DEPTH), path]])
        out = model.forward(text, np.arange(len(text)), None, model.new_cache(), logits="last")
        row = softmax(out.logits)[0]
        exact += share * row
        best = max(best, (float(share), row), key=lambda pair: pair[0])
    return exact, best[1]


def lattice_rows(model: Any, prompt: Any, tokens: Any, edges: list[Floats], carry: str) -> Floats:
    """(k, V): what follows each member of the last set."""
    cache, lattice = model.new_cache(), Lattice(PROMPT)
    model.forward(prompt, np.arange(PROMPT), None, cache, logits="none")
    for step, members in enumerate(tokens):
        lattice.append(np.full(WIDTH, 1 / WIDTH), edges[step - 1] if step else None)
        where = np.full(WIDTH, PROMPT + step)
        out = model.forward(members, where, lattice.bias("lineage"), cache, parents=lattice.parents(carry))
    return softmax(out.logits)


def softmax(logits: Float32s) -> Floats:
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
