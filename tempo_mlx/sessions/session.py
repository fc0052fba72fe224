"""A model that remembers its last prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tempo_mlx.api import DecodingKeywords, Prompt, Stream, stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.loading import LoadedModel, require_loaded
from tempo_mlx.model.rope import follows_length
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
        self._ids: Sequence[int] = ()
        self._cache: Any = loaded.model.new_cache()  # begins with as much of _ids as was run

    def generate(
        self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Unpack[DecodingKeywords]
    ) -> Run:
        """As `tempo_mlx.generate`."""
        return self.stream(prompt, config, **settings).complete()

    def stream(
        self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Unpack[DecodingKeywords]
    ) -> Stream:
        """As `tempo_mlx.stream`."""
        decoding = stream(self.loaded, prompt, config, **settings)
        ids = decoding.prompt.token_ids
        decoding.cache = self._prefix(ids)
        self._ids, self._cache = ids, decoding.cache
        return decoding

    def _prefix(self, ids: Sequence[int]) -> Any:
        """A cache of what is known of these ids, at most all but the last, whose row has the first logits."""
        length = max(len(ids), len(self._ids))
        if any(follows_length(rope, length) for rope in self.loaded.model.architecture.ropes):
            return self.loaded.model.new_cache()
        pairs = zip(self._ids, ids, strict=False)
        equal = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(self._ids), len(ids)))
        cache = self._cache.copy()
        cache.truncate(max(0, min(equal, len(ids) - 1)))
        return cache
