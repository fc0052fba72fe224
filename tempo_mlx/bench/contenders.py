"""What is compared: the same weights in tempo-mlx (MLX and torch), mlx-lm and transformers.

The others use their own loaders on a directory that `convert` writes in the number format tempo-mlx computes in. All
return float32 logits in host memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.decode.prefill import CHUNK, never, prefill
from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.mlx import mx
from tempo_mlx.model.forward import Attention, Model
from tempo_mlx.weights.convert import convert

# On a CPU, where the others are given unpacked weights.
STORED = "tempo-mlx, file as it is"
NAMES = ("tempo-mlx", STORED, "tempo-mlx (torch)", "mlx-lm", "transformers")
NEEDS = {"tempo-mlx (torch)": "torch", "mlx-lm": "mlx_lm", "transformers": "transformers"}
TOLERANCES = {"float32": 2e-3, "float16": 0.2, "bfloat16": 1.5}  # difference of a logit from tempo-mlx's


class Contender(Protocol):
    """A model that can run a prompt, and rows after it."""

    name: str

    def start(self, ids: Sequence[int], copies: int = 1) -> tuple[Any, Float32s]:
        """Run a prompt; returns the state for the next rows, and the last logits (V,). copies: rows per later pass."""
        ...

    def rows(self, state: Any, tokens: Sequence[int]) -> Float32s:
        """(k, V): the logits after each of k alternative next tokens, which are then dropped."""
        ...


class Ours:
    """tempo-mlx: the rows are members of one set, on one cache."""

    def __init__(self, name: str, model: Model) -> None:
        self.name = name
        self.model = model

    def start(self, ids: Sequence[int], copies: int = 1) -> tuple[Any, Float32s]:
        cache = self.model.new_cache()
        return cache, prefill(self.model, ids, cache, never)[0]

    def rows(self, state: Any, tokens: Sequence[int], attention: Attention = False) -> Float32s:
        length, count = len(state), len(tokens)
        bias = np.zeros((count, length + count), np.float32)
        bias[:, length:] = np.where(np.eye(count, dtype=bool), 0, -np.inf)
        out = self.model.forward(tokens, np.full(count, length), bias, state, attention=attention)
        state.truncate(length)
        assert out.logits is not None
        return out.logits


class MlxLm:
    """mlx-lm: the rows are a batch, each with its own cache."""

    name = "mlx-lm"

    def __init__(self, directory: Path) -> None:
        from mlx_lm.utils import load_model as load

        self.model: Any = load(directory)[0]

    def start(self, ids: Sequence[int], copies: int = 1) -> tuple[Any, Float32s]:
        """As its generate_step runs a prompt: all but the last token in chunks, then the last."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        tokens = mx.array([list(ids)] * copies)
        for start in range(0, len(ids) - 1, CHUNK):
            self.model(tokens[:, start : min(start + CHUNK, len(ids) - 1)], cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache, _host(self.model(tokens[:, -1:], cache=cache)[0, -1])

    def rows(self, state: Any, tokens: Sequence[int]) -> Float32s:
        from mlx_lm.models.cache import trim_prompt_cache

        logits = _host(self.model(mx.array(list(tokens))[:, None], cache=state)[:, -1])
        trim_prompt_cache(state, 1)
        return logits


class Transformers:
    """transformers, with its default attention: the rows are a batch."""

    name = "transformers"

    def __init__(self, directory: Path, dtype: str) -> None:
        import torch

        transformers: Any = import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=getattr(torch, dtype)).eval()
        if torch.cuda.is_available() or torch.backends.mps.is_available():
            self.model = self.model.to("cuda" if torch.cuda.is_available() else "mps")

    def start(self, ids: Sequence[int], copies: int = 1) -> tuple[Any, Float32s]:
        import torch

        cache: Any = None
        with torch.inference_mode():
            for start in range(0, len(ids), CHUNK):
                chunk = torch.tensor([list(ids[start : start + CHUNK])] * copies, device=self.model.device)
                out = self.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
            return cache, out.logits[0, -1].float().cpu().numpy()

    def rows(self, state: Any, tokens: Sequence[int]) -> Float32s:
        import torch

        with torch.inference_mode():
            batch = torch.tensor(list(tokens), device=self.model.device)[:, None]
            logits: Float32s = (
                self.model(batch, past_key_values=state, use_cache=True).logits[:, -1].float().cpu().numpy()
            )
        state.crop(-1)
        return logits


def _host(logits: Any) -> Float32s:
    return np.array(logits.astype(mx.float32))


