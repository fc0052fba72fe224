"""Weights lie in large pages where Linux has them for who asks, and their memory is given back with them."""

from __future__ import annotations

import sys

import pytest
from test_blas import run

from tempo_mlx.model import pages

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or pages._libc() is None, reason="this system has no large pages for who asks"
)
LOADED = """
import gc, re
from pathlib import Path
def megabytes(what):
    return int(re.search(rf"^{what}: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) / 1024
import tempo_mlx
loaded = tempo_mlx.load("smollm2-135m", device="cpu", dequantize=True)
held = megabytes("Rss")
print(megabytes("AnonHugePages"))
del loaded
gc.collect()
from tempo_mlx.mlx import mx
mx.clear_cache()
from tempo_mlx.model.pages import give_back
give_back()
print(held - megabytes("Rss"))
"""


@pytest.mark.slow
def test_of_a_model() -> None:
    large, freed = map(float, run(LOADED).split())
    assert large > 500.0  # of 519
    assert freed > 500.0


def test_without_them_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MODE", pages.MODE.with_name("missing"))
    assert pages._libc() is None
    with pages.large_pages(10**9):
        pass
    pages.give_back()
