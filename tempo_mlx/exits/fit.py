"""From samples to exits: shortlist, translators, and the choices an exit would have made.

Letters: N samples, E model dim, V vocabulary, C tokens of the shortlist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.exits.agreement import Outcome
from tempo_mlx.exits.calibration import Translator
from tempo_mlx.exits.samples import HiddenStates
from tempo_mlx.mlx import mx, optimizers
from tempo_mlx.model.linear import Linear
from tempo_mlx.model.transformer import Transformer

RIDGE = 0.1  # of the inputs' variance
HOPELESS = 0.4  # agreement after the regression below which further fitting never made an exit that pays
EPOCHS = 4
BATCH = 256
LOOKED_AT = 4  # every fourth sample is used to rank tokens by probability
LEARNING_RATE = 1e-3


def shortlist(model: Transformer, train: HiddenStates, size: int, always: Sequence[int]) -> NDArray[np.int32]:
    """Tokens (size,), most likely first: `always`, then every token chosen, then by the model's probability."""
    rank = np.bincount(train.choices, minlength=model.architecture.vocab_size).astype(np.float64)
    rank[rank > 0] += len(train.choices)
    rank[list(always)] = np.inf
    for start in range(0, len(train.choices), LOOKED_AT * BATCH):
        rows = train.hidden[-1, start : start + LOOKED_AT * BATCH : LOOKED_AT].astype(np.float32)
        rank += np.array(mx.softmax(model.logits(mx.array(rows).astype(model.dtype)), axis=-1).sum(axis=0))
    chosen: NDArray[np.int32] = np.argsort(-rank, kind="stable")[:size].astype(np.int32)
    return chosen


def fit_translator(
    model: Transformer, head: Linear, train: HiddenStates, dev: HiddenStates, at: int
) -> dict[str, Float32s]:
    """`weight` (E, E) and `offset` (E,) that map hidden[at] to what the last layer would give.

    Ridge regression of what the layers in between add, then Adam on the divergence from the model's distribution over
    the shortlist; the epoch with the best agreement on `dev` is kept.
    """
    x, y = train.hidden[at].astype(np.float32), train.hidden[-1].astype(np.float32)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    z, added = (x - mean) / scale, (y - x).mean(axis=0)  # (N, E)
    gram = z.T @ z / len(z) + RIDGE * np.eye(x.shape[1], dtype=np.float32)
    weight = np.diag(scale) + np.linalg.solve(gram, z.T @ (y - x - added) / len(z))
    parameters: dict[str, mx.array] = {
        "weight": mx.array(weight.astype(np.float32)), "offset": mx.array(mean + added),
    }  # fmt: skip
    inputs, targets = mx.array(z), mx.array(y)
    dev_inputs = mx.array((dev.hidden[at].astype(np.float32) - mean) / scale)
    dev_choices = np.array(model.logits(mx.array(dev.hidden[-1].astype(np.float32)), head).argmax(axis=-1))

    def read(parameters: dict[str, mx.array], inputs: mx.array) -> mx.array:
        return model.logits(inputs @ parameters["weight"] + parameters["offset"], head)

    def loss(parameters: dict[str, mx.array], inputs: mx.array, wanted: mx.array) -> mx.array:
        logits = read(parameters, inputs)
        return (mx.logsumexp(logits, axis=-1) - (wanted * logits).sum(axis=-1)).mean()

    def agreement(parameters: dict[str, mx.array]) -> float:
        return float((np.array(read(parameters, dev_inputs).argmax(axis=-1)) == dev_choices).mean())

    step = mx.value_and_grad(loss)
    best = agreement(parameters), parameters
    batches = len(z) // BATCH
    schedule = optimizers.cosine_decay(
        LEARNING_RATE * float(np.abs(weight).mean()) * 10, max(EPOCHS * batches, 1)
    )
    adam = optimizers.Adam(learning_rate=schedule)
    random = np.random.default_rng(0)
    for _ in range(EPOCHS if batches and best[0] > HOPELESS else 0):
        order = random.permutation(len(z))
        for batch in np.split(order[: batches * BATCH], batches):
            index = mx.array(batch)
            wanted = mx.softmax(model.logits(targets[index], head), axis=-1)
            _, gradient = step(parameters, inputs[index], wanted)
            parameters = adam.apply_gradients(gradient, parameters)
            mx.eval(parameters, adam.state)
        best = max(best, (agreement(parameters), parameters), key=lambda pair: pair[0])
    fitted = np.array(best[1]["weight"]) / scale[:, None]
    return {"weight": fitted, "offset": np.array(best[1]["offset"]) - mean @ fitted}


def judge(
    model: Transformer,
    shortlist: NDArray[np.int32],
    samples: HiddenStates,
    prompts: Mapping[int, Sequence[int]],
    at: int,
    translator: Translator | None,
) -> Outcome:
    """An exit's choices on samples, among the shortlist (C,) and the tokens each text held by then.

    prompts: of each text.
    """
    margins, right = [], []
    for text in np.unique(samples.texts):
        here = np.flatnonzero(samples.texts == text)
        x = mx.array(samples.hidden[at, here].astype(np.float32))
        if translator is not None:
            x = x @ mx.array(translator[0]) + mx.array(translator[1])
        own = samples.tokens[here]
        tokens = np.union1d(np.union1d(shortlist, own), prompts[int(text)])
        first = np.zeros(len(tokens), np.int64)  # the sample from which on a token may be chosen
        later = np.setdiff1d(own, np.union1d(shortlist, prompts[int(text)]))
        first[np.searchsorted(tokens, later)] = [int(np.argmax(own == token)) for token in later]
        logits = np.array(model.logits(x.astype(model.dtype), model.head.choose(mx.array(tokens))))
        logits[np.arange(len(here))[:, None] < first] = -np.inf
        top = np.sort(np.partition(logits, -2, axis=1)[:, -2:], axis=1)
        margins.append(top[:, 1] - top[:, 0])
        right.append(tokens[logits.argmax(axis=1)] == samples.choices[here])
    return Outcome(np.concatenate(margins), np.concatenate(right))
