"""The models served, each with an engine of its own. The first is loaded at once, others when a request names them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.protocol import Beat, Ready
from tempo_mlx.server.settings import Pace, ServerConfig
from tempo_mlx.weights import open_checkpoint


class Models:
    """Raises ConfigError where the models cannot be told apart, or not be loaded beside each other; and, as nobody
    would see it before a request, ModelError or DownloadError for those that are not loaded at once.
    """

    def __init__(
        self, loads: Sequence[LoadConfig], config: ServerConfig, metrics: Metrics, pace: Pace
    ) -> None:
        if len(loads) > 1 and config.model_alias is not None:
            raise ConfigError(
                f"model_alias is {config.model_alias}, one name for {len(loads)} models; leave it out."
            )
        if len(loads) > 1 and ranks.rank() is not None:
            raise ConfigError(f"mlx.launch spreads one model, and {len(loads)} are given; give --model once.")
        engines = [Engine(load, config, metrics, pace) for load in loads]
        self.engines = {engine.name: engine for engine in engines}
        for engine in engines:
            if engine is not self.engines[engine.name]:
                raise ConfigError(
                    f"Two models are called {engine.name}; rename a file, or serve one of them."
                )
            engine.beside = partial(self._beside, engine)
            engine.make_room = partial(self._make_room, engine)
        for engine in engines[1:]:
            engine.ready = look_at(engine.load)

    @property
    def default(self) -> Engine:
        """Of requests that name no model."""
        return next(iter(self.engines.values()))

    @property
    def ready(self) -> Engine:
        """Any that is loaded."""
        return next((each for each in self.engines.values() if each.state == "ready"), self.default)

    def named(self, name: str | None) -> Engine:
        """Raises ApiError."""
        if name is None:
            return self.default
        if name not in self.engines:
            there = ", ".join(self.engines)
            only = f"the model {there} only" if len(self.engines) == 1 else f"the models {there}"
            raise ApiError(404, "model_not_found", f"This server serves {only}.", "model")
        return self.engines[name]

    def of_session(self, id: str) -> Engine:
        """The one that made it; any that is loaded where none did."""
        every = self.engines.values()
        return next((e for e in every if id in e.sessions or id in e.lost_sessions), self.ready)

    def of_run(self, run: Mapping[str, Any]) -> Engine:
        """The one that made a run file, if its model is served; it is checked where it is imported."""
        model = run.get("model")
        id = model.get("id") if isinstance(model, dict) else None
        return self.engines.get(id, self.default) if isinstance(id, str) else self.default

    def find(self, id: str, owner: str | None) -> tuple[Engine, Ticket] | None:
        """A request in flight, if it is the owner's."""
        found = ((engine, engine.find(id, owner)) for engine in self.engines.values())
        return next(((engine, ticket) for engine, ticket in found if ticket is not None), None)

    async def start(self) -> None:
        for engine in self.engines.values():
            await engine.start(load=engine is self.default)

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self.engines.values()))

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(engine.drain(seconds) for engine in self.engines.values()))

    @property
    def running(self) -> int:
        return sum(engine.running for engine in self.engines.values())

    @property
    def waiting(self) -> int:
        return sum(engine.waiting for engine in self.engines.values())

    @property
    def beats(self) -> list[Beat]:
        """The last of each model that is loaded."""
        return [engine.beat for engine in self.engines.values() if engine.beat is not None]

    def _others(self, engine: Engine) -> Iterable[Engine]:
        return (other for other in self.engines.values() if other is not engine)

    def _beside(self, engine: Engine) -> int | None:
        """Bytes that the others take; None while one is being loaded, so that two never believe in the same memory."""
        held = [other.memory for other in self._others(engine)]
        return None if None in held else sum(each or 0 for each in held)

    def _make_room(self, engine: Engine) -> asyncio.Task[None] | None:
        """Unload the one that was not used for the longest time, of those without sessions where there are some."""
        idle = [other for other in self._others(engine) if other.idle]
        if not idle:
            return None
        return min(idle, key=lambda other: (other.kept_sessions > 0, other.used)).unload()


def look_at(load: LoadConfig) -> Ready:
    """What the header of a model's weights says of it; they are fetched where they are not here."""
    checkpoint = open_checkpoint(load.model, adapter=load.adapter)
    a = checkpoint.architecture
    known = {"family": a.family, "quantization": checkpoint.quantization}
    return Ready(known, a.max_position_embeddings, None)
