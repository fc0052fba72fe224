"""The original TEMPO on the same weights: `python original.py CHECKOUT MODEL_DIRECTORY STEPS PROMPT...`.

Its last line is the decoding time in seconds. Runs as a script in its own process, without any of tempo-mlx;
github.com/JoeLuker/tempo.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
import tempfile
import time
from typing import Any


def main(checkout: str, directory: str, steps: str, *prompts: str) -> None:
    sys.path[0] = checkout
    os.chdir(tempfile.mkdtemp())
    import torch

    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(max(1, min(os.cpu_count() or 1, 8)))
    runner_module: Any = importlib.import_module("src.experiments.experiment_runner")
    wrapper: Any = importlib.import_module("src.modeling.model_wrapper").TEMPOModelWrapper
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # its tokenizer adapter moves ids to "mps" whatever the device is
    runner_module.TokenizerAdapter = functools.partial(runner_module.TokenizerAdapter, device=device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, attn_implementation="eager").eval().to(device)  # eager, as in its main program
    runner = runner_module.ExperimentRunner(wrapper(model, tokenizer, device), tokenizer, device)

    def run(prompt: str, count: int) -> float:
        settings = {
            "prompt": prompt, "max_tokens": count, "min_steps": count, "selection_threshold": 0.1, "output_dir": "out",
        }  # fmt: skip
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            done = runner.run_experiment(settings)
        return float(done.get("generation_time") or time.perf_counter() - start)

    run(prompts[0], 4)
    sys.stdout.write(f"\n{sum(run(prompt, int(steps)) for prompt in prompts)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
