"""Calibrate early exit: generate text with the model, fit translators to it, measure agreement on held-out prompts.

Every slow stage is saved when it is done, so an interrupted calibration resumes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx._version import __version__
from tempo_mlx.errors import BackendError
from tempo_mlx.exits.calibration import Calibration, Translator, candidates, key_of, place_of
from tempo_mlx.exits.fit import fit_translator, judge, shortlist
from tempo_mlx.exits.samples import TOGETHER, HiddenStates, read_prompts, sample_texts
from tempo_mlx.exits.schedule import costs_of, with_schedule
from tempo_mlx.files import replacing
from tempo_mlx.loading import LoadedModel
from tempo_mlx.mlx import mx
from tempo_mlx.model.transformer import Transformer

WIDTHS = (2048, 4096, 8192)  # shortlist lengths that are tried at each exit
LAST_WIDTHS = (4096, 8192, 16384)  # at the last layer, where everything else is exact
FITTED_WIDTH = 4096  # the shortlist that translators are fitted with
TEMPERATURES = (0.0, 0.7)  # every prompt is continued once with each
HELD_OUT = 3  # every third prompt judges, the others fit
DEV = 12  # of the others, every twelfth decides when to stop fitting

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
    as they are, which suits models trained for early exit (LayerSkip, arXiv 2404.16710).
    Raises BackendError, ConfigError, ModelError, OutputError.
    """
    model = loaded.model
    if not isinstance(model, Transformer):
        raise BackendError("Early exit needs the MLX backend; leave out --backend.")
    key = key_of(model.info)
    chosen = candidates(model.architecture.num_hidden_layers, layers)
    prompts = read_prompts(loaded, files)
    folder = stages_of(model.info, layers=chosen, tokens=tokens, prompts=prompts)
    samples = collect(loaded, model, prompts, chosen, tokens, folder, progress)
    train, dev, held = split(samples, len(prompts))
    listed = shortlist(model, train, max(LAST_WIDTHS), sorted(loaded.tokenizer.eos_ids))
    head = model.head.choose(mx.array(listed[:FITTED_WIDTH]))
    fitted: dict[int, Translator | None] = dict.fromkeys(chosen)
    for at, layer in enumerate(chosen[:-1] if translators else ()):
        progress("Fitting", at, len(chosen))
        found = cached(folder / f"layer-{layer}.npz", partial(fit_translator, model, head, train, dev, at))
        fitted[layer] = found["weight"].astype(np.float16), found["offset"].astype(np.float16)
    progress("Fitting", len(chosen), len(chosen))
    of_text = {int(number): prompts[number % len(prompts)] for number in np.unique(held.texts)}
    outcomes = {}
    for at, layer in enumerate(chosen):
        progress("Judging", at, len(chosen))
        for width in LAST_WIDTHS if layer == chosen[-1] else WIDTHS:
            outcomes[layer, width] = judge(model, listed[:width], held, of_text, at, fitted[layer])
    progress("Judging", len(chosen), len(chosen))
    costs = costs_of(model, (*WIDTHS, *LAST_WIDTHS))
    exits = with_schedule(outcomes, fitted, held.texts, len(prompts), costs)
    made = {
        "version": __version__, "prompts": len(prompts), "tokens": len(samples.choices),
        "held_out_tokens": len(held.choices), "translators": translators,
    }  # fmt: skip
    return Calibration(key, tuple(exits), listed, made)


def forget_samples(key: str) -> None:
    """Delete what an interrupted calibration would have resumed from."""
    shutil.rmtree(_samples_of(key), ignore_errors=True)


def stages_of(info: Mapping[str, Any], **settings: Any) -> Path:
    """Where the stages of a calibration of these settings are kept, by a model of this info, wherever its files lie."""
    computed = {name: value for name, value in info.items() if name != "id"}
    said = json.dumps({**settings, "version": __version__, "model": computed})
    return _samples_of(key_of(info)) / hashlib.sha256(said.encode()).hexdigest()[:12]


def _samples_of(key: str) -> Path:
    return place_of(key).with_suffix("")


def split(samples: HiddenStates, prompts: int) -> tuple[HiddenStates, HiddenStates, HiddenStates]:
    """Training, development and held-out samples; all texts of one prompt go to the same split."""
    numbers = np.arange(samples.texts.max() + 1)
    prompt = numbers % prompts
    held, dev = prompt % HELD_OUT == HELD_OUT - 1, prompt % DEV == 0
    return samples.of(numbers[~held & ~dev]), samples.of(numbers[~held & dev]), samples.of(numbers[held])


def collect(
    loaded: LoadedModel,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    tokens: int,
    folder: Path,
    progress: Progress,
) -> HiddenStates:
    """Texts of all prompts, once with each temperature; text number t is of prompt t modulo their number."""
    eos_ids = frozenset(loaded.tokenizer.eos_ids)
    groups = [
        (temperature, prompts[start : start + TOGETHER])
        for temperature in TEMPERATURES
        for start in range(0, len(prompts), TOGETHER)
    ]
    parts = []
    for number, (temperature, group) in enumerate(groups):

        def make(
            number: int = number, temperature: float = temperature, group: Any = group
        ) -> dict[str, Any]:
            def note(done: int) -> None:
                progress("Sampling", number * tokens + done, len(groups) * tokens)

            note(0)
            return vars(sample_texts(model, group, layers, tokens, eos_ids, temperature, number, note))

        parts.append(HiddenStates(**cached(folder / f"samples-{number}.npz", make)))
    return HiddenStates.join(parts)


def cached(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays in `path`, made and written there first if it does not exist, or is damaged. Raises OutputError."""
    with suppress(OSError, ValueError, EOFError, zipfile.BadZipFile), np.load(path) as opened:
        return dict(opened)
    made = dict(make())
    with replacing(path, make_folder=True) as draft:
        np.savez(draft, **made)
    return made
