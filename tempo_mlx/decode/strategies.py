"""Pruning before append: which candidates of a step do not join its set, although the selection kept them.

`screen` applies what the settings ask for. Both strategies take the k candidates best first, without those that end
the text (they never get a row), and return the dropped ones, index -> why. The best candidate of a cluster and the
best supported candidate always stay, so a set is never emptied.

`diversity` needs nothing but the candidates' embeddings. `coherence` needs the attention of the candidates'
own rows, so the candidates are run first (the probe); where rows do not see their siblings, a survivor's
row is just what it would have been without the others, and counts as its run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.pruning import SINKS
from tempo_mlx.decode.schedules import Schedule, scheduled
from tempo_mlx.decode.step import BY_HAND, RunStep
from tempo_mlx.model.forward import Forward

if TYPE_CHECKING:
    from tempo_mlx.decode.tempo import Tempo


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
    if config.pruning_strategy is None:
        return None
    return Strategy(
        None if config.pruning_strategy == "coherence" else config.diversity_clusters,
        None
        if config.pruning_strategy == "diversity"
        else scheduled(config, config.coherence_threshold, "pruning"),
    )


def screen(
    tempo: Tempo, strategy: Strategy | None, tokens: Ints, probabilities: Float32s
) -> tuple[dict[int, str], Forward | None]:
    """Which of the selected tokens (best first) are dropped before they get a slot, and why; and the survivors' rows,
    where the probe has run them already and they are what they would have been alone.
    """
    candidates = [t for t in tokens.tolist() if t not in tempo.eos_ids]
    dropped: dict[int, str] = {}
    if strategy is None or len(candidates) < 2:
        return dropped, None
    if strategy.clusters is not None:
        gone = diversity(tempo.model.embeddings(candidates), strategy.clusters)
        dropped = {candidates[i]: why for i, why in gone.items()}
        candidates = [t for t in candidates if t not in dropped]
    if strategy.coherence is None or len(candidates) < 2:
        return dropped, None
    return probe(tempo, strategy.coherence(len(tempo.steps)), candidates, probabilities, dropped)


def probe(
    tempo: Tempo, threshold: float, candidates: list[int], probabilities: Float32s, dropped: dict[int, str]
) -> tuple[dict[int, str], Forward | None]:
    """Run the candidates' rows to see what they attend to; the cache then holds the survivors', or none of them."""
    trial, start = copy.copy(tempo.lattice), len(tempo.cache)
    tempo.extend(trial, candidates[::-1], probabilities)
    seen = tempo.forward(trial, candidates[::-1], attention="rows")
    assert seen.logits is not None and seen.attention_mass is not None
    support = support_of(seen.attention_mass[:, ::-1], trial.prompt_length)  # best first
    dropped = dropped | {candidates[i]: why for i, why in coherence(support, threshold).items()}
    if tempo.config.allow_intraset_token_visibility or not tempo.config.custom_rope:
        tempo.cache.truncate(start)  # rows saw the others, or sit where the others moved them: run again
        return dropped, None
    rows = np.array([i for i, t in enumerate(candidates[::-1]) if t not in dropped])
    slots = np.concatenate([np.arange(start), start + rows])
    tempo.cache.keep(slots)
    return dropped, Forward(seen.logits[rows], seen.attention_mass[:, rows][:, :, slots].mean(axis=1))


def shows_attention(strategy: Strategy | None, config: GenerateConfig, step: RunStep) -> bool:
    """Whether a recorded set's rows were those of its probe, which tell what they attended to; `screen` says when."""
    if strategy is None or strategy.coherence is None:
        return False
    if config.allow_intraset_token_visibility or not config.custom_rope:
        return False
    whys = [item.why for item in step.rejected]
    probed = sum(token.slot is not None for token in step.tokens) + sum(map(is_unsupported, whys))
    return probed > 1 and BY_HAND not in whys


def is_unsupported(why: str) -> bool:
    """Whether the probe dropped a candidate."""
    return why.startswith("coherence")


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
