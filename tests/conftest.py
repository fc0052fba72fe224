"""Before anything imports a tensor library: one thread each, settings of nobody, and no question to the hub."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads spin, which other processes pay for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("TEMPO_") and name != "TEMPO_BLAS"]:
    del os.environ[name]
for name in ("MODEL_PATH", "DEVICE"):
    os.environ.pop(name, None)
