"""`tempo-mlx serve`: the HTTP server."""

from __future__ import annotations

import os
import sys
from typing import Any

from tempo_mlx.cli.options import ConfigFile, with_settings
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.resolution import Shortcuts
from tempo_mlx.server.settings import ServedModels, ServerConfig
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import load_settings


@with_settings(LoadConfig, ServedModels, ServerConfig)
def serve(flags: dict[str, Any], config: ConfigFile = None) -> None:
    """Serve models over HTTP: our API, OpenAI's, and the web page.

    Settings of a run in the environment (TEMPO_THRESHOLD=0.2) become the defaults of every request.
    """
    tables = (LoadConfig, ServedModels, ServerConfig, GenerateConfig, Shortcuts)
    given = load_settings(config, os.environ, flags, configs=tables, elsewhere=lambda: (OutputConfig,))
    try:
        from tempo_mlx.server.serve import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The server needs {error.name}; pip install 'tempo-mlx[server]' brings it."
        ) from error

    names = {*settings_of(GenerateConfig), *settings_of(Shortcuts)}
    ambient = {name: value for name, value in {**given.file, **given.environment}.items() if name in names}
    loads = [given.with_flags(model=name).make(LoadConfig) for name in given.make(ServedModels).model]
    run(loads, given.make(ServerConfig), ambient, announce=_announce)


def _announce(url: str) -> None:
    print(f"Serving on {url}  (API reference: {url}/docs; stop with Ctrl-C)", file=sys.stderr, flush=True)  # noqa: T201
