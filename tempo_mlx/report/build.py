"""From the steps of a decoder to a Run: texts of the tokens, the best path, the inline text."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from tempo_mlx.decode.paths import is_read
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.step import RunStep, RunToken, Step
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule
from tempo_mlx.report.run import Run, best_path
from tempo_mlx.report.stops import cut_at_stop
from tempo_mlx.report.text import Tokenizer, inline_set, texts_along


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
    early_exit: Mapping[str, Any] | None = None,
    custom: Mapping[str, RunRule] | None = None,
) -> Run:
    """The run of finished (or cancelled) decoding.

    Of a lattice `final_text` is the best path and `text` shows every alternative; of other decoders both are the best
    of `paths`, whose rows are exact readings of their own. Both end where the best path comes to a stop string of
    `config["stop"]`. `custom`: functions of the caller's own, by what they decide.
    """
    plain, path = texted([step.record(tokenizer) for step in steps], tokenizer)
    texts = [token.text if is_read(token) else "" for token in path]
    if paths and not DECODERS[decoder].lattice:
        text = final_text = paths[0].text
    else:
        final_text = cut_at_stop("".join(texts), config.get("stop") or ())
        text = inline_text(plain, texts, len(final_text))
    return Run(
        model=model_info,
        versions=versions(),
        decoder=decoder,
        config=config,
        prompt=prompt,
        steps=plain,
        tree=tree,
        reasoning=reasoning,
        text=text,
        final_text=final_text,
        paths=tuple(paths),
        finish_reason=finish_reason,
        timing=timing,
        early_exit=early_exit,
        custom=custom or None,
    )


def texted(steps: Sequence[RunStep], tokenizer: Tokenizer) -> tuple[tuple[RunStep, ...], list[RunToken]]:
    """The steps with the texts that the tokens of the best path have in it, and the path.

    Alone, a token that holds part of a character has no text; along the path the character is whole.
    """
    best = best_path(steps)
    read = [token for token in best if is_read(token)]
    texts = texts_along([token.id for token in read], tokenizer)
    along = {id(token): replace(token, text=text) for token, text in zip(read, texts, strict=True)}
    path = [along.get(id(token), token) for token in best]
    return tuple(
        replace(step, tokens=tuple(along.get(id(token), token) for token in step.tokens)) for step in steps
    ), path


def inline_text(steps: Sequence[RunStep], texts: Sequence[str], length: int) -> str:
    """Every set's text, as far as the best path goes. texts: what it reads of each set; length: of it in all."""
    parts, read = [], 0
    for step, text in zip(steps, texts, strict=True):
        if read + len(text) > length:
            parts.append(text[: length - read])
            break
        parts.append(inline_set(step.tokens, [token.text for token in step.tokens]))
        read += len(text)
    return "".join(parts)


def versions() -> dict[str, str]:
    """Versions of Python and of what computes, as far as installed."""
    result = {"python": platform.python_version()}
    for name in ("tempo-mlx", "mlx", "torch", "numpy", "tokenizers"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
