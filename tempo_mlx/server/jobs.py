"""The worker's side of a request: a generator of outputs for each kind, advanced one turn at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.width import with_measured_width
from tempo_mlx.loading import LoadedModel
from tempo_mlx.server.completions import complete
from tempo_mlx.server.decoding import ask, generate
from tempo_mlx.server.events import Output
from tempo_mlx.server.prompts import read_prompt
from tempo_mlx.server.protocol import Kind, Ready
from tempo_mlx.server.seats import Seats
from tempo_mlx.server.sessions import Sessions
from tempo_mlx.server.settings import ServerConfig


class Jobs:
    """The model, the sessions, and a generator for every kind of request."""

    def __init__(self, loaded: LoadedModel, config: ServerConfig) -> None:
        self.loaded, self.config = loaded, config
        self.sessions = Sessions(loaded, config)
        self.seats = Seats(loaded)
        self._slots: dict[str, int] = {}  # cache slots of requests under way

    def ready(self) -> Ready:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return Ready(
            dict(model.info), model.architecture.max_position_embeddings, tokenizer.has_chat_template
        )

    def probe(self) -> None:
        """One real forward pass of one row."""
        self.loaded.model.forward([0], [0], None, self.loaded.model.new_cache(), logits="last")

    def check_ranks(self) -> None:
        """Raises RankLostError if the model has lost a rank."""
        if self.loaded.leader is not None:
            self.loaded.leader.check()

    def cache_slots(self) -> int:
        return sum(self._slots.values()) + self.sessions.cache_slots()

    def start(
        self, kind: Kind, payload: dict[str, Any], id: str, interrupted: Interrupt
    ) -> Generator[Output | None, None, None]:
        """The request's outputs, computed lazily. Close the generator to release what it holds."""
        if kind == "session":
            return self.sessions.perform(payload, id, interrupted)
        return self._decode(kind, payload, id, interrupted)

    def _decode(
        self, kind: Kind, payload: dict[str, Any], id: str, interrupted: Interrupt
    ) -> Generator[Output, None, None]:
        config: GenerateConfig = with_measured_width(payload["config"], self.loaded.model)
        prompt = read_prompt(self.loaded, payload, config, self.config.max_prompt_tokens)
        run = {"generate": generate, "ask": ask}.get(kind, complete)
        try:
            loaded = self.seats.take(id, config)
            for output in run(loaded, prompt, config, payload, id, interrupted):
                self._slots[id] = int(output.stats.get("cache_slots", 0))
                yield output
        finally:
            self._slots.pop(id, None)
            self.seats.leave(id)
