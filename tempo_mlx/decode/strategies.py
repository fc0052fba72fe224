"""Pruning before append: which candidates of a step do not join its set, although the selection kept them.

Both strategies take the k candidates best first, without those that end the text (they never get a row), and
return the dropped ones, index -> why. The best candidate of a cluster and the best supported candidate always
stay, so a set is never emptied.

`diversity` needs nothing but the candidates' embeddings. `coherence` needs the attention of the candidates'
own rows, so the candidates are run first (the probe); where rows do not see their siblings, a survivor's
row is just what it would have been without the others, and counts as its run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.pruning import SINKS
from tempo_mlx.decode.schedules import Schedule, scheduled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]

ITERATIONS = 20  # of k-means, which settles in two or three on a few points


@dataclass(frozen=True)
class Strategy:
    """What to apply, in this order: `clusters` (None: no diversity), then `coherence`, a threshold by step
    (None: no coherence).
    """

    clusters: int | None
    coherence: Schedule | None


def make_strategy(config: GenerateConfig) -> Strategy | None:
    """The strategy the settings ask for; None without pruning before append. Hybrid is both."""
    if not config.use_pruning:
        return None
    return Strategy(
        None if config.pruning_strategy == "coherence" else config.diversity_clusters,
        None
        if config.pruning_strategy == "diversity"
        else scheduled(config, config.coherence_threshold, "pruning"),
    )


def diversity(embeddings: ArrayLike, clusters: int) -> dict[int, str]:
    """Drop all but the best candidate of each cluster of embeddings (k, E)."""
    labels = cluster(embeddings, clusters).tolist()
    best = {label: labels.index(label) for label in labels}
    return {
        index: f"diversity: same cluster as candidate {best[label]}"
        for index, label in enumerate(labels)
        if index != best[label]
    }


def coherence(support: Floats, threshold: float) -> dict[int, str]:
    """Drop candidates whose support (k,), see `support_of`, is under the threshold x the largest support."""
    bound = threshold * float(support.max())
    return {
        int(index): f"coherence: support {support[index]:.4f} under {bound:.4f}"
        for index in np.flatnonzero(support < bound)
    }


def support_of(attention: Float32s, prompt_length: int) -> Floats:
    """How much of each candidate's attention the context holds: (k,), each in 0..1.

    attention (layers, k, S): of the candidates' rows, mean over heads; the last k slots are the candidates.
    The support is the share that goes to the context other than the attention sinks (the first prompt
    slots), mean over layers. A row that finds nothing to say in its context attends to the sinks and to
    itself.
    """
    context = attention.shape[2] - attention.shape[1]
    content = attention[:, :, min(SINKS, prompt_length) : context]
    support: Floats = content.sum(axis=2).mean(axis=0, dtype=np.float64)
    return support


def cluster(embeddings: ArrayLike, clusters: int) -> Ints:
    """k-means of the directions of the embeddings (k, E) -> label (k,). Deterministic.

    Spherical: vectors are normalised, the nearest centre is the one of the largest cosine. The first centre
    is the first point, each further one the point farthest from all centres so far (ties: the first).
    """
    points = np.asarray(embeddings, np.float64)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    chosen = [0]
    nearest = points @ points[0]
    while len(chosen) < min(clusters, len(points)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, points @ points[chosen[-1]])
    centres = points[chosen]
    labels = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        moved = (points @ centres.T).argmax(axis=1)
        if (moved == labels).all():
            break
        labels = moved
        for label in set(labels.tolist()):
            mean = points[labels == label].sum(axis=0)
            centres[label] = mean / max(float(np.linalg.norm(mean)), float(np.finfo(np.float64).tiny))
    return labels
