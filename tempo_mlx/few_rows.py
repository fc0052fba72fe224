"""The library of few_rows.c: compiled once with the system's C compiler, checked, and put in front of a BLAS.

Where there is no compiler, or its work does not agree with the BLAS, everything is computed by the BLAS as before.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.cores import threads
from tempo_mlx.errors import BackendError

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
ROWS = 16  # the most rows it takes (MOST_ROWS there)
PATIENCE = 120  # seconds that compiling may take; on an idle machine it takes two
TOLERANCE = 1e-5  # of the sum of the products' absolute values
_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112


def load(behind: ctypes.CDLL, directory: Path) -> Path:
    """Put the library in front of the BLAS `behind`, for whatever looks for `cblas_sgemm` from now on.

    directory: where the compiled library is kept. Raises BackendError where it cannot be compiled or computes
    something else than `behind`, and OSError where the directory cannot be written.
    """
    path = compiled(SOURCE, COMPILERS, (), directory)
    library = ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
    library.few_rows_start(ctypes.cast(behind.cblas_sgemm, ctypes.c_void_p), threads())
    check(library, behind)
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return path


def check(library: ctypes.CDLL, blas: ctypes.CDLL) -> None:
    """Raise BackendError unless both compute the same: every number of rows, ends of every length, several threads."""
    rng = np.random.default_rng(0)
    for outs, size in ((5, 3), (13, 100), (2003, 131)):  # the last one is shared between threads
        x, w = (rng.standard_normal((n, size), np.float32) for n in (ROWS + 1, outs))
        right, bound = _product(blas, x, w), TOLERANCE * (np.abs(x) @ np.abs(w).T)
        for rows in range(1, ROWS + 2):
            if not (np.abs(_product(library, x[:rows], w) - right[:rows]) <= bound[:rows]).all():
                raise BackendError(
                    f"its product of {rows} rows of {size} numbers with {outs} outputs is not the BLAS's"
                )


def _product(library: ctypes.CDLL, x: Float32s, w: Float32s) -> Float32s:
    """x (L, in) times w (out, in) transposed, by a library's cblas_sgemm."""
    (rows, size), outs = x.shape, len(w)
    y = np.full((rows, outs), np.nan, np.float32)
    at = [ctypes.c_void_p(a.ctypes.data) for a in (x, w, y)]
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    library.cblas_sgemm(
        _ROW_MAJOR, _NO_TRANS, _TRANS, rows, outs, size, one, at[0], size, at[1], size, zero, at[2], outs
    )  # fmt: skip
    return y


def compiled(
    source: Path, compilers: Sequence[str], flags: Sequence[str], directory: Path, of: str = ""
) -> Path:
    """The compiled library; made if the directory holds none of this source, compiler, flags and processor. of: what
    else it depends on. Raises BackendError where it cannot be made, and OSError where the directory cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise BackendError(f"there is no compiler; install one (Debian: apt install {compilers[1]})")
    facts = (compiler, *flags, of)
    key = hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, facts), _processor()])).hexdigest()
    target = directory / f"{source.stem.replace('_', '-')}-{key[:20]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        made = Path(work, target.name)
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        command = [
            compiler,
            "-O2",
            native,
            "-shared",
            "-fPIC",
            "-pthread",
            "-o",
            str(made),
            str(source),
            *flags,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise BackendError(f"{compiler} did not compile {source.name} in {PATIENCE} seconds") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it did not say why"]
            raise BackendError(f"{compiler} could not compile {source.name}: {said[0]}")
        made.replace(target)  # atomic: another process sees the whole file or none
    return target


def _processor() -> bytes:
    """What the compiler may use of this processor: a cache directory may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.machine().encode()
    return next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
