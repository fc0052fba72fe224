"""Before anything imports a tensor library: one thread each, settings of nobody, and no question to the hub."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tempo_mlx.weights.precision import Device, Precision, Stored

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads spin, which other processes pay for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("TEMPO_") and name != "TEMPO_BLAS"]:
    del os.environ[name]
for name in ("MODEL_PATH", "DEVICE"):
    os.environ.pop(name, None)

# Ignored where the tests run in the background; and what they start would ignore it, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example that takes long on a busy machine is no failure.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("steady"), max_examples=20_000)
settings.load_profile("steady")

# What `--fast` does without. A test that needs one of them skips, as it does where that is not installed.
HEAVY = ("torch", "transformers", "mlx_lm", "fastapi", "uvicorn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="without torch, transformers, servers and the real model: make test-fast",
    )

    parser.addoption(
        "--gpu-policy",
        action="store_true",
        help="dtypes, packed weights and operations as on a GPU, computed on the CPU: make test-gpu-policy",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-policy"):
        compute_as_on_a_gpu(config)
    if not config.getoption("--fast"):
        return
    for name in HEAVY:
        sys.modules[name] = None  # importing it is an ImportError from here on
    empty = tempfile.TemporaryDirectory(prefix="tempo-mlx-fast-")
    config.add_cleanup(empty.cleanup)
    # The real model is neither there nor to be had, and nothing is compiled.
    os.environ.update(XDG_CACHE_HOME=empty.name, PIP_NO_INDEX="1", TEMPO_BLAS="openblas")


def compute_as_on_a_gpu(config: pytest.Config) -> None:
    """The rules that ask where MLX computes are told: on a GPU; and no model is small enough to be unpacked. Twins are
    of float32 numbers and stay so, since tests hold them against references in float32.
    """
    from tempo_mlx import loading
    from tempo_mlx.model import device, mlx_backend
    from tempo_mlx.weights import precision

    def choose(
        where: Device, stored: Stored, dtype: str = "auto", dequantize: bool = False, *, cpu_packs: bool
    ) -> Precision:
        wide = dtype == "auto" and set(stored.numbers) == {"float32"}
        asked: Any = "float32" if wide else dtype
        return precision.choose(where, stored, asked, dequantize, cpu_packs=cpu_packs)

    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setattr(device, "on_gpu", lambda: True)
    patch.setattr(device, "kind_of", lambda kind: "gpu")
    patch.setattr(precision, "UNPACKED_BELOW", 0)
    for module in (loading, mlx_backend):
        patch.setattr(module, "choose", choose)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--fast` leaves out what is marked slow; several processes leave out what is timed; for
    `--gpu-policy` see tests/gpu_policy.py."""
    if hasattr(config, "workerinput"):
        alone = [item for item in items if item.get_closest_marker("alone")]
        config.hook.pytest_deselected(items=alone)
        items[:] = [item for item in items if item not in alone]
    if config.getoption("--gpu-policy"):
        from tests.gpu_policy import left_out

        out = [
            item for item in items if left_out(item.path.stem.removeprefix("test_"), item.name.split("[")[0])
        ]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    if config.getoption("--fast") or config.getoption("--gpu-policy"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
