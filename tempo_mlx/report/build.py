"""From the steps of a decoder to a Run: texts of the tokens, the best path, the inline text."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.step import Step
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule
from tempo_mlx.report.run import Run, best_path
from tempo_mlx.report.text import Tokenizer, inline_set, is_shown, texts_along


def build_run(
    steps: Sequence[Step],
    *,
    prompt: RunPrompt,
    model_info: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    decoder: str,
    finish_reason: str,
    timing: Mapping[str, Any],
    reasoning: str | None = None,
    paths: Sequence[RunPath] = (),
    tree: Mapping[str, Any] | None = None,
    final_text: str | None = None,
    early_exit: Mapping[str, Any] | None = None,
    custom: Mapping[str, RunRule] | None = None,
) -> Run:
    """The run of finished (or cancelled) decoding.

    Of a lattice `final_text` is the best path and `text` shows every alternative; of other decoders both are the best
    of `paths`, whose rows are exact readings of their own.
    `final_text` given replaces the reading (an answer without its reasoning). What follows a stop string of
    `config["stop"]` is cut from it. `custom`: functions of the caller's own, by what they decide.
    """
    plain = [step.record(tokenizer) for step in steps]
    reading = best_path(plain)
    along = dict(
        zip(map(id, reading), texts_along([token.id for token in reading], tokenizer), strict=True)
    )  # characters that several tokens make up are whole on the best path
    texted = tuple(
        replace(
            step, tokens=tuple(replace(token, text=along.get(id(token), token.text)) for token in step.tokens)
        )
        for step in plain
    )
    if paths and not DECODERS[decoder].lattice:
        text = paths[0].text
        best = text
    else:
        text = "".join(inline_set(s.tokens, [t.text for t in s.tokens]) for s in texted)
        best = "".join(along[id(token)] for token in reading if token.slot is not None and is_shown(token))
    return Run(
        model=model_info,
        versions=versions(),
        decoder=decoder,
        config=config,
        prompt=prompt,
        steps=texted,
        tree=tree,
        reasoning=reasoning,
        text=text,
        final_text=cut_at_stop(best if final_text is None else final_text, config.get("stop") or ()),
        paths=tuple(paths),
        finish_reason=finish_reason,
        timing=timing,
        early_exit=early_exit,
        custom=custom or None,
    )


def cut_at_stop(text: str, stop: str | Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    found = [text.find(item) for item in ([stop] if isinstance(stop, str) else stop) if item]
    return text[: min((place for place in found if place >= 0), default=len(text))]


def versions() -> dict[str, str]:
    """Versions of Python and of what computes, as far as installed."""
    result = {"python": platform.python_version()}
    for name in ("tempo-mlx", "mlx", "torch", "numpy", "tokenizers"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