class Field:
    """The contenders of one benchmark. `loaded`: tempo-mlx's model on MLX, the reference.

    `directory`: the same model in the same number format, for the others.
    """

    def __init__(self, loaded: LoadedModel, contenders: Sequence[Contender], directory: Path) -> None:
        self.loaded = loaded
        self.contenders = list(contenders)
        self.directory = directory

    @property
    def ours(self) -> Ours:
        ours = self.contenders[0]
        assert isinstance(ours, Ours)
        return ours

    @property
    def own(self) -> dict[str, LoadedModel]:
        """By name: the model as the others are given it, and as the file has it."""
        own = (each for each in self.contenders if isinstance(each, Ours) and each.name in NAMES[:2])
        return {each.name: replace(self.loaded, model=each.model) for each in own}

    def for_long_runs(self, transformers: bool) -> list[Contender]:
        """Those to time where a run is long: without the torch backend, a reference to read that takes several times as
        long as all others on a CPU, and with or without transformers.
        """
        slow = {NAMES[2], *([] if transformers else ["transformers"])}
        return [each for each in self.contenders if each.name not in slow]

    def named(self, name: str) -> Any:
        """The contender of that name; None if it does not take part."""
        return next((each for each in self.contenders if each.name == name), None)


@contextmanager
def line_up(load: LoadConfig, names: Sequence[str], say: Any) -> Iterator[Field]:
    """Load all contenders once. Those that cannot take part are left out, and `say` is told why."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no contender; choose from {', '.join(NAMES)}.")
    loaded = load_model(load)
    stored = loaded if loaded.model.info["device"] == "cpu" and loaded.model.info["quantization"] else None
    if stored is not None:
        loaded = load_model(replace(load, dequantize=True))
    info = loaded.model.info
    packed = info.get("quantization") is not None
    with tempfile.TemporaryDirectory(prefix="tempo-mlx-bench-") as folder:
        directory = convert(load.model, Path(folder) / "model", dtype=None if packed else info["dtype"])
        contenders: list[Contender] = [Ours(NAMES[0], loaded.model)]
        if stored is not None and STORED in names:
            contenders.append(Ours(STORED, stored.model))
        for name in NAMES[2:]:
            if name not in names:
                continue
            if find_spec(NEEDS[name]) is None or (name != "mlx-lm" and find_spec("torch") is None):
                python = " with Python 3.11 or newer" if name == "mlx-lm" else ""
                say(f"{name} is left out: it is not installed (pip install 'tempo-mlx[bench]'{python}).")
            elif packed and name != "mlx-lm":
                say(f"{name} is left out: it does not compute with weights that stay {info['quantization']}.")
            elif name == "mlx-lm":
                contenders.append(MlxLm(directory))
            else:
                _calm_torch()
                if name == "transformers":
                    contenders.append(Transformers(directory, info["dtype"]))
                else:
                    config = LoadConfig(model=load.model, backend="torch", dtype=info["dtype"])
                    contenders.append(Ours(name, load_model(config).model))
        yield Field(loaded, contenders, directory)


def _calm_torch() -> None:
    """Use one thread per core. (OMP_WAIT_POLICY=PASSIVE must already be in the environment.)"""
    import torch

    torch.set_num_threads(max(1, min(os.cpu_count() or 1, 8)))


def check_equal(field: Field, ids: Sequence[int], steps: int = 6) -> dict[str, float]:
    """Check that all contenders agree before they are timed; returns the largest difference of a logit, by name.

    After the prompt, and after each of `steps` greedy tokens. Raises ModelError where one differs.
    """
    tolerance = TOLERANCES[str(field.loaded.model.info["dtype"])]
    if field.loaded.model.info.get("quantization") or field.loaded.model.info.get("kv_bits"):
        tolerance = max(tolerance, TOLERANCES["bfloat16"])
    text = list(ids)
    worst = {each.name: 0.0 for each in field.contenders[1:]}
    for _ in range(steps):
        expected = field.ours.start(text)[1]
        for other in field.contenders[1:]:
            difference = float(np.max(np.abs(other.start(text)[1] - expected)))
            worst[other.name] = max(worst[other.name], difference)
        text.append(int(expected.argmax()))
    for other in field.contenders[1:]:
        state = other.start(ids, copies=2)[0]
        rows = field.ours.rows(field.ours.start(ids)[0], [5, 6])
        worst[other.name] = max(worst[other.name], float(np.max(np.abs(other.rows(state, [5, 6]) - rows))))
    for name, difference in worst.items():
        if not difference <= tolerance:
            raise ModelError(
                f"{name} and tempo-mlx differ by {difference:.2g} in a logit, more than {tolerance:g}; they do not do "
                "the same work, so nothing was timed."
            )
    return worst
