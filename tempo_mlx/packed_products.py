"""The library of packed_products.cpp: products of packed weights on the CPU by few_rows.c, where MLX's own take longer.

It is compiled once with the system's C++ compiler against the headers of the installed MLX, and put in the place of
MLX's `quantized_matmul`. Where that cannot be, packed weights are unpacked, as everything else is computed there.
Nothing of it, nor of MLX's library, is seen by other libraries of the process.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

from tempo_mlx.errors import BackendError
from tempo_mlx.few_rows import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")


def load(directory: Path) -> Path:
    """Have MLX ask the library to describe such products, from its import on; few_rows.py's has to be in its place.
    It hands them to MLX's own function until it is trusted.

    directory: where the compiled library is kept. Raises BackendError where it cannot be compiled or MLX does not
    take it, and OSError where the directory cannot be written or a library does not load.
    """
    found = find_spec("mlx")  # a namespace: other folders of that name may be in it
    places = map(Path, (found and found.submodule_search_locations) or ())
    where = next((each for each in places if (each / "lib" / "libmlx.so").exists()), None)
    if where is None:
        raise BackendError("the package mlx has no lib/libmlx.so")
    library = where / "lib"
    flags = ("-std=c++20", f"-I{where / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}", "-lmlx", "-ldl")
    path = compiled(SOURCE, COMPILERS, flags, directory, importlib.metadata.version("mlx"))
    module = next(
        (each for each in (where / f"core{end}" for end in EXTENSION_SUFFIXES) if each.exists()), None
    )
    if module is None:
        raise BackendError("the package mlx has no module core")
    ctypes.CDLL(str(module))  # linked, but not begun: then it asks where its functions are
    if ctypes.CDLL(str(path)).packed_products_begin(str(module).encode()) == 0:
        raise BackendError("this version of mlx calls its products in another way")
    return path


def trust(path: str, whether: bool) -> None:
    """Whether the library is to describe products."""
    ctypes.CDLL(path).packed_products_trust(int(whether))


def counted(path: str) -> Callable[[], int]:
    """How many products the library has described so far."""
    count = ctypes.CDLL(path).packed_products_described
    count.restype = ctypes.c_long
    return count
