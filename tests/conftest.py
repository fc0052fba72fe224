"""Before anything imports a tensor library: one thread each, settings of nobody, and no question to the hub."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads spin, which other processes pay for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("TEMPO_") and name != "TEMPO_BLAS"]:
    del os.environ[name]
for name in ("MODEL_PATH", "DEVICE"):
    os.environ.pop(name, None)

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


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--fast"):
        return
    for name in HEAVY:
        sys.modules[name] = None  # importing it is an ImportError from here on
    empty = tempfile.TemporaryDirectory(prefix="tempo-mlx-fast-")
    config.add_cleanup(empty.cleanup)
    # The real model is neither there nor to be had.
    os.environ.update(XDG_CACHE_HOME=empty.name, PIP_NO_INDEX="1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--fast` leaves out what is marked slow."""
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
