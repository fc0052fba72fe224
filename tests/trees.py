"""What tests of tree decoders share: tiny models that end texts often, and scoring by an independent teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tempo_mlx.api import load, stream  # noqa: E402
from tempo_mlx.load_config import LoadConfig  # noqa: E402
from tempo_mlx.loading import LoadedModel  # noqa: E402
from tempo_mlx.report.run import Run  # noqa: E402
from tests.twins import reference, twin  # noqa: E402

# Besides its own EOS ids: so random a model hardly ever picks those, and texts must end for the tests to mean much.
FREQUENT = tuple(range(0, 320, 16))


@cache
def loaded(name: str = "llama", backend: str = "mlx", often: bool = False) -> LoadedModel:
    """A twin; often: one of 20 more tokens ends a text."""
    if backend == "mlx":
        result = load(str(twin(name)))
    else:
        from tempo_mlx.model.torch_backend import TorchTransformer
        from tempo_mlx.weights import open_checkpoint

        checkpoint = open_checkpoint(str(twin(name)))
        result = LoadedModel(
            TorchTransformer(checkpoint, "cpu", "float32"),
            checkpoint.tokenizer(),
            LoadConfig(backend="torch"),
        )
    if not often:
        return result
    tokenizer = copy.copy(result.tokenizer)
    tokenizer.eos_ids = frozenset({*tokenizer.eos_ids, *FREQUENT})
    return LoadedModel(result.model, tokenizer, result.config)


def prompt(seed: int, length: int = 6) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 256, length)]


def decode(model: LoadedModel, ids: Sequence[int], **settings: Any) -> Run:
    decoding = stream(model, ids, **settings)
    for _ in decoding:
        check_rows(decoding.decoder)
    return decoding.run()


def check_rows(decoder: Any) -> None:
    """The cache holds the prompt and nothing else that no row to come will see."""
    lattice = decoder.lattice
    waiting = len(decoder.waiting)
    if waiting:
        assert len(decoder.cache) == lattice.size - waiting
        assert lattice.gamma.any(axis=0).all()
        assert set(lattice.slots.tolist()) == set(decoder.by_slot)


def teacher(name: str, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """log P of each token, by transformers, on the plain sequence."""
    with torch.inference_mode():
        logits = reference(name)(torch.tensor([[*ids, *tokens]])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1)
    return [float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(tokens)]


def entropy_after(name: str, ids: Sequence[int], tokens: Sequence[int]) -> float:
    """Of the next token, by transformers, in nats."""
    with torch.inference_mode():
        logits = reference(name)(torch.tensor([[*ids, *tokens]])).logits[0, -1].double()
    return float(torch.distributions.Categorical(logits=logits).entropy())


def removals(run: Run) -> Iterator[str]:
    for step in run.steps:
        for token in step.tokens:
            if token.removed_why is not None:
                yield token.removed_why.signal
