"""llama.cpp, as PyPI's xllamacpp brings it: its server, in this process or in one of its own.

python -m tempo_mlx.bench.llama MODEL.gguf TEXTS       serves until its input ends, and then says its peak memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.bench.child import peak_bytes
from tempo_mlx.errors import BackendError

WINDOW = 1024  # slots a text


@dataclass(frozen=True)
class LlamaCpp:
    """A server of llama.cpp."""

    address: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", body)["tokens"])

    def complete(self, token_ids: Sequence[int], count: int, **options: Any) -> Any:
        """Its whole answer; greedy unless told otherwise. Nothing is kept of earlier prompts."""
        body = {"prompt": list(token_ids), "n_predict": count, "temperature": 0, "return_tokens": True}
        return self.post("/completion", {**body, "cache_prompt": False, **options})

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The most probable tokens that follow, up to one that ends the text."""
        return list(self.complete(token_ids, count)["tokens"])

    def texts(self, token_ids: Sequence[int], count: int, texts: int) -> list[list[int]]:
        """So many samples of just that length at once, each a request."""

        def one(seed: int) -> list[int]:
            options = {"temperature": 1.0, "seed": seed, "ignore_eos": True}
            return list(self.complete(token_ids, count, **options)["tokens"])

        with ThreadPoolExecutor(texts) as requests:
            return list(requests.map(one, range(texts)))


@contextmanager
def llama_cpp(path: Path, *, texts: int = 1, threads: int = 1, exact: bool = False) -> Iterator[LlamaCpp]:
    """A server in this process, on the CPU. exact: with a float32 cache; theirs is of float16."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers = texts, texts * WINDOW, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    if exact:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.warmup, parameters.verbosity = False, 0
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server.listening_address)
    del server


class Process:
    """A server in a process of its own, in its own default environment: how threads wait is not ours to say there.

    seconds: from its start until it had said one token. Raises BackendError where it does not start.
    """

    def __init__(self, path: Path, texts: int) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        command = [sys.executable, "-m", "tempo_mlx.bench.llama", str(path), str(texts)]
        start = time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        address = next((line.split()[1] for line in self.process.stdout if line.startswith("address ")), None)
        if address is None:
            raise BackendError(f"llama.cpp does not start on {path}.")
        self.server = LlamaCpp(address)
        self.server.complete([1, 2], 1)
        self.seconds = time.perf_counter() - start

    def end(self) -> int:
        """Peak memory in bytes."""
        said, _ = self.process.communicate("")
        return int(said.split()[-1])

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def dequantised(path: Path, directory: Path) -> Path:
    """The same model with float32 weights, written by the gguf package."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    kind = reader.get_field("general.architecture")
    assert kind is not None
    writer = gguf.GGUFWriter(directory / "dense.gguf", kind.contents())
    for field in fields:
        if field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor_info(tensor.name, [int(size) for size in tensor.shape[::-1]], np.dtype(np.float32),
                               int(tensor.n_elements) * 4)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        dense = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(np.ascontiguousarray(dense, np.float32))
    writer.close()
    return directory / "dense.gguf"


def main(path: str, texts: str) -> None:
    with llama_cpp(Path(path), texts=int(texts), threads=os.cpu_count() or 1) as server:
        sys.stdout.write(f"address {server.address}\n")
        sys.stdout.flush()
        sys.stdin.read()
        sys.stdout.write(f"peak {peak_bytes()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
