"""A model that remembers its last prompt."""

from __future__ import annotations

import os
import sys

from tempo_mlx.api import DecodingKeywords, Prompt, Stream, stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.loading import LoadedModel, require_loaded
from tempo_mlx.prompt_cache import PromptCache, read_prompt_cache
from tempo_mlx.report.run import Run

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack


class Session:
    """Generate from prompts that begin alike, and run what they share only once.

    For a conversation, or for many questions about one text. Runs are what `tempo_mlx.generate` and `stream` give. One
    thread at a time; a stream begun earlier is not disturbed by the next.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises ConfigError for anything but a loaded model."""
        require_loaded(loaded)
        self.loaded = loaded
        self._known = loaded.prompt_cache or PromptCache((), loaded.model.new_cache())

    def generate(
        self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Unpack[DecodingKeywords]
    ) -> Run:
        """As `tempo_mlx.generate`."""
        return self.stream(prompt, config, **settings).complete()

    def stream(
        self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Unpack[DecodingKeywords]
    ) -> Stream:
        """As `tempo_mlx.stream`. A `cache` is gone on from in place of what was run before."""
        decoding = stream(self.loaded, prompt, config, **settings)
        ids = decoding.prompt.token_ids
        if settings.get("cache") is None:
            decoding.cache = self._known.prefix(self.loaded.model, ids)
        self._known = PromptCache(ids, decoding.cache)
        return decoding

    def save_cache(self, path: str | os.PathLike[str]) -> None:
        """Write what was computed of the last prompt, for `load(..., prompt_cache=path)` or `load_cache`.

        Raises OutputError, ModelError.
        """
        self._known.save(path, self.loaded.model)

    def load_cache(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save_cache` wrote. Raises ModelError: it is damaged, or another model's."""
        self._known = read_prompt_cache(path, self.loaded.model)
