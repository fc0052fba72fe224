"""What people type who come from Ollama, in this program's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SAME: Mapping[str, tuple[str, ...]] = {
    "list": ("models", "list"),
    "ls": ("models", "list"),
    "pull": ("models", "pull"),
    "rm": ("models", "remove"),
}


def in_our_words(arguments: Sequence[str]) -> list[str]:
    """`run MODEL` chats and `run MODEL "question"` answers; pull, list, rm and help do what they do there.

    What is no such command comes back as it is.
    """
    command, *rest = arguments or [""]
    if command in SAME:
        return [*SAME[command], *rest]
    if command == "help":
        return [*rest, "--help"]
    if command == "run" and rest and not rest[0].startswith("-"):
        model, *rest = rest
        asks = bool(rest) and not rest[0].startswith("-")
        question = ["ask", rest.pop(0)] if asks else ["chat"]
        return [*question, "--model", model, *rest]
    if command == "run":
        return ["chat", *rest]
    return list(arguments)
