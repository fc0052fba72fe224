"""Calibrating early exit: text of the model's own, translators fitted to it, margins held to it.

Everything that takes time is kept as it is done, so that a calibration that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx._version import __version__
from tempo_mlx.calibrate.fit import Outcome, curve, fit_translator, judge, shortlist
from tempo_mlx.calibrate.samples import TOGETHER, Samples, read_prompts, sample_texts
from tempo_mlx.calibrate.schedule import Costs, choose, measure_costs
from tempo_mlx.errors import BackendError, OutputError
from tempo_mlx.model._mlx import mx
from tempo_mlx.model.calibration import TARGETS, Calibration, Exit, candidates, key_of, place_of
from tempo_mlx.model.load import LoadedModel
from tempo_mlx.model.transformer import Transformer

SHORTLIST = 4096
TEMPERATURES = (0.0, 0.7)  # every prompt is continued once with each
HELD_OUT = 3  # every third prompt judges, the others fit
DEV = 12  # of the others, every so-many-th stops the fitting

Progress = Callable[[str, int, int], None]


def calibrate(
    loaded: LoadedModel,
    *,
    layers: Sequence[int] | None = None,
    files: Sequence[Path] = (),
    tokens: int = 96,
    translators: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Calibrate a model; see `calibrate` on the command line. `progress`: (stage, done, of all).

    files: texts of a user's own, whose paragraphs are continued as well. translators: without them the layers are read
    as they are, as suits a model that was trained to be (LayerSkip, arXiv 2404.16710).
    Raises BackendError, ConfigError, ModelError, OutputError.
    """
    model = loaded.model
    if not isinstance(model, Transformer):
        raise BackendError("Early exit needs the MLX backend; leave out --backend.")
    key = key_of(model.info)
    chosen = candidates(model.architecture.num_hidden_layers, layers)
    prompts = read_prompts(loaded, files)
    settings = {"layers": chosen, "tokens": tokens, "prompts": prompts, "version": __version__}
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = place_of(key).with_suffix("") / mark
    samples = collect(loaded, model, prompts, chosen, tokens, folder, progress)
    numbers = np.arange(samples.texts.max() + 1)
    prompt_of = numbers % len(prompts)  # the texts of one prompt are held out together
    held = samples.of(numbers[prompt_of % HELD_OUT == HELD_OUT - 1])
    dev = samples.of(numbers[(prompt_of % HELD_OUT != HELD_OUT - 1) & (prompt_of % DEV == 0)])
    train = samples.of(numbers[(prompt_of % HELD_OUT != HELD_OUT - 1) & (prompt_of % DEV != 0)])
    listed = shortlist(model, train, SHORTLIST, sorted(loaded.tokenizer.eos_ids))
    head = model.head.choose(mx.array(listed))
    fitted: dict[int, Any] = {}
    for at, layer in enumerate(chosen):
        progress("Fitting", at, len(chosen))
        fitted[layer] = None
        if translators and layer != chosen[-1]:
            found = kept(
                folder / f"layer-{layer}.npz",
                lambda at=at: dict(  # type: ignore[misc]
                    zip(("weight", "offset"), fit_translator(model, head, train, dev, at), strict=True)
                ),
            )
            fitted[layer] = found["weight"].astype(np.float16), found["offset"].astype(np.float16)
    of_text = {int(number): prompts[number % len(prompts)] for number in numbers}
    outcomes = {
        layer: judge(model, listed, held, of_text, at, fitted[layer]) for at, layer in enumerate(chosen)
    }
    exits = {
        layer: Exit(layer, curve(outcome, held.texts % len(prompts)), (), *(fitted[layer] or (None, None)))
        for layer, outcome in outcomes.items()
    }
    progress("Fitting", len(chosen), len(chosen))
    made = {
        "version": __version__, "prompts": len(prompts), "tokens": len(samples.choices),
        "held_out_tokens": len(held.choices), "translators": translators, "shortlist": len(listed),
    }  # fmt: skip
    result = Calibration(key, with_schedule(exits, outcomes, held, measure_costs(model, head)), listed, made)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return result


def with_schedule(
    exits: Mapping[int, Exit], outcomes: Mapping[int, Outcome], held: Samples, costs: Costs
) -> dict[int, Exit]:
    """Note for each exit the targets for which it pays; those that pay for none keep no translator."""
    pays: dict[int, list[float]] = {layer: [] for layer in exits}
    for target in TARGETS:
        thresholds = {layer: item.margin(target) for layer, item in exits.items()}
        for layer in choose(thresholds, outcomes, held.texts, costs):
            pays[layer].append(target)
    return {
        layer: Exit(
            layer,
            item.curve,
            tuple(pays[layer]),
            *((item.weight, item.offset) if pays[layer] else (None, None)),
        )
        for layer, item in exits.items()
    }


def collect(
    loaded: LoadedModel,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    tokens: int,
    folder: Path,
    progress: Progress,
) -> Samples:
    """Texts of all prompts, once with each temperature; text number t is of prompt t modulo their number."""
    groups = [
        (temperature, start) for temperature in TEMPERATURES for start in range(0, len(prompts), TOGETHER)
    ]
    parts = []
    for number, (temperature, start) in enumerate(groups):
        progress("Sampling", number * tokens, len(groups) * tokens)

        def make(
            number: int = number, temperature: float = temperature, start: int = start
        ) -> dict[str, Any]:
            found = sample_texts(
                model, prompts[start : start + TOGETHER], layers, tokens, frozenset(loaded.tokenizer.eos_ids),
                temperature, number, lambda done: progress("Sampling", number * tokens + done, len(groups) * tokens),
            )  # fmt: skip
            return vars(found)

        parts.append(Samples(**kept(folder / f"samples-{number}.npz", make)))
    return Samples.join(parts)


def kept(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays in `path`, made and written there first if need be. Raises OutputError."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".part.npz")
            np.savez(draft, **make())
            draft.replace(path)
        with np.load(path) as opened:
            return dict(opened)
    except OSError as error:
        raise OutputError(f"Cannot keep {path}: {error.strerror or error}.") from error
