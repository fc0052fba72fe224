"""What the defaults give on real text: how wide the sets are, and how well the best path reads beside greedy text.

    python -m benchmarks.defaults [--model NAME] [--prompts 13] [--tokens 40]

Perplexity is of the output under the full model, over the tokens of all prompts together; a text that ends early
counts with the tokens it has. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from benchmarks.studies import Scorer, bootstrap, prompts, versions
from tempo_mlx import generate, load
from tempo_mlx.report.run import Run, best_path


def reading(run: Run) -> list[int]:
    return [token.id for token in best_path(run.steps)]


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=13)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args(arguments)
    loaded = load(options.model)
    widths, best, greedy = [], [], []
    print(f"{'width':>6} {'best path':>10} {'greedy':>8}  prompt")
    for prompt in prompts(options.prompts):
        run = generate(loaded, prompt, max_tokens=options.tokens)
        plain = generate(loaded, prompt, max_tokens=options.tokens, decoder="plain", temperature=0.0)
        scorer = Scorer(loaded.model, run.prompt.token_ids)
        scores = scorer.continuations([reading(run), reading(plain)])
        widths.append((sum(len(step.tokens) for step in run.steps), len(run.steps)))
        best.append((scores[0].sum(), len(scores[0])))
        greedy.append((scores[1].sum(), len(scores[1])))
        shown = [np.exp(-scores[i].mean()) for i in (0, 1)]
        print(f"{widths[-1][0] / widths[-1][1]:6.2f} {shown[0]:10.2f} {shown[1]:8.2f}  {prompt}")

    def statistics(index: np.ndarray) -> np.ndarray:
        width, one, other = (np.array(table)[index].sum(axis=0) for table in (widths, best, greedy))
        perplexity = [float(np.exp(-total / count)) for total, count in (one, other)]
        return np.array([width[0] / width[1], *perplexity, perplexity[0] / perplexity[1]])

    mean, low, high = bootstrap(statistics, len(widths))
    names = ["mean_width", "perplexity_best_path", "perplexity_greedy", "ratio"]
    for name, value, lower, upper in zip(names, mean, low, high, strict=True):
        print(f"{name:22} {value:6.3f}   95% interval over prompts {lower:.3f} to {upper:.3f}")
    result: dict[str, object] = {
        "benchmark": "defaults",
        "prompts": options.prompts,
        "tokens": options.tokens,
        **dict(zip(names, map(float, mean), strict=True)),
        "versions": versions(loaded.model.info),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
