"""TEMPO: multipath decoding of language models on MLX.

    import tempo_mlx
    model = tempo_mlx.load("smollm2-135m")
    run = tempo_mlx.generate(model, "The sky", max_tokens=20)
    print(run.text)

Names are imported when first used, so that `import tempo_mlx` loads no tensor library.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tempo_mlx._version import __version__ as __version__

if TYPE_CHECKING:
    from tempo_mlx.api import Stream as Stream
    from tempo_mlx.api import generate as generate
    from tempo_mlx.api import load as load
    from tempo_mlx.api import score as score
    from tempo_mlx.api import stream as stream
    from tempo_mlx.asking import ask as ask
    from tempo_mlx.config import GenerateConfig as GenerateConfig
    from tempo_mlx.decode.step import Step as Step
    from tempo_mlx.errors import TempoError as TempoError
    from tempo_mlx.load_config import LoadConfig as LoadConfig
    from tempo_mlx.loading import LoadedModel as LoadedModel
    from tempo_mlx.report.answers import Answers as Answers
    from tempo_mlx.report.run import Run as Run
    from tempo_mlx.sessions.conversation import Conversation as Conversation
    from tempo_mlx.sessions.session import Session as Session

_HOMES = {
    "load": "api", "generate": "api", "stream": "api", "score": "api", "Stream": "api",
    "ask": "asking", "Answers": "report.answers",
    "Conversation": "sessions.conversation", "Session": "sessions.session", "Run": "report.run",
    "Step": "decode.step", "GenerateConfig": "config", "LoadConfig": "load_config", "LoadedModel": "loading",
    "TempoError": "errors",
}  # fmt: skip
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tempo_mlx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tempo_mlx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _BeforeMlx:
    """Has the BLAS loaded before mlx is, also where a program imports that itself after this package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            from tempo_mlx import blas

            blas.ensure()


if sys.platform == "linux":
    sys.meta_path.insert(0, _BeforeMlx)
