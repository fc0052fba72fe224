"""What five texts cost: branches on one cache, beside one greedy text, five in turn, and other programs.

    python -m benchmarks.branches [--tokens 64] [--branches 5] [--rounds 5]

Every arm makes texts of exactly `--tokens` tokens from the same prompt and weights, in float32 on one machine. The
arms take turns within a round, so that a busy moment hits all alike, each after a short run of its own that is
not timed (libraries with thread pools of their own disturb each other); ratios are taken within a round. Prints a
table of medians and spreads, then one JSON line. Needs transformers and mlx-lm for their arms.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.acceptance import Bench
from benchmarks.studies import prompts, versions
from tempo_mlx import generate

Arm = Callable[[], list[int]]  # the lengths of the texts it made


def arms(bench: Bench, count: int, tokens: int) -> dict[str, Arm]:
    ids = bench.mlx.tokenizer.encode(prompts(1)[0])
    length = {"max_tokens": tokens, "min_steps": tokens}

    def ours(**settings: Any) -> list[int]:
        return [len(path.token_ids) for path in generate(bench.mlx, ids, **length, **settings).paths]

    def greedy() -> list[int]:
        return [len(generate(bench.mlx, ids, decoder="plain", temperature=0, **length).steps)]

    def mlx_lm() -> list[int]:
        from mlx_lm import batch_generate

        texts = SimpleNamespace(eos_token_ids=[], decode=lambda ids: "")
        done = batch_generate(bench.mlx_lm, texts, [ids] * count, max_tokens=tokens, return_token_ids=True)
        return [len(each) for each in done.token_ids]

    def transformers_beam() -> list[int]:
        import torch

        with torch.inference_mode():
            out = bench.transformers.generate(
                torch.tensor([ids]), num_beams=count, num_return_sequences=count, do_sample=False,
                max_new_tokens=tokens, min_new_tokens=tokens,
            )  # fmt: skip
        return [len(each) - len(ids) for each in out]

    return {
        "one greedy": greedy,
        f"{count} branches": lambda: ours(branches=count),
        f"{count} sampled branches": lambda: ours(branches=count, branch_choice="sample"),
        f"{count} greedy in turn": lambda: [length for _ in range(count) for length in greedy()],
        f"beam of {count}": lambda: ours(decoder="beam", beam_width=count),
        f"mlx-lm batch of {count}": mlx_lm,
        f"transformers beam of {count}": transformers_beam,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--branches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="Arms whose name holds this text; may be repeated.")
    options = parser.parse_args()
    bench = Bench(1)
    timed, short = arms(bench, options.branches, options.tokens), arms(bench, options.branches, 4)
    chosen = [name for name in timed if not options.only or any(part in name for part in options.only)]
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name in chosen:
            short[name]()
            start = time.perf_counter()
            lengths = timed[name]()
            seconds[name].append(time.perf_counter() - start)
            texts = 1 if name == "one greedy" else options.branches
            if lengths != [options.tokens] * texts:
                raise SystemExit(f"{name} did other work: texts of {lengths} tokens.")
    table = {name: np.array(taken) for name, taken in seconds.items()}
    unit = table.get(f"{options.branches} branches", next(iter(table.values())))
    print(f"{'':26} {'seconds':>8} {'min':>7} {'max':>7} {'x branches':>11}")
    ratios = {name: float(np.median(taken / unit)) for name, taken in table.items()}
    for name, taken in table.items():
        print(f"{name:26} {np.median(taken):8.2f} {taken.min():7.2f} {taken.max():7.2f} {ratios[name]:11.2f}")
    result = {
        "benchmark": "branches",
        "tokens": options.tokens,
        "branches": options.branches,
        "seconds": seconds,
        "over_branches": ratios,
        "versions": versions(bench.mlx.model.info),
        "blas": os.environ.get("TEMPO_BLAS", "auto"),
        "load": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
