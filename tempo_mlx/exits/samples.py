"""Hidden states of text that the model wrote: the samples that exits are fitted and judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.files import read_text
from tempo_mlx.loading import LoadedModel
from tempo_mlx.mlx import mx
from tempo_mlx.model.transformer import Transformer

PROMPTS = Path(__file__).with_name("prompts.txt")
TOGETHER = 16  # texts decoded in one pass: rows are cheaper together
LARGEST = 6e4  # of a float16, nearly


@dataclass(frozen=True)
class HiddenStates:
    """N positions of many texts, those of one text in order. hidden (layers, N, E) float16: the outputs of the chosen
    layers; tokens (N,): the token at each position; choices (N,): the whole model's next token; texts (N,): the text
    it belongs to.
    """

    hidden: NDArray[np.float16]
    tokens: Ints
    choices: Ints
    texts: Ints

    @classmethod
    def join(cls, parts: Sequence[HiddenStates]) -> HiddenStates:
        """All of them; texts get new numbers."""
        first = np.cumsum([0, *(part.texts.max() + 1 for part in parts)])
        texts = np.concatenate([part.texts + start for part, start in zip(parts, first, strict=False)])
        order = np.argsort(texts, kind="stable")
        hidden = np.concatenate([part.hidden for part in parts], axis=1)[:, order]
        tokens, choices = (
            np.concatenate([getattr(p, name) for p in parts])[order] for name in ("tokens", "choices")
        )
        return cls(hidden, tokens, choices, texts[order])

    def of(self, texts: Ints) -> HiddenStates:
        """Those of some texts."""
        here = np.isin(self.texts, texts)
        return HiddenStates(self.hidden[:, here], self.tokens[here], self.choices[here], self.texts[here])


def read_prompts(loaded: LoadedModel, files: Sequence[Path] = ()) -> list[list[int]]:
    """The prompts of the package, as token ids, and the beginnings of a user's own texts: 24 words a paragraph."""
    tokenizer = loaded.tokenizer
    result = []
    for line in PROMPTS.read_text("utf-8").splitlines():
        chat = line.startswith("chat: ")
        text = line.removeprefix("chat: ")
        if chat and tokenizer.has_chat_template:
            result.append(tokenizer.encode_chat([{"role": "user", "content": text}])[1])
        else:
            result.append(tokenizer.encode(text))
    for file in files:
        paragraphs = [" ".join(p.split()[:24]) for p in read_text(file, "the text").split("\n\n")]
        result += [tokenizer.encode(paragraph) for paragraph in paragraphs if paragraph]
    return result


def sample_texts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    tokens: int,
    eos_ids: frozenset[int],
    temperature: float,
    seed: int,
    note: Callable[[int], None] = lambda done: None,
) -> HiddenStates:
    """Continue all prompts by `tokens` tokens together, on one cache in which each text sees only itself.

    temperature: 0 is greedy, otherwise tokens are sampled. A text ends at an EOS token. note: called with the number of
    tokens so far.
    """
    random = np.random.default_rng(seed)
    cache = model.new_cache()
    owners: Ints = np.empty(0, np.int64)
    texts = np.arange(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    new, new_owners = np.concatenate([np.asarray(p, np.int64) for p in prompts]), np.repeat(texts, lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    newest = np.cumsum(lengths) - 1  # the rows whose logits are wanted
    hidden, newest_tokens, choices, of_text = [], [], [], []
    for done in range(tokens):
        owners = np.concatenate([owners, new_owners])
        own = np.arange(len(owners) - len(new), len(owners))
        seen = (new_owners[:, None] == owners) & (own[:, None] >= np.arange(len(owners)))
        cache.reserve(positions)
        rows = model.rows(positions, np.where(seen, np.float32(0), np.float32(-np.inf)), cache)
        x, kept = model.embedded(new), []
        for first, stop in pairwise([0, *(layer + 1 for layer in layers)]):
            x, _ = model.run_layers(x, rows, cache, first, stop)
            kept.append(x[mx.array(newest)])
        cache.commit()
        logits = np.array(model.logits(kept[-1]))
        states = np.array(mx.stack(kept).astype(mx.float32))
        hidden.append(np.clip(states, -LARGEST, LARGEST).astype(np.float16))
        best = logits.argmax(axis=1)
        newest_tokens.append(new[newest])
        choices.append(best)
        of_text.append(texts)
        drawn = best if temperature == 0 else draw(logits, temperature, random)
        going = ~np.isin(drawn, list(eos_ids))
        texts, new, positions = texts[going], drawn[going], positions[newest][going] + 1
        new_owners, newest = texts, np.arange(len(texts))
        note(done + 1)
        if not len(texts):
            break
    parts = HiddenStates(
        np.concatenate(hidden, axis=1), *map(np.concatenate, (newest_tokens, choices, of_text))
    )
    return HiddenStates.join([parts])


def draw(logits: Float32s, temperature: float, random: np.random.Generator) -> Ints:
    """Sample one token for each row of logits (k, V), by the Gumbel-max trick."""
    noisy: Ints = (logits / temperature + random.gumbel(size=logits.shape)).argmax(axis=1)
    return noisy
