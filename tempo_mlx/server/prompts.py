"""The prompt of a request: text, messages or token ids, within the limits of model and server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempo_mlx.api import encode_chat, encode_prompt
from tempo_mlx.config import GenerateConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.server.errors import ApiError
from tempo_mlx.weights.infilling import infilling_prompt

CHARACTERS_PER_TOKEN = 64  # a longer text cannot fit; it is refused before it is tokenised


def read_prompt(
    loaded: LoadedModel, payload: Mapping[str, Any], config: GenerateConfig, max_tokens: int | None
) -> RunPrompt:
    """`payload` has "prompt" (text or token ids) or "messages". Raises ApiError."""
    limit = longest(loaded, max_tokens)
    prompt: str | list[int] = payload.get("prompt") or ""
    messages: list[dict[str, Any]] = payload.get("messages") or []
    size = len(str(messages)) + sum(map(len, config.template_variables)) if messages else len(prompt)
    size += len(payload.get("suffix") or "")
    if size > CHARACTERS_PER_TOKEN * limit:
        raise too_long(limit)
    if messages:
        if not loaded.tokenizer.has_chat_template:
            raise ApiError(
                400,
                "no_chat_template",
                "The model has no chat template; send a prompt, not messages.",
                "messages",
            )
        if any(each.startswith("tools=") for each in config.template_variables):
            check_tools(loaded)
        encoded = encode_chat(loaded.tokenizer, messages, config)
    elif payload.get("suffix"):
        encoded = encode_infilling(loaded, prompt, payload["suffix"])
    else:
        encoded = encode_prompt(loaded, prompt, config)
    if not encoded.token_ids:
        raise ApiError(
            400, "invalid_prompt", "The prompt is empty; give it at least one character.", "prompt"
        )
    check_length(loaded, encoded, max_tokens)
    return encoded


def longest(loaded: LoadedModel, max_tokens: int | None) -> int:
    """Tokens a prompt may have at most."""
    limit = loaded.model.architecture.max_position_embeddings - 1
    return limit if max_tokens is None else min(limit, max_tokens)


def check_length(loaded: LoadedModel, prompt: RunPrompt, max_tokens: int | None) -> None:
    """Raises ApiError."""
    if len(prompt.token_ids) > (limit := longest(loaded, max_tokens)):
        raise too_long(limit)


def encode_infilling(loaded: LoadedModel, prompt: str | list[int], suffix: str) -> RunPrompt:
    """What stands before and after the text that is wanted. Raises ApiError where the model cannot do it."""
    before = prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt)
    ids = infilling_prompt(loaded.tokenizer, before, suffix)
    if ids is None:
        raise ApiError(
            400,
            "no_infilling",
            "The model has no tokens for filling in; leave out suffix, or serve one that has, such as a Qwen2.5-Coder.",
            "suffix",
        )
    return RunPrompt(before, tuple(ids))


def check_tools(loaded: LoadedModel) -> None:
    """Raises ApiError where the model would not be told of any tools."""
    if not any("tools" in source for source in loaded.tokenizer.chat_templates.values()):
        raise ApiError(
            400,
            "no_tools",
            "The model's chat template knows no tools; leave them out, or serve a model that was taught to use them.",
            "tools",
        )


def too_long(limit: int) -> ApiError:
    return ApiError(
        400, "context_length_exceeded", f"The prompt is longer than {limit} tokens; shorten it.", "prompt"
    )
