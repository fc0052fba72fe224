"""Calibrating early exit: text of the model's own, translators fitted to it, margins held to it.

Everything that takes time is kept as it is done, so that a calibration that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx._version import __version__
from tempo_mlx.errors import BackendError, OutputError
from tempo_mlx.exits.calibration import TARGETS, Calibration, Exit, candidates, key_of, place_of
from tempo_mlx.exits.fit import Outcome, Place, curve, fit_translator, judge, shortlist, together
from tempo_mlx.exits.samples import TOGETHER, Samples, read_prompts, sample_texts
from tempo_mlx.exits.schedule import Costs, choose, choose_draft, costs_of
from tempo_mlx.loading import LoadedModel
from tempo_mlx.mlx import mx
from tempo_mlx.model.transformer import Transformer

WIDTHS = (2048, 4096, 8192)  # how many tokens of the shortlist an exit may choose among, each judged
LAST_WIDTHS = (4096, 8192, 16384)  # at the last layer, where everything else is exact
FITTED_WIDTH = 4096  # with which translators are fitted
TEMPERATURES = (0.0, 0.7)  # every prompt is continued once with each
HELD_OUT = 3  # every third prompt judges, the others fit
STRICTER = 10  # steps in which margins are raised
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
    listed = shortlist(model, train, max(LAST_WIDTHS), sorted(loaded.tokenizer.eos_ids))
    head = model.head.choose(mx.array(listed[:FITTED_WIDTH]))
    fitted: dict[int, Any] = {}
    for at, layer in enumerate(chosen):
        progress("Fitting", at, len(chosen))
        fitted[layer] = None
        if translators and layer != chosen[-1]:
            found = kept(
                folder / f"layer-{layer}.npz",
                partial(fit_translator, model, head, train, dev, at),
            )
            fitted[layer] = found["weight"].astype(np.float16), found["offset"].astype(np.float16)
    of_text = {int(number): prompts[number % len(prompts)] for number in numbers}
    outcomes: dict[Place, Outcome] = {}
    for at, layer in enumerate(chosen):
        progress("Judging", at, len(chosen))
        for width in LAST_WIDTHS if layer == chosen[-1] else WIDTHS:
            outcomes[layer, width] = judge(model, listed[:width], held, of_text, at, fitted[layer])
    progress("Judging", len(chosen), len(chosen))
    curves = {place: curve(outcome, held.texts % len(prompts)) for place, outcome in outcomes.items()}
    made = {
        "version": __version__, "prompts": len(prompts), "tokens": len(samples.choices),
        "held_out_tokens": len(held.choices), "translators": translators,
    }  # fmt: skip
    exits = with_schedule(
        curves, outcomes, fitted, held, len(prompts), costs_of(model, (*WIDTHS, *LAST_WIDTHS))
    )
    return Calibration(key, tuple(exits), listed, made)


def forget_samples(key: str) -> None:
    """Delete what an interrupted calibration would have gone on from."""
    shutil.rmtree(place_of(key).with_suffix(""), ignore_errors=True)


def with_schedule(
    curves: Mapping[Place, Any],
    outcomes: Mapping[Place, Outcome],
    fitted: Mapping[int, Any],
    held: Samples,
    prompts: int,
    costs: Costs,
) -> list[Exit]:
    """The exits, each with the targets for which it pays, or pays to draft with. Of a layer that never does only the
    widest is kept, to say so, and no translator.

    What a later exit is left with is harder than what it was judged on, as the exits before it took the sure choices;
    so margins are raised until all exits of a target keep it together.
    """
    plain = {place: Exit(*place, curve) for place, curve in curves.items()}
    pays: dict[Place, dict[float, float]] = {place: {} for place in plain}
    drafts: dict[Place, dict[float, float]] = {place: {} for place in plain}
    for target in TARGETS:
        known = {place: item.margin(target) for place, item in plain.items()}
        margins = {place: margin for place, margin in known.items() if margin is not None}
        if (best := choose_draft(margins, outcomes, held.texts, costs)) is not None:
            drafts[best][target] = margins[best]
        for step in range(STRICTER):
            aim = target + (1 - target) * step / STRICTER
            thresholds = {place: item.margin(aim) for place, item in plain.items()}
            places = choose(thresholds, outcomes, held.texts, costs)
            least = {place: margin for place in places if (margin := thresholds[place]) is not None}
            if together(places, least, outcomes, held.texts % prompts) >= target:
                for place in places:
                    pays[place][target] = least[place]
                break
    paying = {layer for layer, width in plain if pays[layer, width] or drafts[layer, width]}
    result = []
    for (layer, width), item in plain.items():
        place = layer, width
        if pays[place] or drafts[place]:
            weight, offset = fitted[layer] or (None, None)
            result.append(replace(item, pays=pays[place], drafts=drafts[place], weight=weight, offset=offset))
        elif layer not in paying and width == max(w for other, w in plain if other == layer):
            result.append(item)
    return result


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
